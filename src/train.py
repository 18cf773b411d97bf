"""Train an ensemble: torchrun src/train.py [CONFIG] [--set key=value …]"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from bandsplit import cli, configuration

REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "config",
        nargs="?",
        type=Path,
        default=REPOSITORY / "config/train/demo.toml",
        help="train config (default: the demo)",
    )
    parser.add_argument("--data", type=Path, help="data config to use instead of the one that the train config names")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override any key, for example optim.lr=0.02; may be repeated",
    )
    parser.add_argument(
        "--branches",
        metavar="0,3",
        help="train these branches alone, as a run of their own; evaluate.py joins such runs into one ensemble",
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        help="where the run is written (default: runs/NAME-seedSEED, and -branches0,3 where they are named)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the run directory's last checkpoint, if there is one"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would run, and stop")
    parser.add_argument("--print-run-dir", action="store_true", help="print where the run would be written, and stop")
    parser.add_argument("--world-size", type=int, help="with --dry-run: number of ranks to check for")
    arguments = parser.parse_args()
    if arguments.world_size and not arguments.dry_run:
        parser.error("--world-size goes with --dry-run; torchrun --nproc-per-node sets the number of ranks of a run")

    overrides = [*arguments.set, *([f"split.only=[{arguments.branches}]"] if arguments.branches is not None else [])]
    config = configuration.load(arguments.config, overrides, arguments.data)
    of_branches = f"-branches{','.join(map(str, config.split.only))}" if config.split.only else ""
    run_dir = arguments.run_dir or Path("runs") / f"{config.name}-seed{config.seed}{of_branches}"
    if arguments.print_run_dir:
        print(run_dir)
        return
    if arguments.dry_run:
        from bandsplit import parallel, summary

        summary.show(config, arguments.world_size or parallel.world_size())
        return
    from bandsplit import training

    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0  # torchrun --max-restarts
    training.train(config, run_dir, arguments.resume or restarted)


if __name__ == "__main__":
    cli.run(main)
