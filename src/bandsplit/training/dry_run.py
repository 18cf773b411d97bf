"""Dry run: cost, memory and steps of a config, from tensors that hold no data. No run is written."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from bandsplit.config.schema import RunConfig
from bandsplit.data import holdout, source
from bandsplit.data.source import Listed
from bandsplit.distributed import ranks
from bandsplit.distributed.traffic import branch_groups, possible_groups, step_traffic
from bandsplit.errors import UserError
from bandsplit.models import batch_norm
from bandsplit.models.costs import costs_of
from bandsplit.models.precision import Precision
from bandsplit.runs import initial
from bandsplit.runs.restored import teachers_config, teachers_directory
from bandsplit.training import accumulation, memory
from bandsplit.training.memory import MIB


def show(config: RunConfig, planned_ranks: int | None = None, restores: bool = False) -> None:
    """Prints branches, cost, memory and steps of a config for the ranks that torchrun started.

    With `planned_ranks`, for that many GPU ranks instead; this machine need not have a GPU.
    `restores`: whether weights would be loaded from a checkpoint, so that `model.init_from` is not read.
    Raises UserError if the batch does not fit the ranks, the networks or the data, or trained weights the networks.
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
    size = config.data.image_size // config.split.block
    costs = costs_of(config)
    parameters = [cost.parameters for cost in costs]
    macs = [cost.macs[config.data.image_size] for cost in costs]
    trained = [cost.trained for cost in costs]
    groups = branch_groups(config, world_size, trained, half)
    auto = config.train.grad_accum_steps == "auto"
    if auto and not on_gpu:
        steps = accumulation.by_estimate(config, world_size, groups, precision)
        config = config.with_values({"train": {"grad_accum_steps": steps}})
    batch_size = config.rank_batch_size(world_size)
    at_once = batch_size * groups
    bn_batch_size = batch_norm.bn_batch_size(config, at_once, world_size // groups)
    print(f"{config.name}: {config.networks}, {config.data.name} at {config.data.image_size} pixels")
    print(
        f"split     block {config.split.block}, {config.split.transform}: "
        f"{config.split.bands} bands of {size} x {size}, {len(costs)} branch{'es' * (len(costs) > 1)}"
    )
    device = ("GPU" if torch.cuda.is_available() else "GPU (assumed with --world-size)") if on_gpu else "CPU"
    print(f"device    {device}, train.precision = {config.train.precision!r}: {_name(precision.dtype)}, {_bands(half)}")
    parts = f"{world_size} rank{'s' * (world_size > 1)} x {config.grad_accum_steps} x {batch_size}"
    print(f"batch     {config.train.batch_size} images = {parts} (ranks x accumulation x images at once)")
    if auto:
        how = "is found when the run starts" if on_gpu else "by the memory of this machine"
        print(f"          train.grad_accum_steps = 'auto': accumulation {how}")
    print(f"weights   {sum(parameters):,} parameters, {sum(parameters) * 4 / MIB:,.2f} MiB in float32")
    print(f"compute   {sum(macs) / 1e9:.3f} GMACs per image forward, all branches")
    channels = [3 * len(group) for group in config.split.groups]
    for (width, weights, forward), number in Counter(zip(channels, parameters, macs, strict=True)).items():
        print(
            f"          {number} x {width} channels: {weights:,} parameters, {weights * 4 / MIB:,.2f} MiB, "
            f"{forward / 1e9:.3f} GMACs"
        )
    _show_teacher(config)
    if not restores:
        _show_initial(config, found)
    print(f"memory    per rank, estimated: {memory.estimate(config, world_size, groups, precision)}")
    _show_ranks(config, world_size, groups, trained, half)
    otherwise = branch_groups(config, world_size, trained, other.half_bands)
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
    teacher, size = teachers_config(config), config.data.image_size
    if teacher is None:
        print(f"teacher   unknown: {teachers_directory(config.distillation)} is not a run directory")
        return
    # the images of this run
    seen: dict[str, dict[str, Any]] = {"data": {"image_size": size}, "augment": {"progressive": None}}
    try:
        costs = costs_of(teacher.with_values(seen))
    except UserError as error:
        raise UserError(f"distillation.teacher: {teacher.name} at {size} pixels: {error}") from error
    macs = sum(cost.macs[size] for cost in costs)
    weights = 4 * sum(cost.parameters for cost in costs) / MIB
    print(
        f"teacher   {teacher.name}, {teacher.networks} with block {teacher.split.block}: {macs / 1e9:.3f} GMACs per "
        f"image forward, {weights:,.2f} MiB"
    )


def _show_initial(config: RunConfig, found: dict[str, Listed] | UserError) -> None:
    """Prints the trained weights that branches begin with, which are read, and downloaded if a run would do that."""
    numbers = config.split.numbers
    if all(config.model_of(number).init_from is None for number in numbers):
        return
    if isinstance(found, UserError):
        print(f"begins    not known without the names of the classes: {found}")
        return
    unknown = bool(config.split.scale) and config.split.sigma is None
    if unknown:
        config = config.with_values({"split": {"sigma": (1.0,) * config.split.bands}})
    for words in initial.described(initial.initial_weights(config, range(len(numbers)), found["train"].classes)):
        print(f"begins    with {words}{'; as if split.sigma, measured when the run starts, were 1' * unknown}")


def _show_ranks(config: RunConfig, world_size: int, chosen: int, trained: list[int], half: bool) -> None:
    """Prints the traffic of each possible number of branch groups; an asterisk marks the chosen one."""
    possible = possible_groups(config, world_size)
    if len(possible) == 1:
        return
    bands = f"bands MB, {'float16' if half else 'float32'}"
    print(f"ranks     bytes that a rank sends per step, by parallel.branch_groups = {config.parallel.branch_groups!r}:")
    print(f"           groups  branches per rank  gradients MB  {bands}  images through a branch at once")
    for groups in possible:
        sent = step_traffic(config, world_size, groups, trained, half)
        mark = "*" if groups == chosen else ""
        print(
            f"{mark:>11}{groups:>6}  {sent.branches:>17}  {sent.gradients / 1e6:>12,.1f}  "
            f"{sent.bands / 1e6:>{len(bands)},.1f}  {config.rank_batch_size(world_size) * groups:>33}"
        )


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
