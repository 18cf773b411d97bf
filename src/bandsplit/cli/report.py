"""Plot and tabulate runs or saved predictions, or compare two sets of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bandsplit.cli import options

EXAMPLES = """
bandsplit report runs/demo-seed0
bandsplit report runs/demo-seed0 runs/demo-seed1 runs/demo-rgb --output runs/plots
bandsplit report --compare runs/demo-seed0,runs/demo-seed1 runs/demo-rgb --output runs/compared
bandsplit report runs/demo-seed0/predictions.npz
bandsplit report runs/demo-seed0 --watch
"""


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = options.parser(prog, __doc__, EXAMPLES)
    parser.add_argument(
        "run",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="run directory; runs that differ only in their seed are averaged; or a file of `evaluate --save`",
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
    parser.add_argument(
        "--watch",
        nargs="?",
        type=options.seconds,
        const=5.0,
        metavar="SECONDS",
        help="print a table every SECONDS (default: 5) until no run is in progress; no figures",
    )
    given = parser.parse_args(arguments)
    if not given.run and not given.compare:
        parser.error("no run directory or file of predictions is given")
    if given.watch:
        if given.compare or given.output or given.images:
            parser.error("--watch takes run directories alone")
        from bandsplit.reporting import watch

        watch.watch(given.run, given.watch)
        return

    from bandsplit.reporting import report
    from bandsplit.reporting.predictions import report as predictions

    files = predictions.files_of(given.run)
    runs = [path for path in given.run if path not in files]
    if runs or given.compare:
        report.report(runs, given.output, given.compare)
    if files:
        predictions.report(files, given.output, given.images)


def run_directories(text: str) -> list[Path]:
    """`a,b` -> [a, b], unless there is a folder of that name."""
    return [Path(text)] if Path(text).exists() else [Path(part) for part in text.split(",")]
