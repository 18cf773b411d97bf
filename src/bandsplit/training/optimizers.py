"""Optimizers and the EMA of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bandsplit.config import schema
from bandsplit.errors import UserError


def optimizer(branch: nn.Module, config: schema.RunConfig) -> torch.optim.Optimizer:
    """The optimizer of one branch, with torch's fused kernel where there is one.

    Without `optim.decay_norm_and_bias` there are two groups: weights, and what has one dimension at most, which is not
    decayed.  Raises UserError where LAMB is asked for and timm is not installed.
    """
    optim = config.optim
    parameters = [p for p in branch.parameters() if p.requires_grad]
    groups: Any = parameters
    if not optim.decay_norm_and_bias:
        weights, rest = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
        groups = [{"params": weights}, {"params": rest, "weight_decay": 0.0}]
    shared: dict[str, Any] = {"lr": config.peak_lr, "weight_decay": optim.weight_decay}
    match optim:
        case schema.SGD():
            sgd = torch.optim.SGD(groups, momentum=optim.momentum, nesterov=optim.nesterov, fused=True, **shared)
            if optim.momentum:
                # torch makes these in the first step, and leaves what was in memory there if loss scaling skips it
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
                raise UserError("optim.type: 'lamb' needs timm: pip install bandsplit[timm]") from error
            lamb: torch.optim.Optimizer = Lamb(groups, betas=optim.betas, eps=optim.eps, **shared)
            return lamb


def running_mean(branch: nn.Module, config: schema.RunConfig) -> AveragedModel | None:
    """A copy of a branch that becomes the running mean of its weights and buffers, where `train.ema_decay` is set."""
    if config.train.ema_decay is None:
        return None
    average = get_ema_multi_avg_fn(config.train.ema_decay)  # type: ignore[no-untyped-call]
    return AveragedModel(branch, multi_avg_fn=average, use_buffers=True)
