"""Validate a checkpoint, or join runs of some branches each into one ensemble: torchrun src/evaluate.py RUN [RUN …]"""

from __future__ import annotations

import argparse
from pathlib import Path

from bandsplit.cli import options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="+", help="run directory; the branches of several are joined")
    parser.add_argument("--checkpoint", default="best", help="best (default), last or a step number")
    options.add_set(parser)
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()

    from bandsplit.evaluation import evaluate

    evaluate.evaluate_runs(arguments.run, arguments.checkpoint, arguments.set, arguments.output)
