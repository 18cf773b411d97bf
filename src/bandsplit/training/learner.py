"""What one branch does in a step, by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from bandsplit.config.schema import RunConfig
from bandsplit.distributed.mesh import Mesh
from bandsplit.models import batch_norm
from bandsplit.models.ensemble import Ensemble
from bandsplit.models.precision import Precision
from bandsplit.training import losses, optimizers


class Learner:
    """One branch, its optimizer and its loss scale; independent of all others."""

    def __init__(
        self,
        branch: nn.Module,
        config: RunConfig,
        precision: Precision,
        mesh: Mesh,
        ema: AveragedModel | None = None,
    ) -> None:
        self.optimizer = optimizers.optimizer(branch, config)
        self.ema = ema
        """Running mean of the weights and buffers, or None: `optimizers.running_mean`."""
        self.lr_factor = 1.0
        """Below 1 where `train.on_nonfinite = "lower_lr"` has lowered the learning rate."""
        self._module, self._branch = branch, mesh.replicate(branch)
        self._precision = precision
        self._scaler = precision.scaler()
        self._config, self._clip_norm = config, config.train.clip_norm
        self._on_nonfinite = config.train.on_nonfinite

    @property
    def validated(self) -> nn.Module:
        """The network that is validated: the running mean where there is one."""
        return self._module if self.ema is None else self.ema.module

    def step(
        self,
        inputs: Sequence[Tensor],
        labels: Sequence[Tensor],
        lr: float,
        momentum: float | None = None,
        teacher_logits: Sequence[Tensor | None] | None = None,
    ) -> Tensor | None:
        """One optimizer step over the parts of a batch, (B, channels, h, w) each; returns the mean loss, a scalar.

        Labels are classes (B,) or shares of them (B, classes); momentum None: as the optimizer has it; `taught`: a
        teacher's logits (B, classes).  Activations and gradients of this branch are gone when it returns.  None:
        gradients were not finite and nothing has changed, as `train.on_nonfinite` wants it.
        """
        buffers = [buffer.clone() for buffer in self._module.buffers()] if self._on_nonfinite != "stop" else []
        for group in self.optimizer.param_groups:
            group["lr"] = lr * self.lr_factor
            if momentum is not None:
                group.update({"betas": (momentum, group["betas"][1])} if "betas" in group else {"momentum": momentum})
        mean_loss = torch.zeros((), device=inputs[0].device)
        for i, (x, y, t) in enumerate(zip(inputs, labels, teacher_logits or [None] * len(inputs), strict=True)):
            with self._reducing_gradients(i == len(inputs) - 1):
                with self._precision.autocast():
                    logits = self._branch(x)
                    loss = losses.loss(logits, y, self._config.loss)
                    if t is not None and self._config.distillation is not None:
                        loss = losses.distilled(logits, t, loss, self._config.distillation)
                    loss = loss / len(inputs)
                self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            mean_loss += loss.detach()
        norm = self._gradient_norm() if self._on_nonfinite != "stop" or self._clip_norm is not None else None
        left_out = self._on_nonfinite != "stop" and norm is not None and not bool(norm.isfinite())
        if left_out:
            for buffer, before in zip(self._module.buffers(), buffers, strict=True):
                buffer.copy_(before)
            if self._on_nonfinite == "lower_lr":
                self.lr_factor /= 2
        else:
            self._scaler.step(self.optimizer)
            if self.ema is not None:
                self.ema.update_parameters(self._module)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return None if left_out else mean_loss

    def _gradient_norm(self) -> Tensor:
        """Norm of the averaged gradients, a scalar, the same on every rank; clips them to `train.clip_norm`."""
        self._scaler.unscale_(self.optimizer)
        most = math.inf if self._clip_norm is None else self._clip_norm
        return torch.nn.utils.clip_grad_norm_(self._module.parameters(), most)

    def _reducing_gradients(self, last: bool) -> AbstractContextManager[None]:
        """Gradients travel between ranks once a step: with the last part."""
        branch = self._branch
        return nullcontext() if last or not isinstance(branch, DistributedDataParallel) else branch.no_sync()

    def state_dict(self) -> dict[str, Any]:
        """Tensors are those in use, not copies; `ema` is a network like `network`."""
        mean = {} if self.ema is None else {"ema": self.ema.module.state_dict(), "ema_steps": self.ema.n_averaged}
        return {
            "network": self._module.state_dict(),
            **mean,
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
            self.ema.n_averaged.copy_(state["ema_steps"])


def learners_of(config: RunConfig, at_once: int, precision: Precision, mesh: Mesh) -> tuple[Ensemble, list[Learner]]:
    """This rank's branches, freshly initialised, and what trains them; `at_once` images go through one at a time."""
    ensemble = Ensemble.of(config, mesh.own).to(mesh.ranks.device).to(memory_format=torch.channels_last)
    bn_batch_size = batch_norm.bn_batch_size(config, at_once, mesh.replicas)
    means = [optimizers.running_mean(branch, config) for branch in ensemble.branches]  # before they know other ranks
    learners = [
        Learner(batch_norm.fit(branch, bn_batch_size, at_once, mesh), config, precision, mesh, mean)
        for branch, mean in zip(ensemble.branches, means, strict=True)
    ]
    return ensemble, learners
