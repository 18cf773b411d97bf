"""The largest batch that trains in a given memory: branches, bands as channels, and what a baseline does instead.

    python bench/memory.py [CONFIG …] [--set KEY=VALUE …] [--gib 10] [--measure]

By default the ResNet-34 rows: baseline, sub4, sub16 and the coarse channel row. The baseline is the first CONFIG. It
comes with activation checkpointing too, and with as many accumulation steps as the largest batch of the others needs.
Memory is estimated as in the dry run: tensors of a rank in a step, without what decoding and libraries take. With
--measure a step of each is done on this machine as a training does it, and its memory measured: on a GPU what torch's
allocator holds, CUDA graphs of several branches at once included. On two cores that takes minutes a row.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from torch import nn

from bandsplit.cli import entry
from bandsplit.config.schema import RunConfig
from bandsplit.distributed.mesh import Mesh
from bandsplit.distributed.ranks import Ranks, joined
from bandsplit.errors import UserError
from bandsplit.models.precision import Precision
from bandsplit.training import memory
from bandsplit.training.learner import learners_of
from bandsplit.training.memory import MIB, Memory, StepMemory
from bandsplit.training.steps import Graphs, steps_of

ROWS = ("baseline", "sub4", "sub16", "sub4_channels_coarse")
CONFIGS = [Path(f"config/train/resnet34_{row}.toml") for row in ROWS]
RECOMPUTED = {"train": {"activation_checkpointing": True}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", type=Path, default=CONFIGS, metavar="CONFIG")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--gib", type=common.positive_number, default=10.0, help="memory of a rank (default: 10)")
    parser.add_argument("--measure", action="store_true", help="do a step of each, and measure it")
    common.add_output(parser, "bench/results/memory.json")
    arguments = parser.parse_args()
    configs = common.loaded(arguments.configs, [*arguments.set, "train.grad_accum_steps=1"])
    if arguments.measure:
        common.require_no_teacher(configs)
    limit = int(arguments.gib * 2**30)
    with joined() as ranks:
        fitting = [with_largest_batch(config, ranks.device, limit) for config in configs]
        most = max(config.train.batch_size for config in fitting)
        baseline = fitting[0]
        subjects = {config.name: config for config in fitting}
        subjects[f"{baseline.name}, recomputed"] = with_largest_batch(
            baseline.with_values(RECOMPUTED), ranks.device, limit
        )
        subjects[f"{baseline.name}, accumulating"] = accumulating(baseline, most, ranks.device, limit)
        dtypes = dict.fromkeys(str(precision_of(config, ranks.device).dtype) for config in configs)
        print(f"\n{arguments.gib:g} GiB a rank, {' and '.join(dtypes).replace('torch.', '')}; MiB, estimated")
        columns = ("batch", "at once", "weights", "optimizer", "gradients", "activations", "bands", "total", "measured")
        print(f"| {'run':<34} | {' | '.join(columns)} |")
        print(f"|{'-' * 36}|{''.join('-' * (len(column) + 1) + ':|' for column in columns)}")
        results = []
        for name, config in subjects.items():
            found = estimate(config, ranks.device)
            measured = measure(config, ranks) if arguments.measure else None
            results.append(row(name, config, found, measured))
    common.write(arguments.output, {"gib": arguments.gib, "set": arguments.set}, {"rows": results})


def precision_of(config: RunConfig, device: torch.device) -> Precision:
    return Precision(config.train.precision, device)


def estimate(config: RunConfig, device: torch.device) -> Memory:
    return memory.estimate(config, 1, 1, precision_of(config, device))


def with_largest_batch(config: RunConfig, device: torch.device, limit: int) -> RunConfig:
    """The config with the largest batch that fits, to a hundredth."""

    def of(batch_size: int) -> RunConfig:
        return config.with_values({"train": {"batch_size": batch_size}})

    fits, fails = 0, 2
    while estimate(of(fails), device).total <= limit:
        fits, fails = fails, 2 * fails
    while fails - fits > max(1, fits // 100):
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if estimate(of(middle), device).total <= limit else (fits, middle)
    if not fits:
        raise UserError(f"--gib: {config.name} does not fit with two images")
    return of(fits)


def accumulating(config: RunConfig, batch_size: int, device: torch.device, limit: int) -> RunConfig:
    """The config with the fewest accumulation steps with which such a batch fits, rounded up to equal parts."""
    steps = 1
    while True:
        rounded = -(-batch_size // steps) * steps
        tried = config.with_values({"train": {"batch_size": rounded, "grad_accum_steps": steps}})
        if estimate(tried, device).total <= limit:
            return tried
        if steps >= batch_size:
            raise UserError(f"--gib: the bands of {batch_size} images do not fit beside {config.name}")
        steps += 1


def measure(config: RunConfig, ranks: Ranks) -> dict[str, int]:
    """Bytes of a step of a run on random images, in all; on a CPU also by kind.

    On a GPU it is a step that replays CUDA graphs where the run does, on several streams, beside the batches that are
    prefetched. On a CPU it is the second step.
    """
    device, parts = ranks.device, config.grad_accum_steps
    precision, at_once = precision_of(config, device), config.rank_batch_size(1)
    precision.apply()
    torch.backends.cudnn.benchmark = True
    before = common.held_bytes(device)
    mesh = Mesh(ranks, len(config.split.groups))
    ensemble, learners = learners_of(config, at_once, precision, mesh)
    take = partial(steps_of(learners, config, mesh, seed=lambda i, number: torch.manual_seed(0)), range(len(learners)))
    if device.type == "cuda":
        batches = [common.random_batch(config, at_once, precision, device) for _ in range(parts + config.data.prefetch)]
        step = partial(take, batches[:parts], 0, lr=0.01)
        for _ in range(Graphs.WARM_UP + 1):
            step()
        return {"total": common.peak_bytes(step, device) - before}
    take([common.random_batch(config, 2, precision, device)], 0, lr=0.01)
    batch = common.random_batch(config, at_once, precision, device)
    emas = [learner.ema for learner in learners if learner.ema is not None]
    watched = StepMemory(nn.ModuleList([ensemble, *emas]), learners, reduced=False)
    with watched:
        take([batch] * parts, 0, lr=0.01)
    found = watched.memory(memory.bytes_of_bands(batch.inputs, parts, config, device, 1))
    return {**vars(found), "total": found.total}


def row(name: str, config: RunConfig, found: Memory, measured: dict[str, int] | None) -> dict[str, Any]:
    kinds = {kind: getattr(found, kind) / MIB for kind in ("weights", "optimizer", "gradients", "activations", "bands")}
    batch, at_once = config.train.batch_size, config.rank_batch_size(1)
    told = f"{measured['total'] / MIB:,.0f}" if measured else ""
    print(
        f"| {name:<34} | {batch:>5,} | {at_once:>7,} | {kinds['weights']:>7,.0f} | {kinds['optimizer']:>9,.0f} | "
        f"{kinds['gradients']:>9,.0f} | {kinds['activations']:>11,.0f} | {kinds['bands']:>5,.0f} | "
        f"{found.total / MIB:>5,.0f} | {told:>8} |",
        flush=True,
    )
    estimated = {**vars(found), "total": found.total}
    return {"run": name, "batch": batch, "at_once": at_once, "estimated": estimated, "measured": measured}


if __name__ == "__main__":
    entry.run(main)
