"""Time that training pauses for a checkpoint, compared with writing it synchronously.

    python bench/checkpoint.py [CONFIG] [--set KEY=VALUE …]

Builds the config's branches, runs one optimizer step, and saves checkpoints like training does. Times the part that
blocks the training loop (the copy to the host) and the part in the background (write, sync, verify, rename).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import common
import numpy as np
import torch

from bandsplit.cli import entry
from bandsplit.config import loading
from bandsplit.config.schema import RunConfig
from bandsplit.distributed.mesh import Mesh
from bandsplit.distributed.ranks import Ranks
from bandsplit.models.ensemble import Ensemble
from bandsplit.models.precision import Precision
from bandsplit.paths import writing_to
from bandsplit.runs import checkpoint, saver
from bandsplit.training import optimizers
from bandsplit.training.learner import Learner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=Path("config/train/resnet34_sub16.toml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=common.count, default=5)
    parser.add_argument(
        "--folder", type=Path, default=Path("bench/results"), help="where to write, in a folder that is removed again"
    )
    common.add_output(parser, "bench/results/checkpoint.json")
    arguments = parser.parse_args()

    config = loading.load(arguments.config, arguments.set)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    learners = trained(config, device)
    with writing_to(arguments.folder):
        arguments.folder.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=arguments.folder)
    with folder as name:
        copied, written, mib = timed(learners, arguments.rounds, Path(name))
    print(f"\n{config.name}: {mib:,.0f} MiB on {device}, one rank, n = {arguments.rounds}, median (min .. max)")
    for part, seconds in (("in the loop", copied), ("background", written)):
        print(f"{part:>12}  {np.median(seconds):6.2f} s ({min(seconds):.2f} .. {max(seconds):.2f})")
    share = float(np.median(copied)) / float(np.median(written) + np.median(copied))
    minutes = float(np.median(copied)) / 0.02 / 60
    print(f"training pauses for {100 * share:.0f} % of the time that a synchronous write would take,")
    print(f"and for less than 2 % of the run if checkpoints are more than {minutes:.1f} minutes apart")
    settings = {"config": str(arguments.config), "set": arguments.set, "mib": mib}
    common.write(arguments.output, settings, {"in_the_loop": copied, "beside_it": written})


def trained(config: RunConfig, device: torch.device) -> list[Learner]:
    """The branches of a config with their EMA, after a step on two random images."""
    mesh, precision = Mesh(Ranks(0, 1, 0, 1, device), len(config.split.groups)), Precision("fp32", device)
    branches = Ensemble.of(config).to(device).branches
    learners = [Learner(each, config, precision, mesh, optimizers.make_ema(each, config)) for each in branches]
    size = config.data.image_size // config.split.block
    for learner, group in zip(learners, config.split.groups, strict=True):
        x = torch.randn(2, 3 * len(group), size, size, device=device)
        learner.step([x], [torch.zeros(2, dtype=torch.int64, device=device)], lr=1e-3)
    return learners


def timed(learners: list[Learner], rounds: int, folder: Path) -> tuple[list[float], list[float], float]:
    """Seconds of the copy and of writing in each round, and the MiB of a checkpoint."""
    writer = saver.Writer(folder, leads=True, keep=1)
    run = {"format": checkpoint.FORMAT, "branches": [], "streams": 0}
    copied, written = [], []
    for n in range(rounds + 1):  # the first round is a warm-up
        began = time.perf_counter()
        files = {checkpoint.branch_file(k): learner.state_dict() for k, learner in enumerate(learners)}
        files = checkpoint.on_host({**files, checkpoint.RUN: {**run, "progress": {"best_step": n}}})
        middle = time.perf_counter()
        writer.start(n, files, list(files))
        while writer.busy:
            time.sleep(0.005)
        if writer.error is not None:
            raise writer.error
        if n:
            copied.append(middle - began)
            written.append(time.perf_counter() - middle)
        del files
    last = checkpoint.find(folder, "last")
    return copied, written, sum(path.stat().st_size for path in last.iterdir()) / 2**20


if __name__ == "__main__":
    entry.run(main)
