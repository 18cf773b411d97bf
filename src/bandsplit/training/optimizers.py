"""Optimizers, steps that can be skipped without a device sync, and the EMA of weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bandsplit.config import schema
from bandsplit.errors import UserError
from bandsplit.models import networks
from bandsplit.models.ema import EMA

FUSED = ("sgd", "adam", "adamw")
"""`optim.type` of those with a fused kernel, which takes the learning rate from the device too."""


def optimizer(branch: nn.Module, config: schema.RunConfig) -> torch.optim.Optimizer:
    """The optimizer of one branch, with torch's fused kernel if it has one.

    Raises UserError for LAMB if timm is not installed.
    """
    optim, groups = config.optim, _groups(branch, config.optim)
    parameters = [p for group in groups for p in group["params"]]
    shared: dict[str, Any] = {"lr": config.peak_lr, "weight_decay": optim.weight_decay}
    match optim:
        case schema.SGD():
            sgd = torch.optim.SGD(groups, momentum=optim.momentum, nesterov=optim.nesterov, fused=True, **shared)
            if optim.momentum or schedule_sets_momentum(config):
                # torch allocates these in the first step, and leaves them uninitialized where that step is skipped
                for p in parameters:
                    sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
            return sgd
        case schema.Adam():
            return torch.optim.Adam(groups, betas=optim.betas, eps=optim.eps, fused=True, **shared)
        case schema.AdamW():
            return torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps, fused=True, **shared)
        case schema.RMSprop():
            return torch.optim.RMSprop(
                groups, alpha=optim.alpha, momentum=optim.momentum, eps=optim.eps, centered=optim.centered, **shared
            )
        case schema.Lamb():
            try:
                from timm.optim import Lamb
            except ImportError as error:
                raise UserError("optim.type: 'lamb' needs timm: pip install -e .[timm]") from error
            lamb: torch.optim.Optimizer = Lamb(groups, betas=optim.betas, eps=optim.eps, **shared)
            return lamb


def _groups(branch: nn.Module, optim: schema.Optim) -> list[dict[str, Any]]:
    """The parameters that are trained, in groups of equal weight decay and learning rate.

    With `optim.decay_norm_and_bias = false`, parameters of at most one dimension (norms and biases) get no weight
    decay. With `optim.layer_decay` d, groups have `lr_scale` = d^(L - 1 - l), the factor on the learning rate of layer
    l of L.
    """
    layers = {} if optim.layer_decay == 1 else networks.layers_of(branch)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, p in branch.named_parameters():
        if not p.requires_grad:
            continue
        layer, undecayed = layers.get(name, 0), p.ndim <= 1 and not optim.decay_norm_and_bias
        group = groups.setdefault((layer, undecayed), {"params": []})
        group["params"].append(p)
        if undecayed:
            group["weight_decay"] = 0.0
        if layers:
            group["lr_scale"] = optim.layer_decay ** (max(layers.values()) - layer)
    return [groups[key] for key in sorted(groups)]


def set_lr(optimizer: torch.optim.Optimizer, lr: float | Tensor) -> None:
    """Sets the learning rate, times `lr_scale` in groups that have it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"] if "lr_scale" in group else lr


def schedule_sets_momentum(config: schema.RunConfig) -> bool:
    """Whether the momentum changes from step to step."""
    return isinstance(config.schedule, schema.OneCycle) and config.schedule.momentum is not None


@torch.no_grad()
def step_if(optimizer: Any, condition: Tensor) -> None:
    """One optimizer step if `condition`, a bool scalar on the device, is true; otherwise nothing changes.

    Does not synchronize. LAMB counts a skipped step in its bias correction, since it counts on the host.
    """
    if optimizer.defaults.get("fused"):  # fused kernels skip the step if found_inf is set, as by torch.amp.GradScaler
        optimizer.grad_scale, optimizer.found_inf = None, (~condition).float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        return
    parameters = {(p, ""): p for group in optimizer.param_groups for p in group["params"]}
    before = {key: x.clone() for key, x in (parameters | state_of(optimizer)).items()}
    optimizer.step()
    for key, x in (parameters | state_of(optimizer)).items():
        if x.device == condition.device:  # leaves out step counters kept on the host
            x.copy_(torch.where(condition, x, before.get(key, 0)))  # new state starts at zero


@contextmanager
def capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Context in which a CUDA graph of a step of one of FUSED can be captured; leaves its settings as they were."""
    before = [dict(group) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True
    try:
        yield
    finally:
        for group, settings in zip(optimizer.param_groups, before, strict=True):
            group.update(settings)


def state_of(optimizer: torch.optim.Optimizer) -> dict[tuple[Tensor, str], Tensor]:
    """Tensors of an optimizer's state, by parameter and name."""
    return {(p, name): x for p, state in optimizer.state.items() for name, x in state.items() if isinstance(x, Tensor)}


def make_ema(branch: nn.Module, config: schema.RunConfig) -> EMA | None:
    """The EMA of a branch's weights and buffers where `train.ema_decay` is set."""
    return None if config.train.ema_decay is None else EMA(branch, config.train.ema_decay)
