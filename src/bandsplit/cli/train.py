"""Train an ensemble: torchrun src/train.py [CONFIG] [--set KEY=VALUE …]"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from bandsplit.cli import options
from bandsplit.config import loading


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    options.add_config(parser)
    parser.add_argument(
        "--branches",
        metavar="0,3",
        help="train only these branches, as a separate run; evaluate.py joins such runs into one ensemble",
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        help="run directory (default: runs/NAME-seedSEED, with -branches0,3 appended for --branches 0,3)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="resume from the latest valid checkpoint, if there is one"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would run, and stop")
    parser.add_argument("--print-run-dir", action="store_true", help="print the run directory and stop")
    parser.add_argument("--world-size", type=int, help="with --dry-run: number of ranks, on GPUs, to check for")
    arguments = parser.parse_args()
    if arguments.world_size and not arguments.dry_run:
        parser.error("--world-size goes with --dry-run; torchrun --nproc-per-node sets the number of ranks of a run")

    overrides = [*arguments.set, *([f"split.only=[{arguments.branches}]"] if arguments.branches is not None else [])]
    config = loading.load(arguments.config, overrides, arguments.data)
    of_branches = f"-branches{','.join(map(str, config.split.only))}" if config.split.only else ""
    run_dir = arguments.run_dir or Path("runs") / f"{config.name}-seed{config.seed}{of_branches}"
    if arguments.print_run_dir:
        print(run_dir)
        return
    if arguments.dry_run:
        from bandsplit.training import dry_run

        dry_run.show(config, arguments.world_size)
        return
    from bandsplit.training import loop

    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0  # torchrun --max-restarts
    loop.train(config, run_dir, arguments.resume or restarted)
