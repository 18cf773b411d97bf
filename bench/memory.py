"""The largest batch that trains in a given memory: branches, bands as channels, and what a baseline does instead.

    python bench/memory.py [CONFIG …] [--set KEY=VALUE …] [--gib 10] [--measure]

By default the ResNet-34 rows: baseline, sub4, sub16 and the coarse channel row. The baseline is the first CONFIG. It
comes with activation checkpointing too, and with as many accumulation steps as the largest batch of the others needs.
Memory is estimated as in the dry run: tensors of a rank in a step, without what decoding and libraries take. With
--measure a step of each is done on this machine, and its memory measured; on two cores that takes minutes a row.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import common
import torch

from bandsplit.cli import entry
from bandsplit.config import loading
from bandsplit.config.schema import RunConfig
from bandsplit.distributed.mesh import Mesh
from bandsplit.distributed.ranks import Ranks, joined
from bandsplit.models.precision import Precision
from bandsplit.training import memory
from bandsplit.training.learner import learners_of
from bandsplit.training.memory import MIB, Memory, StepMemory

ROWS = ("baseline", "sub4", "sub16", "sub4_channels_coarse")
CONFIGS = [Path(f"config/train/resnet34_{row}.toml") for row in ROWS]
RECOMPUTED = {"train": {"activation_checkpointing": True}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", type=Path, default=CONFIGS, metavar="CONFIG")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--gib", type=float, default=10.0, help="memory of a rank (default: 10)")
    parser.add_argument("--measure", action="store_true", help="do a step of each, and measure it")
    parser.add_argument("--output", type=Path, default=Path("bench/results/memory.json"))
    arguments = parser.parse_args()
    configs = [loading.load(path, [*arguments.set, "train.grad_accum_steps=1"]) for path in arguments.configs]
    limit = int(arguments.gib * 2**30)
    with joined() as ranks:
        precision = Precision(configs[0].train.precision, ranks.device)
        fitting = [with_largest_batch(config, precision, limit) for config in configs]
        most = max(config.train.batch_size for config in fitting)
        baseline = fitting[0]
        subjects = {config.name: config for config in fitting}
        subjects[f"{baseline.name}, recomputed"] = with_largest_batch(
            baseline.with_values(RECOMPUTED), precision, limit
        )
        subjects[f"{baseline.name}, accumulating"] = accumulating(baseline, most, precision, limit)
        print(f"\n{arguments.gib:g} GiB a rank, {str(precision.dtype).removeprefix('torch.')}; MiB, estimated")
        columns = ("batch", "at once", "weights", "optimizer", "gradients", "activations", "bands", "total", "measured")
        print(f"| {'run':<34} | {' | '.join(columns)} |")
        print(f"|{'-' * 36}|{''.join('-' * (len(column) + 1) + ':|' for column in columns)}")
        results = []
        for name, config in subjects.items():
            found = memory.estimate(config, 1, 1, precision)
            measured = measure(config, ranks, precision) if arguments.measure else None
            results.append(row(name, config, found, measured))
    common.write(arguments.output, {"gib": arguments.gib, "set": arguments.set}, {"rows": results})


def with_largest_batch(config: RunConfig, precision: Precision, limit: int) -> RunConfig:
    """The config with the largest batch that fits, to a hundredth."""
    fits, fails = 0, 2
    while memory_of(config, fails, precision) <= limit:
        fits, fails = fails, 2 * fails
    while fails - fits > max(1, fits // 100):
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if memory_of(config, middle, precision) <= limit else (fits, middle)
    if not fits:
        raise SystemExit(f"error: --gib: {config.name} does not fit with two images")
    return config.with_values({"train": {"batch_size": fits}})


def memory_of(config: RunConfig, batch_size: int, precision: Precision) -> int:
    return memory.estimate(config.with_values({"train": {"batch_size": batch_size}}), 1, 1, precision).total


def accumulating(config: RunConfig, batch_size: int, precision: Precision, limit: int) -> RunConfig:
    """The config with the fewest accumulation steps with which such a batch fits, rounded up to equal parts."""
    steps = 1
    while True:
        rounded = -(-batch_size // steps) * steps
        tried = config.with_values({"train": {"batch_size": rounded, "grad_accum_steps": steps}})
        if memory.estimate(tried, 1, 1, precision).total <= limit:
            return tried
        if steps >= batch_size:
            raise SystemExit(f"error: --gib: the bands of {batch_size} images do not fit beside {config.name}")
        steps += 1


def measure(config: RunConfig, ranks: Ranks, precision: Precision) -> Memory:
    """Memory of the second step on random images, with bands as the run's loader hands them over."""
    at_once, size = config.rank_batch_size(1), config.data.image_size // config.split.block
    ensemble, learners = learners_of(config, at_once, precision, Mesh(ranks, len(config.split.groups)))
    parts, device = config.grad_accum_steps, ranks.device
    labels = [torch.randint(0, config.classes, (at_once,), device=device)] * parts
    shapes = [(at_once, 3 * len(group), size, size) for group in config.split.groups]
    dtype = torch.float16 if precision.half_bands else torch.float32
    inputs = [torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last) for shape in shapes]
    for learner, x in zip(learners, inputs, strict=True):
        learner.step([x[:2]], [labels[0][:2]], lr=0.01)
    watched = StepMemory(ensemble, learners, reduced=False)
    with watched:
        for learner, x in zip(learners, inputs, strict=True):
            learner.step([x] * parts, labels, lr=0.01)
    return watched.memory(memory.bytes_of_bands(inputs, parts, config, device, 1))


def row(name: str, config: RunConfig, found: Memory, measured: Memory | None) -> dict[str, Any]:
    kinds = {kind: getattr(found, kind) / MIB for kind in ("weights", "optimizer", "gradients", "activations", "bands")}
    batch, at_once = config.train.batch_size, config.rank_batch_size(1)
    told = f"{measured.total / MIB:,.0f}" if measured else ""
    print(
        f"| {name:<34} | {batch:>5,} | {at_once:>7,} | {kinds['weights']:>7,.0f} | {kinds['optimizer']:>9,.0f} | "
        f"{kinds['gradients']:>9,.0f} | {kinds['activations']:>11,.0f} | {kinds['bands']:>5,.0f} | "
        f"{found.total / MIB:>5,.0f} | {told:>8} |",
        flush=True,
    )
    return {"run": name, "batch": batch, "at_once": at_once, "estimated": vars(found) | {"total": found.total},
            "measured": measured and {**vars(measured), "total": measured.total}}  # fmt: skip


if __name__ == "__main__":
    entry.run(main)
