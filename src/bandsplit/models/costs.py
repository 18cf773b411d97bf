"""Parameters and multiplications of a run's branches, computed on torch's meta device: nothing is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bandsplit.config.schema import RunConfig
from bandsplit.models import networks


@dataclass(frozen=True)
class Cost:
    """Cost of one branch."""

    parameters: int
    trained: int
    """Parameters without those that `train.freeze` excludes."""
    macs: dict[int, int]
    """Multiply-accumulates of a forward pass over one image, by the side of the training image in pixels."""


def forward_macs(network: nn.Module, channels: int, size: int) -> int:
    """Multiply-accumulates of convolutions and matrix products in a forward pass over one image.

    For a network on the meta device and images (channels, size, size).
    """
    images = torch.empty(2, channels, size, size, device="meta")  # batch norm in training rejects one image
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(images)
    macs: int = counter.get_total_flops() // (2 * len(images))
    return macs


def costs_of(config: RunConfig) -> list[Cost]:
    """Cost of each branch of a run, at every size that training images have."""
    sizes = sorted({config.data.image_size, *map(config.image_size_at, range(config.train.epochs))})
    block, found = config.split.block, dict[tuple[object, int], Cost]()
    kinds = [
        (config.model_of(number), 3 * len(group))
        for number, group in zip(config.split.numbers, config.split.groups, strict=True)
    ]
    for model, channels in kinds:
        if (model, channels) not in found:
            with torch.device("meta"):
                network = networks.build(model, channels, config.classes, config.data.image_size // block)
            macs = {size: forward_macs(network, channels, size // block) for size in sizes}
            networks.freeze(network, config.train.freeze)
            found[model, channels] = Cost(networks.count_parameters(network), networks.count_trained(network), macs)
    return [found[kind] for kind in kinds]
