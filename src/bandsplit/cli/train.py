"""Train an ensemble, or resume a run; on one process, or with torchrun on several."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from bandsplit.cli import options
from bandsplit.config import loading
from bandsplit.errors import UserError
from bandsplit.runs.directory import RunDirectory

EXAMPLES = """
bandsplit train                                    train the demo, into runs/demo-seed0
bandsplit train resnet34_sub16 --dry-run --world-size 8
torchrun --nproc-per-node 8 -m bandsplit train resnet34_sub16 --set optim.lr=0.02
torchrun --nproc-per-node 8 -m bandsplit train --resume --run-dir runs/resnet34_sub16-seed0
"""


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = options.parser(prog, __doc__, EXAMPLES)
    options.add_config(parser, "that of the run with --resume --run-dir, else the demo")
    parser.add_argument(
        "--branches",
        metavar="0,3",
        help="train only these branches, as a separate run; `bandsplit evaluate` joins such runs into one ensemble",
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        help="run directory (default: runs/NAME-seedSEED, with -branches0,3 appended for --branches 0,3)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="resume from the latest valid checkpoint, if there is one; with --run-dir no CONFIG is needed",
    )
    parser.add_argument("--dry-run", action="store_true", help="check the config, print what would run, and exit")
    parser.add_argument("--print-run-dir", action="store_true", help="print the run directory and exit")
    parser.add_argument("--world-size", type=options.count, help="with --dry-run: number of GPU ranks to check for")
    given = parser.parse_args(arguments)
    if given.world_size and not given.dry_run:
        parser.error("--world-size needs --dry-run; torchrun --nproc-per-node sets the number of ranks of a run")

    overrides = [*given.set, *([f"split.only=[{given.branches}]"] if given.branches is not None else [])]
    config = loading.load(_config_file(given), overrides, given.data)
    of_branches = f"-branches{','.join(map(str, config.split.only))}" if config.split.only else ""
    run_dir = given.run_dir or Path("runs") / f"{config.name}-seed{config.seed}{of_branches}"
    if given.print_run_dir:
        print(run_dir)
        return
    if given.dry_run:
        from bandsplit.runs import checkpoint
        from bandsplit.runs.directory import RunDirectory
        from bandsplit.training import dry_run

        restores = given.resume and bool(checkpoint.saved(RunDirectory(run_dir).checkpoints))
        dry_run.show(config, given.world_size, restores)
        return
    from bandsplit.training import loop

    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0  # torchrun --max-restarts
    loop.train(config, run_dir, given.resume or restarted)


def _config_file(arguments: argparse.Namespace) -> Path:
    """CONFIG if given, else the config of the run to resume, else the demo's.

    Raises UserError if the directory to resume from holds no run.
    """
    config: Path | None = arguments.config
    if config is None and arguments.resume and arguments.run_dir is not None:
        own = RunDirectory(arguments.run_dir)
        if not own.holds_run:
            raise UserError(f"--resume --run-dir {own.path}: no run found there, and no CONFIG given to start one")
        return own.config
    return config or options.DEMO
