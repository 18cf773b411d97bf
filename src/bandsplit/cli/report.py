"""Plot and tabulate runs, or saved predictions: python src/report.py RUN|FILE.npz …, or compare two: --compare A B"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "run",
        nargs="*",
        type=Path,
        help="run directory; runs that differ only in their seed are averaged; or a file of evaluate.py --save",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=run_directories,
        metavar=("A", "B"),
        help="what A and B need to reach accuracies; each a run directory, or several of one config joined by commas",
    )
    parser.add_argument("--output", type=Path, help="output folder (default: RUN/plots for one run, plots for several)")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="folder of the images of saved predictions, if it is no longer where it was",
    )
    arguments = parser.parse_args()
    if not arguments.run and not arguments.compare:
        parser.error("no run directory or file of predictions is given")

    from bandsplit.reporting import report
    from bandsplit.reporting.predictions import report as predictions

    files = predictions.files_of(arguments.run)
    runs = [path for path in arguments.run if path not in files]
    if runs or arguments.compare:
        report.report(runs, arguments.output, arguments.compare)
    if files:
        predictions.report(files, arguments.output, arguments.images)


def run_directories(text: str) -> list[Path]:
    """`a,b` -> [a, b], unless there is a folder of that name."""
    return [Path(text)] if Path(text).exists() else [Path(part) for part in text.split(",")]
