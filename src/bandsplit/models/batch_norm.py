"""Batch normalisation over a stated number of images, whatever a rank's batch is."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from bandsplit.config.schema import RunConfig
from bandsplit.distributed.mesh import Mesh
from bandsplit.errors import UserError


def bn_batch_size(config: RunConfig, at_once: int, rows: int) -> int:
    """Images over which batch normalisation takes its statistics in training.

    `at_once`: images that a rank takes through a branch at once; `rows`: ranks that train the same branch.
    Raises UserError where `model.bn_batch_size` can be had neither by parting a rank's images nor by joining ranks'.
    """
    wanted = config.model.bn_batch_size
    if wanted == "rank":
        return at_once
    if wanted == "all":
        return at_once * rows
    possible = [n for n in range(1, at_once) if at_once % n == 0]
    possible += [at_once * n for n in range(1, rows + 1) if rows % n == 0]
    if wanted not in possible:
        raise UserError(
            f"model.bn_batch_size: {wanted} given, but a rank takes {at_once} images through a branch at once and "
            f"{rows} rank{'s train' if rows > 1 else ' trains'} each branch; allowed: "
            f"{', '.join(map(str, possible))}, 'rank' or 'all'"
        )
    return wanted


def fit(branch: nn.Module, images: int, at_once: int, mesh: Mesh) -> nn.Module:
    """The branch with batch normalisation over `images`, where a rank takes `at_once` through it in training."""
    if images < at_once:
        return _converted(branch, lambda norm: GhostBatchNorm2d(images, norm.num_features))
    if images == at_once:
        return branch
    group = mesh.neighbours(images // at_once)
    if mesh.ranks.device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(branch, group)  # type: ignore[no-untyped-call]
        return converted
    return _converted(branch, lambda norm: HostSyncBatchNorm2d(group, norm.num_features))


def _converted(module: nn.Module, make: Any) -> nn.Module:
    """The module with every BatchNorm2d in it exchanged for what `make` gives; parameters and buffers stay."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            norm = make(child)
            norm.eps, norm.momentum = child.eps, child.momentum
            norm._parameters, norm._buffers = child._parameters, child._buffers
            setattr(module, name, norm)
        else:
            _converted(child, make)
    return module


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation in which every `images` images of a batch are normalised by themselves.

    Hoffer, Hubara, Soudry, *Train longer, generalize better* (NIPS 2017), algorithm 1.  Running statistics move once a
    batch, to the mean over its parts.
    """

    def __init__(self, images: int, num_features: int) -> None:
        super().__init__(num_features)
        self.images = images

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape; in training B is a multiple of `images`."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        parts = torch.split(x, self.images)
        means, variances = (r.repeat(len(parts), 1) for r in (self.running_mean, self.running_var))
        outputs = [
            batch_norm(part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
            for part, mean, variance in zip(parts, means, variances, strict=True)
        ]
        self.running_mean.copy_(means.mean(dim=0))
        self.running_var.copy_(variances.mean(dim=0))
        self.num_batches_tracked.add_(1)
        return torch.cat(outputs)


class HostSyncBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over the images of several ranks on a CPU; torch's SyncBatchNorm needs a GPU."""

    def __init__(self, group: Any, num_features: int) -> None:
        super().__init__(num_features)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape; every rank of the group has the same B."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        ranks = dist.get_world_size(self.group)
        mean = _Sum.apply(x.mean(dim=(0, 2, 3)), self.group) / ranks
        centred = x - mean[:, None, None]
        variance = _Sum.apply(centred.square().mean(dim=(0, 2, 3)), self.group) / ranks
        with torch.no_grad():
            count = ranks * x.numel() / self.num_features
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * (variance + self.eps).rsqrt()
        normalised: Tensor = centred * scale[:, None, None] + self.bias[:, None, None]
        return normalised


class _Sum(torch.autograd.Function):
    """Sum over ranks, whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
