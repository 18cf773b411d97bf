"""Validate a checkpoint again, or runs of some branches each as one ensemble: torchrun src/evaluate.py RUN [RUN …]"""

from __future__ import annotations

import argparse
from pathlib import Path

from bandsplit import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="+", help="run directory; the branches of several are joined")
    parser.add_argument("--checkpoint", default="best", help="best (default), last or the number of a step")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the run's config, for example data.root=…",
    )
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    arguments = parser.parse_args()

    from bandsplit import evaluation

    evaluation.evaluate_runs(arguments.run, arguments.checkpoint, arguments.set, arguments.output)


if __name__ == "__main__":
    cli.run(main)
