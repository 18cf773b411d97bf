"""Batch norm over `model.bn_batch_size` images, independent of the batch size per rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from bandsplit.config.schema import RunConfig
from bandsplit.distributed.mesh import Mesh
from bandsplit.distributed.traffic import possible_groups
from bandsplit.errors import UserError
from bandsplit.models.ensemble import Ensemble


def bn_batch_size(config: RunConfig, at_once: int, replicas: int) -> int:
    """Number of images over which batch norm computes its statistics in training, from `model.bn_batch_size`.

    Args:
        config: the run.
        at_once: images per rank in one forward pass of a branch.
        replicas: ranks that train the same branch.

    Raises:
        UserError: `model.bn_batch_size` neither divides `at_once` nor equals it times a divisor of `replicas`, or some
            batch norm would have one value per channel, which has no variance.
    """
    wanted = config.model.bn_batch_size
    possible = [n for n in range(1, at_once) if at_once % n == 0]
    possible += [at_once * n for n in range(1, replicas + 1) if replicas % n == 0]
    if wanted not in ("rank", "all", *possible):
        raise UserError(
            f"model.bn_batch_size: {wanted} given, but a forward pass has {at_once} images per rank and "
            f"{replicas} rank{'s train' if replicas > 1 else ' trains'} each branch; allowed: "
            f"{', '.join(map(str, possible))}, 'rank' or 'all'"
        )
    images = at_once if wanted == "rank" else at_once * replicas if wanted == "all" else wanted
    if images == 1:
        _require_larger_maps(config, replicas)
    return images


def _require_larger_maps(config: RunConfig, replicas: int) -> None:
    """Raises UserError if a batch norm over one image has a 1 x 1 input; builds the networks on the meta device."""
    size = min(config.image_size_at(epoch) for epoch in range(config.train.epochs)) // config.split.block
    with torch.device("meta"):
        branches = list(Ensemble.of(config).branches)
    for number, branch, group in zip(config.split.numbers, branches, config.split.groups, strict=True):
        norm = _norm_of_one_value(branch, torch.empty(1, 3 * len(group), size, size, device="meta"))
        if norm is not None:
            raise UserError(
                f"{_key_of_one_image(config, replicas)}; with inputs of {size} x {size} the input of {norm} in branch "
                f"{number} is 1 x 1, and one value per channel has no variance; allowed: "
                f"{', '.join(_ways_to_more_values(config, replicas))}"
            )


def _norm_of_one_value(branch: nn.Module, image: Tensor) -> str | None:
    """Name of the first batch norm with one value per channel for `image`, (1, C, h, w); None if there is none.

    `branch` and `image` are on the meta device.
    """
    found: list[str] = []
    for name, module in branch.named_modules():
        if isinstance(module, _BatchNorm):

            def look(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                if inputs[0].numel() == inputs[0].shape[1]:
                    found.append(name)

            module.register_forward_pre_hook(look)
    with torch.no_grad():
        branch.eval()(image)
    return found[0] if found else None


def _key_of_one_image(config: RunConfig, replicas: int) -> str:
    """Start of the error message: the key that makes batch norm see one image."""
    if config.model.bn_batch_size == 1:
        return "model.bn_batch_size: 1 given: batch norm over one image"
    shares = [f"{replicas} ranks"] * (replicas > 1)
    shares += [f"train.grad_accum_steps = {config.grad_accum_steps}"] * (config.grad_accum_steps > 1)
    of = f" with {' and '.join(shares)}" if shares else ""
    return f"train.batch_size: {config.train.batch_size} given{of}: batch norm over one image"


def _ways_to_more_values(config: RunConfig, replicas: int) -> list[str]:
    """End of the error message: changes that give batch norm more than one value per channel."""
    ways = []
    if config.model.bn_batch_size == 1:
        ways += ["a larger model.bn_batch_size, 'rank' or 'all'"]
    else:
        ways += ["a larger train.batch_size"]
        ways += ["a smaller train.grad_accum_steps"] * (config.grad_accum_steps > 1)
        ways += ["fewer ranks"] * (replicas > 1)
        ways += ["model.bn_batch_size = 'all'"] * (replicas > 1 and config.model.source == "torchvision")
        ways += ["a larger parallel.branch_groups"] * (len(possible_groups(config, replicas)) > 1)
    ways += ["a larger augment.progressive.min_size" if config.augment.progressive else "a larger data.image_size"]
    return [*ways, *["a smaller split.block"] * (config.split.block > 1)]


def fit(branch: nn.Module, images: int, at_once: int, mesh: Mesh) -> nn.Module:
    """Replaces the branch's batch norms by ghost or synchronized ones, so that their statistics are over `images`.

    `at_once` is the number of images per rank in one forward pass. Every rank calls this, as it creates process groups.
    """
    if images < at_once:
        return _converted(branch, lambda norm: GhostBatchNorm2d(images, norm.num_features))
    if images == at_once:
        return branch
    group = mesh.neighbors(images // at_once)
    if mesh.ranks.device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(branch, group)  # type: ignore[no-untyped-call]
        return converted
    return _converted(branch, lambda norm: HostSyncBatchNorm2d(group, norm.num_features))


def _converted(module: nn.Module, make: Any) -> nn.Module:
    """Replaces every BatchNorm2d inside `module`, in place, by `make(norm)` with the same parameters and buffers."""
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
    """Ghost batch norm: normalizes each group of `images` images in the batch separately.

    Hoffer, Hubara, Soudry, *Train longer, generalize better* (NIPS 2017), algorithm 1. Unlike there, the running
    statistics are updated once per batch, with the mean over the groups.
    """

    def __init__(self, images: int, num_features: int) -> None:
        super().__init__(num_features)
        self.images = images

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w); in training, B is a multiple of `images`."""
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
    """Synchronized batch norm over the ranks of a process group on CPUs; torch's SyncBatchNorm needs a GPU."""

    def __init__(self, group: Any, num_features: int) -> None:
        super().__init__(num_features)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w); in training, every rank of the group has the same B.

        Computes in float32 where autocast gives 16 bits, as torch's does.
        """
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        ranks = dist.get_world_size(self.group)
        full = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = _Sum.apply(full.mean(dim=(0, 2, 3)), self.group) / ranks
        centered = full - mean[:, None, None]
        variance = _Sum.apply(centered.square().mean(dim=(0, 2, 3)), self.group) / ranks
        with torch.no_grad():
            count = ranks * x.numel() / self.num_features
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * (variance + self.eps).rsqrt()
        normalized: Tensor = centered * scale[:, None, None] + self.bias[:, None, None]
        return normalized.to(x.dtype)


class _Sum(torch.autograd.Function):
    """Differentiable all-reduce: the gradient is the sum of the ranks' gradients."""

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
