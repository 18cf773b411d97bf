"""The smallest number of gradient accumulation steps whose parts fit into memory: `train.grad_accum_steps = "auto"`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import torch
from loguru import logger

from bandsplit.config.schema import RunConfig
from bandsplit.data.store.memory import available_bytes
from bandsplit.distributed.mesh import Mesh
from bandsplit.distributed.ranks import Ranks, local_world_size
from bandsplit.errors import UserError
from bandsplit.models import batch_norm
from bandsplit.models.precision import Precision
from bandsplit.training import capture, memory
from bandsplit.training.learner import learners_of

SHARE = 0.85
"""Of the memory, for networks and bands; the rest is for decoding, libraries and fragmentation."""


def with_steps(config: RunConfig, mesh: Mesh, precision: Precision) -> RunConfig:
    """The config with a number for `train.grad_accum_steps`, which is found if it is "auto"; every rank must call it.

    On a GPU by trying a step; on a CPU by the estimate of the dry run. Raises UserError if nothing fits.
    """
    ranks = mesh.ranks
    if config.train.grad_accum_steps != "auto":
        return config
    if ranks.device.type == "cpu":
        most = ranks.from_first(partial(by_estimate, config, ranks.world_size, mesh.branch_groups, precision))
        config = config.with_values({"train": {"grad_accum_steps": most}})
    else:
        possible = _possible(config, ranks.world_size, mesh.branch_groups)
        config = _first(
            tried for tried in possible if not ranks.largest([not _step_succeeds(tried, mesh, precision)])[0]
        )
    if ranks.is_first:
        images = config.rank_batch_size(ranks.world_size)
        logger.info(f"train.grad_accum_steps = {config.grad_accum_steps}, found by memory: {images} images at once")
    return config


def by_estimate(config: RunConfig, world_size: int, groups: int, precision: Precision) -> int:
    """The number of steps by the estimated memory of all ranks, which are on this machine or on others like it.

    Raises UserError if nothing fits.
    """
    of_a_rank = SHARE * available_bytes() / local_world_size()
    possible = _possible(config, world_size, groups)
    fitting = (c for c in possible if memory.estimate(c, world_size, groups, precision).total <= of_a_rank)
    return _first(fitting).grad_accum_steps


def _first(fitting: Iterator[RunConfig]) -> RunConfig:
    for config in fitting:
        return config
    raise UserError(
        "train.grad_accum_steps: 'auto' given, but not even the smallest part of a batch fits into memory; allowed: "
        "train.activation_checkpointing = true, a smaller data.image_size, more ranks"
    )


def _possible(config: RunConfig, world_size: int, groups: int) -> Iterator[RunConfig]:
    """Numbers of steps that divide the images of a rank and leave batch norm enough of them, the smallest first.

    Raises UserError, as without accumulation, if there is none.
    """
    images, replicas = config.rank_batch_size(world_size), world_size // groups
    batch_norm.bn_batch_size(config, images * groups, replicas)
    for steps in (n for n in range(1, images + 1) if images % n == 0):
        tried = config.with_values({"train": {"grad_accum_steps": steps}})
        with suppress(UserError):
            batch_norm.bn_batch_size(tried, images // steps * groups, replicas)
            yield tried


def _step_succeeds(config: RunConfig, mesh: Mesh, precision: Precision) -> bool:
    """Whether a step of this rank's branches can be done, tried on networks that are thrown away.

    Random numbers and the networks of the run are not touched. No other rank is needed, since one that runs out of
    memory would leave the others waiting.
    """
    device = mesh.ranks.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_per_process_memory_fraction(SHARE, device)
    try:
        with torch.random.fork_rng(devices=[device] if on_gpu else []):
            _try_step(config, mesh, precision)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)  # metrics.jsonl has the peak of the run alone
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def _try_step(config: RunConfig, mesh: Mesh, precision: Precision) -> None:
    """Two steps of this rank's branches on zeros. Raises torch.OutOfMemoryError."""
    device, steps = mesh.ranks.device, config.grad_accum_steps
    at_once = max(2, config.rank_batch_size(mesh.ranks.world_size) * mesh.branch_groups)  # as in the estimate
    size, norm_over = config.data.image_size // config.split.block, config.model.bn_batch_size
    ghost = isinstance(norm_over, int) and norm_over < at_once
    own = config.with_values(
        {
            "split": {"only": tuple(config.split.numbers[k] for k in mesh.own)},
            "model": {"bn_batch_size": norm_over if ghost else "rank"},
            "train": {"compile": False},
        }
    )
    dtype = torch.float16 if precision.half_bands else torch.float32
    alone = Mesh(Ranks(0, 1, 0, 1, device), len(own.split.groups))
    ensemble, learners = learners_of(own, at_once, precision, alone)
    shapes = [(at_once, 3 * len(group), size, size) for group in own.split.groups]
    inputs = [
        torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last).zero_() for shape in shapes
    ]
    buckets = sum(p.nbytes for p in ensemble.parameters()) if mesh.replicas > 1 else 0
    streams = capture.overlapping(config, device, mesh.replicas, len(inputs))
    bands = memory.bytes_of_bands(inputs, steps, config, device, mesh.replicas)
    others = torch.empty(bands + buckets, dtype=torch.uint8, device=device)
    labels = torch.zeros(at_once, dtype=torch.int64, device=device)
    resting = 0
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            resting = torch.cuda.memory_allocated(device)
        for learner, x in zip(learners, inputs, strict=True):
            learner.step([x] * min(steps, 2), [labels] * min(steps, 2), lr=0.0)
    if streams > 1:
        of_a_branch = torch.cuda.max_memory_allocated(device) - resting
        torch.empty(streams * of_a_branch, dtype=torch.uint8, device=device)
    del others
