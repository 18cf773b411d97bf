"""Whether the steps of a run become CUDA graphs, and how many branches take them at once."""

from __future__ import annotations

import torch

from bandsplit.config.schema import RunConfig
from bandsplit.training import optimizers


def obstacle(config: RunConfig, device: torch.device, replicas: int) -> str | None:
    """Why steps of branches, each trained by `replicas` ranks, cannot be CUDA graphs; None if they can."""
    train = config.train
    reasons = {
        "no GPU": device.type != "cuda",
        "train.cuda_graphs = false": not train.cuda_graphs,
        "several ranks train the same branch": replicas > 1,
        "train.activation_checkpointing": train.activation_checkpointing,
        'train.on_nonfinite = "lower_lr"': train.on_nonfinite == "lower_lr",
        "schedule.momentum": optimizers.schedule_sets_momentum(config),
        f'optim.type = "{config.optim.type}"': config.optim.type not in optimizers.FUSED,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def overlapping(config: RunConfig, device: torch.device, replicas: int, branches: int) -> int:
    """How many of a rank's branches take a step at the same time."""
    return 1 if obstacle(config, device, replicas) else min(config.train.branches_at_once, branches)
