"""Validate a checkpoint, or the ensemble of several runs' branches: torchrun src/evaluate.py RUN [RUN …]"""

from __future__ import annotations

import argparse
from pathlib import Path

from bandsplit.cli import options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="+", help="run directory; several runs form one ensemble")
    parser.add_argument("--checkpoint", default="best", help="best, last or a step number (default: best)")
    options.add_set(parser)
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()

    from bandsplit.evaluation import evaluate

    evaluate.evaluate_runs(arguments.run, arguments.checkpoint, arguments.set, arguments.output)
