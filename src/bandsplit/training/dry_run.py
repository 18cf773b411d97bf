"""Dry run: cost, memory and steps of a config, computed on torch's meta device. Nothing is allocated or written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bandsplit.config import loading
from bandsplit.config.schema import RunConfig
from bandsplit.data import holdout, source
from bandsplit.data.source import Listed
from bandsplit.distributed import ranks
from bandsplit.distributed.traffic import branch_groups, possible_groups, step_traffic
from bandsplit.errors import UserError
from bandsplit.models import batch_norm
from bandsplit.models.costs import costs_of, forward_macs
from bandsplit.models.ensemble import Ensemble
from bandsplit.models.networks import count_parameters
from bandsplit.models.precision import Precision
from bandsplit.runs.directory import RunDirectory
from bandsplit.runs.restored import teachers_directory

MIB = 2**20


@dataclass(frozen=True)
class BranchCost:
    """Cost of one branch on one rank."""

    channels: int
    parameters: int
    macs: int
    """Multiply-accumulates of a forward pass over one image."""
    activation_bytes: int
    """Bytes saved by the forward pass for the backward pass, for the batch of one rank in float32."""


def branch_cost(branch: nn.Module, channels: int, size: int, batch_size: int) -> BranchCost:
    """Cost of a branch on the meta device, for inputs (batch_size, channels, size, size)."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in branch.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    images = max(2, batch_size)  # plain batch norm rejects 1 image, which is valid if ranks share statistics
    x = torch.empty(images, channels, size, size, device="meta")
    labels = torch.empty(images, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        cross_entropy(branch(x), labels)
    macs = forward_macs(branch, channels, size)
    return BranchCost(channels, count_parameters(branch), macs, sum(kept.values()) * batch_size // images)


def show(config: RunConfig, planned_ranks: int | None = None) -> None:
    """Prints branches, cost, memory and steps of a config for the ranks that torchrun started.

    With `planned_ranks`, for that many GPU ranks instead; this machine need not have a GPU.
    Raises UserError if the batch does not fit the ranks, the networks or the data.
    """
    found = _found(config)
    if config.data.classes is None:
        if isinstance(found, UserError):
            raise UserError(f"data.classes: not given, and the images cannot be counted: {found}")
        config = config.with_classes(len(found["train"].classes))
    world_size = planned_ranks or ranks.world_size()
    on_gpu = torch.cuda.is_available() or planned_ranks is not None
    precision, other = (Precision(config.train.precision, torch.device(name)) for name in _devices(on_gpu))
    half = precision.half_bands
    batch_size = config.rank_batch_size(world_size)
    size = config.data.image_size // config.split.block
    with torch.device("meta"):
        branches = list(Ensemble.of(config).branches)
    parameters = [count_parameters(branch) for branch in branches]
    groups = branch_groups(config, world_size, parameters, half)
    at_once = batch_size * groups
    bn_batch_size = batch_norm.bn_batch_size(config, at_once, world_size // groups)
    costs = [
        branch_cost(branch, 3 * len(group), size, at_once)
        for branch, group in zip(branches, config.split.groups, strict=True)
    ]
    print(f"{config.name}: {config.networks}, {config.data.name} at {config.data.image_size} pixels")
    print(
        f"split     block {config.split.block}, {config.split.transform}: "
        f"{config.split.bands} bands of {size} x {size}, {len(costs)} branch{'es' * (len(costs) > 1)}"
    )
    device = ("GPU" if torch.cuda.is_available() else "GPU (assumed with --world-size)") if on_gpu else "CPU"
    print(f"device    {device}, train.precision = {config.train.precision!r}: {_name(precision.dtype)}, {_bands(half)}")
    parts = f"{world_size} rank{'s' * (world_size > 1)} x {config.train.grad_accum_steps} x {batch_size}"
    print(f"batch     {config.train.batch_size} images = {parts} (ranks x accumulation x images at once)")
    print(f"weights   {sum(parameters):,} parameters, {sum(parameters) * 4 / MIB:,.2f} MiB in float32")
    print(f"compute   {sum(cost.macs for cost in costs) / 1e9:.3f} GMACs per image forward, all branches")
    for cost, number in _alike(costs):
        print(
            f"          {number} x {cost.channels} channels: {cost.parameters:,} parameters, "
            f"{cost.parameters * 4 / MIB:,.2f} MiB, "
            f"{cost.macs / 1e9:.3f} GMACs, {cost.activation_bytes / MIB:,.0f} MiB activations"
        )
    _show_teacher(config)
    own = costs[: len(costs) // groups]
    print(f"memory    {_memory_bytes(config, own, size, at_once) / MIB:,.0f} MiB per rank in float32 (estimate)")
    _show_ranks(config, world_size, groups, parameters, half)
    otherwise = branch_groups(config, world_size, parameters, other.half_bands)
    if otherwise != groups:
        print(f"          on {'CPUs' if on_gpu else 'GPUs'}, with {_bands(other.half_bands)}: {otherwise} groups")
    over = f"{bn_batch_size} image{'s' * (bn_batch_size > 1)}"
    print(f"norm      batch norm over {over} (model.bn_batch_size = {config.model.bn_batch_size!r})")
    _show_sizes(config)
    _show_steps(config, found)


def _found(config: RunConfig) -> dict[str, Listed] | UserError:
    try:
        return source.listed(config)
    except UserError as error:
        return error


def _devices(on_gpu: bool) -> tuple[str, str]:
    """The device type to show, and the other one, to compare with."""
    return ("cuda", "cpu") if on_gpu else ("cpu", "cuda")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bands(half: bool) -> str:
    return f"bands in {'float16' if half else 'float32'}"


def _show_teacher(config: RunConfig) -> None:
    if config.distillation is None:
        return
    directory = RunDirectory(teachers_directory(config.distillation))
    if not directory.holds_run:
        print(f"teacher   unknown: {directory.path} is not a run directory")
        return
    teacher = loading.load(directory.config)
    costs = costs_of(teacher)
    macs = sum(cost.macs[teacher.data.image_size] for cost in costs)
    weights = 4 * sum(cost.parameters for cost in costs) / MIB
    print(
        f"teacher   {teacher.name}, {teacher.networks} with block {teacher.split.block}: {macs / 1e9:.3f} GMACs per "
        f"image forward, {weights:,.2f} MiB"
    )


def _show_ranks(config: RunConfig, world_size: int, chosen: int, parameters: list[int], half: bool) -> None:
    """Prints the traffic of each possible number of branch groups; an asterisk marks the chosen one."""
    possible = possible_groups(config, world_size)
    if len(possible) == 1:
        return
    bands = f"bands MB, {'float16' if half else 'float32'}"
    print(f"ranks     bytes that a rank sends per step, by parallel.branch_groups = {config.parallel.branch_groups!r}:")
    print(f"           groups  branches per rank  gradients MB  {bands}  images through a branch at once")
    for groups in possible:
        sent = step_traffic(config, world_size, groups, parameters, half)
        mark = "*" if groups == chosen else ""
        print(
            f"{mark:>11}{groups:>6}  {sent.branches:>17}  {sent.gradients / 1e6:>12,.1f}  "
            f"{sent.bands / 1e6:>{len(bands)},.1f}  {config.rank_batch_size(world_size) * groups:>33}"
        )


def _alike(costs: list[BranchCost]) -> list[tuple[BranchCost, int]]:
    return [(cost, costs.count(cost)) for cost in dict.fromkeys(costs)]


def _memory_bytes(config: RunConfig, costs: list[BranchCost], size: int, batch_size: int) -> int:
    """Estimate for one rank: weights, optimizer state and EMA of all `costs`, gradients and activations of the largest
    branch, and the bands of the current batch and of the prefetched ones."""
    weights = 4 * sum(cost.parameters for cost in costs)
    largest = max(4 * cost.parameters + cost.activation_bytes for cost in costs)
    bands = 4 * batch_size * config.train.grad_accum_steps * size * size * sum(cost.channels for cost in costs)
    kept = {"sgd": 1 if getattr(config.optim, "momentum", 0) else 0, "rmsprop": 2}.get(config.optim.type, 2)
    kept += config.train.ema_decay is not None
    return weights * (1 + kept) + largest + bands * (1 + config.data.prefetch)


def _show_sizes(config: RunConfig) -> None:
    """Prints the epochs at which the training image size changes."""
    if config.augment.progressive is None:
        return
    sizes = [config.image_size_at(epoch) for epoch in range(config.train.epochs)]
    first = {size: epoch for epoch, size in reversed(list(enumerate(sizes)))}
    print(
        f"sizes     {', '.join(f'{size} from epoch {first[size]}' for size in sorted(first))}; costs are of the largest"
    )


def _show_steps(config: RunConfig, found: dict[str, Listed] | UserError) -> None:
    """Prints the number of images and steps if the data can be read."""
    if isinstance(found, UserError):
        print(f"steps     unknown: {found}")
        return
    train, val = (len(found[part].labels) for part in ("train", "val"))
    held_out = ""
    if config.data.holdout is not None:
        images = found["train"]
        count = int(holdout.held_out(images.labels, images.classes, config.data.holdout, config.seed).sum())
        train, held_out = train - count, f" ({count} more are held out)"
    steps = config.steps_per_epoch(train)
    unchecked = ", before they are checked" * (config.data.kind == "images")
    print(f"data      {train} training{held_out} and {val} validation images{unchecked}")
    for part, files in found.items():
        if files.passed_over:
            print(f"          {getattr(config.data, part)}: passed over {'; '.join(files.passed_over)}")
    print(f"steps     {config.train.epochs} epochs x {steps} = {config.train.epochs * steps}")
