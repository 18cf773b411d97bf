"""Whether the steps of a run become CUDA graphs, and how many branches take them at once."""

from __future__ import annotations

import torch

from bandsplit.config.schema import Model, RunConfig
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
    """How many of a rank's branches take a step at the same time, at most; 1 if any of the run draws random numbers.

    Graphs share the seed of their random numbers on the device, which each sets when it begins.
    """
    draws = any(_draws(config.model_of(number)) for number in config.split.numbers)
    return 1 if draws or obstacle(config, device, replicas) else min(config.train.branches_at_once, branches)


def _draws(model: Model) -> bool:
    """Whether a network has stochastic depth, or dropout as all of torchvision's but the ResNets.

    Of timm's networks only their first steps tell.
    """
    has_dropout = model.source == "torchvision" and not model.arch.startswith("resnet") and model.dropout != 0
    return has_dropout or model.drop_path > 0
