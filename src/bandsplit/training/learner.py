"""Training of one branch: optimizer, loss scale and EMA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm

from bandsplit.config.schema import RunConfig
from bandsplit.distributed.mesh import Mesh
from bandsplit.models import batch_norm, networks
from bandsplit.models.ema import EMA
from bandsplit.models.ensemble import Ensemble
from bandsplit.models.precision import Precision
from bandsplit.models.pretrained import Initial
from bandsplit.runs.initial import begin
from bandsplit.training import capture, losses, optimizers


class Outcome(NamedTuple):
    """Result of a step: scalars on the device, not synchronized with the host."""

    loss: Tensor
    """Mean over the batch, float32."""
    taken: Tensor
    """bool: gradients were finite; otherwise weights, optimizer state and EMA are unchanged. Equal on all replicas."""
    failed: Tensor
    """bool: gradients were not finite although the loss scale is at most 1. Above 1, overflow is expected in fp16 and
    only lowers the scale."""


class Learner:
    """One branch with its optimizer, loss scale and EMA, independent of all other branches."""

    def __init__(
        self, branch: nn.Module, config: RunConfig, precision: Precision, mesh: Mesh, ema: EMA | None = None
    ) -> None:
        self.optimizer = optimizers.optimizer(branch, config)
        self.ema = ema
        """`optimizers.make_ema` of the branch, or None."""
        self.lr_factor = 1.0
        """Below 1 where `train.on_nonfinite = "lower_lr"` has lowered the learning rate."""
        self._frozen = networks.frozen_modules(branch)
        self._module, self._replicated = branch, mesh.replicate(branch)
        self.network = compiled(self._replicated, config, mesh) if config.train.compile else self._replicated
        """The branch as it is trained: with gradients averaged over its replicas, and compiled with `train.compile`."""
        self._precision = precision
        self._scaler = precision.scaler()
        self._config, self._on_nonfinite = config, config.train.on_nonfinite

    @property
    def validated(self) -> nn.Module:
        """The network to validate: the EMA where there is one."""
        return self._module if self.ema is None else self.ema.module

    def step(
        self,
        inputs: Sequence[Tensor],
        labels: Sequence[Tensor],
        lr: float | Tensor,
        momentum: float | None = None,
        teacher_logits: Sequence[Tensor | None] | None = None,
    ) -> Outcome:
        """One optimizer step over the micro-batches of a batch, (B, channels, h, w) each.

        Labels are class indices (B,) or class probabilities (B, classes); teacher_logits (B, classes); momentum None
        leaves the optimizer's value. The learning rate of a captured step is a scalar on the device. Frees this
        branch's activations and gradients. If gradients are not finite, only the running statistics change; with
        `train.on_nonfinite` "skip" or "lower_lr" they do not change either.
        """
        self._set(lr * self.lr_factor, momentum)
        for module in self._frozen:
            module.eval()
        if self._config.train.compile:  # its import takes a second or more
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # CUDA graphs may reuse memory
        statistics = None if self._on_nonfinite == "stop" else _Buffers(self._module)
        loss = self._backward(inputs, labels, teacher_logits or [None] * len(inputs))
        self._scaler.unscale_(self.optimizer)
        taken = self._gradient_norm().isfinite()
        optimizers.step_if(self.optimizer, taken)
        if statistics is not None:
            statistics.restore_unless(taken)
        if self.ema is not None:
            self.ema.update(self._module, taken)
        failed = ~taken & (self._scaler.scale(torch.ones_like(loss)) <= 1)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self._on_nonfinite == "lower_lr" and not bool(taken):
            self.lr_factor /= 2
        return Outcome(loss, taken, failed)

    def forget_step(self) -> None:
        """Makes it ready for a step after one that has failed midway: without gradients, and with its loss scale."""
        self.optimizer.zero_grad(set_to_none=True)
        one = torch.ones((), device=next(self.network.parameters()).device)
        self._scaler.update(self._scaler.scale(one))  # keeps the scale; forgets that gradients have been divided by it

    def _set(self, lr: float | Tensor, momentum: float | None) -> None:
        optimizers.set_lr(self.optimizer, lr)
        if momentum is not None:
            for group in self.optimizer.param_groups:
                group.update({"betas": (momentum, group["betas"][1])} if "betas" in group else {"momentum": momentum})

    def _backward(
        self, inputs: Sequence[Tensor], labels: Sequence[Tensor], teacher_logits: Sequence[Tensor | None]
    ) -> Tensor:
        """Accumulates gradients over the micro-batches, averaged over replicas; returns this rank's mean loss."""
        mean_loss = torch.zeros((), device=inputs[0].device)
        for i, (x, y, t) in enumerate(zip(inputs, labels, teacher_logits, strict=True)):
            with self._reducing_gradients(i == len(inputs) - 1):
                with self._precision.autocast():
                    loss = self._loss(self.network(x), y, t) / len(inputs)
                self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            mean_loss += loss.detach()
        return mean_loss

    def _loss(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> Tensor:
        distillation = self._config.distillation
        if teacher_logits is None or distillation is None:
            return losses.loss(logits, labels, self._config.loss)
        if distillation.residual:
            return losses.loss(logits + teacher_logits, labels, self._config.loss)
        return losses.distilled(logits, teacher_logits, losses.loss(logits, labels, self._config.loss), distillation)

    def _gradient_norm(self) -> Tensor:
        """The 2-norm of the gradients, which are clipped to `train.clip_norm` if it is set.

        Of all reductions that tell whether they are finite, torch has the fastest kernels for this one.
        """
        parameters, clip_norm = list(self._module.parameters()), self._config.train.clip_norm
        if clip_norm is not None:
            return clip_grad_norm_(parameters, clip_norm)
        return get_total_norm([p.grad for p in parameters if p.grad is not None])

    @torch.no_grad()
    def finite(self) -> Tensor:
        """Whether weights, buffers, optimizer state and EMA are finite: a bool scalar on the device."""
        modules = [self._module, *([self.ema] if self.ema is not None else [])]
        tensors = [x for module in modules for x in (*module.parameters(), *module.buffers())]
        tensors += optimizers.state_of(self.optimizer).values()
        return get_total_norm([x for x in tensors if x.is_floating_point()], math.inf).isfinite()

    def _reducing_gradients(self, last: bool) -> AbstractContextManager[None]:
        """Context that all-reduces gradients only in the backward pass of the last micro-batch."""
        network = self._replicated
        return nullcontext() if last or not isinstance(network, DistributedDataParallel) else network.no_sync()

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint; tensors are references, not copies."""
        ema = {} if self.ema is None else {"ema": self.ema.module.state_dict(), "ema_updates": self.ema.updates}
        return {
            "network": self._module.state_dict(),
            **ema,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "lr_factor": self.lr_factor,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._module.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self.lr_factor = state["lr_factor"]
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.updates.copy_(state["ema_updates"])


def compiled(network: nn.Module, config: RunConfig, mesh: Mesh) -> nn.Module:
    """The network with code generated by torch.compile in its first step; networks of the same kind share the code.

    On a GPU, torch.compile makes CUDA graphs of the forward and backward pass where the whole step is not one.
    """
    device = mesh.ranks.device
    replays = device.type == "cuda" and capture.obstacle(config, device, mesh.replicas) is not None
    made: Any = torch.compile(network, mode="reduce-overhead" if replays else "default")
    return cast(nn.Module, made)


class _Buffers:
    """A copy of a network's buffers, flattened into one tensor per dtype."""

    def __init__(self, network: nn.Module) -> None:
        buffers = list(network.buffers())
        self._buffers = [[b for b in buffers if b.dtype == dtype] for dtype in dict.fromkeys(b.dtype for b in buffers)]
        self._copies = [_flat(same) for same in self._buffers]

    def restore_unless(self, condition: Tensor) -> None:
        """Restores the copy unless `condition`, a bool scalar on the device, is true. Does not synchronize."""
        for same, copy in zip(self._buffers, self._copies, strict=True):
            kept = torch.split(torch.where(condition, _flat(same), copy), [b.numel() for b in same])
            torch._foreach_copy_(same, [x.view_as(b) for x, b in zip(kept, same, strict=True)])


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


def learners_of(
    config: RunConfig, at_once: int, precision: Precision, mesh: Mesh, trained: Mapping[int, Initial] | None = None
) -> tuple[Ensemble, list[Learner]]:
    """This rank's branches, freshly initialized, and a learner for each.

    Args:
        at_once: images in one forward pass of a branch on one rank.
        trained: weights that some of them begin with, by number.
    """
    ensemble = Ensemble.of(config, mesh.own).to(mesh.ranks.device).to(memory_format=torch.channels_last)
    begin(trained or {}, [config.split.numbers[k] for k in mesh.own], ensemble)
    bn_batch_size = batch_norm.bn_batch_size(config, at_once, mesh.replicas)
    if config.train.activation_checkpointing:
        for branch in ensemble.branches:
            networks.recompute(branch)
    emas = [optimizers.make_ema(branch, config) for branch in ensemble.branches]  # copies without process groups
    learners = [
        Learner(batch_norm.fit(branch, bn_batch_size, at_once, mesh), config, precision, mesh, ema)
        for branch, ema in zip(ensemble.branches, emas, strict=True)
    ]
    return ensemble, learners
