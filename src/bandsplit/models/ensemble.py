"""The ensemble of branches and the fusion of their logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from bandsplit import seeds
from bandsplit.config import schema
from bandsplit.models import networks


class Ensemble(nn.Module):
    """Independent networks (branches), each with one group of bands as its 3·len(group) input channels."""

    def __init__(self, branches: Iterable[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    @classmethod
    def of(cls, config: schema.RunConfig, own: range | None = None) -> Ensemble:
        """Builds and initializes the branches of a run, or only those with indices in `own`.

        Raises UserError if an architecture does not support the size of its inputs.
        """
        numbers, groups = config.split.numbers, config.split.groups
        chosen = own if own is not None else range(len(groups))
        return cls(_build_branch(config, numbers[i], 3 * len(groups[i])) for i in chosen)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Inputs (B, 3·bands, h, w), one per branch -> logits (branches, B, classes), float32."""
        return torch.stack([branch(x).float() for branch, x in zip(self.branches, inputs, strict=True)])


def _build_branch(config: schema.RunConfig, k: int, in_channels: int) -> nn.Module:
    """Builds branch k. Its initial weights depend on the run's seed and k only, not on which branches are built."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derived(config.seed, "weights", k))
        model, block = config.model_of(k), config.split.block
        networks.require_size(model, min(config.image_size_at(0), config.data.val_size) // block)
        network = networks.build(model, in_channels, config.classes, config.data.image_size // block)
    networks.freeze(network, config.train.freeze)
    return network


def parameters_of_branches(config: schema.RunConfig) -> tuple[list[int], list[int]]:
    """Number of parameters of each branch, and of those that are trained; on the meta device: nothing is allocated."""
    with torch.device("meta"):
        branches = Ensemble.of(config).branches
    return [*map(networks.count_parameters, branches)], [*map(networks.count_trained, branches)]


def fuse(logits: Tensor) -> Tensor:
    """Mean of the branches' raw logits: (branches, B, classes) -> (B, classes)."""
    return logits.mean(dim=0)
