"""Plot and tabulate runs, or saved predictions: python src/report.py RUN|FILE.npz [RUN|FILE.npz …]"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "run",
        nargs="+",
        type=Path,
        help="run directory; runs that differ only in their seed are averaged; or a file of evaluate.py --save",
    )
    parser.add_argument("--output", type=Path, help="output folder (default: RUN/plots for one run, plots for several)")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="folder of the images of saved predictions, if it is no longer where it was",
    )
    arguments = parser.parse_args()

    from bandsplit.reporting import report
    from bandsplit.reporting.predictions import report as predictions

    files = predictions.files_of(arguments.run)
    if runs := [path for path in arguments.run if path not in files]:
        report.report(runs, arguments.output)
    if files:
        predictions.report(files, arguments.output, arguments.images)
