"""Plot and tabulate one or more runs: python src/report.py RUN [RUN …]"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "run", nargs="+", type=Path, help="run directory; runs that differ only in their seed are averaged"
    )
    parser.add_argument("--output", type=Path, help="output folder (default: RUN/plots for one run, plots for several)")
    arguments = parser.parse_args()

    from bandsplit.reporting import report

    report.report(arguments.run, arguments.output)
