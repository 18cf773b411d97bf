"""A table of runs in the terminal, drawn again and again while they go on."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bandsplit.errors import UserError
from bandsplit.progress import duration
from bandsplit.reporting.runs import Run, read_run
from bandsplit.reporting.tables import MISSING
from bandsplit.runs.directory import RunDirectory

HEAD = ("run", "", "epoch", "step", "loss", "top-1", "best branch", "images/s", "data wait", "left")


def watch(folders: Sequence[Path], seconds: float) -> None:
    """Prints the table every so many seconds, in a log only if it has changed; returns when no run is in progress.

    Ctrl-C ends it too. Raises UserError if there is no run in these folders, and none that is starting.
    """
    in_terminal, before = sys.stdout.isatty(), ""
    try:
        while True:
            in_progress = {folder: RunDirectory(folder).in_progress for folder in folders}  # asked before it is read
            text = table([row(folder, goes_on) for folder, goes_on in in_progress.items()])
            if in_terminal:
                columns = shutil.get_terminal_size().columns
                text = "\n".join(line[: columns - 1] for line in text.split("\n"))  # a line that wraps counts as two
                up = f"\x1b[{before.count(chr(10)) + 1}F\x1b[J" if before else ""
                print(f"{up}{text}", flush=True)
            elif text != before:
                print(f"{time.strftime('%H:%M:%S')}\n{text}", flush=True)
            before = text
            if not any(in_progress.values()):
                return
            time.sleep(seconds)
    except KeyboardInterrupt:
        return


def row(folder: Path, in_progress: bool) -> list[str]:
    """The cells of a run; most are empty before its first event. Raises UserError where none is expected."""
    try:
        run = read_run(folder)
    except UserError:
        if not in_progress:
            raise
        return [str(folder), "starting", *[""] * (len(HEAD) - 2)]
    state = "ended" if run.ended else "training" if in_progress else "stopped"
    return [str(folder), state, *_measured(run), _left(run) if in_progress and not run.ended else ""]


def _measured(run: Run) -> list[str]:
    train, validation = (None if frame.empty else frame.iloc[-1] for frame in (run.train, run.validation))
    loss = None if train is None or train.get("loss") is None else float(train["loss"])
    return [
        f"{run.epoch:.2f}/{run.settings['train.epochs']}",
        f"{run.steps:,}",
        MISSING if loss is None else f"{loss:.4f}",
        MISSING if validation is None else f"{validation['top1']:.2f} %",
        MISSING if validation is None else f"{max(validation['branch_top1']):.2f} %",
        MISSING if train is None else f"{train['images_per_second']:,.0f}",
        MISSING if train is None else f"{100 * train['data_wait']:.0f} %",
    ]


def _left(run: Run) -> str:
    """Time of training for the epochs that are left, at the pace so far."""
    epochs = float(run.settings["train.epochs"])
    return duration(run.seconds * (epochs - run.epoch) / run.epoch) if run.epoch else MISSING


def table(rows: Sequence[Sequence[str]]) -> str:
    """Words to the left, numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(HEAD, *rows, strict=True)]
    return "\n".join(_aligned(cells, widths) for cells in (HEAD, *rows))


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    words, numbers = zip(cells[:2], widths[:2], strict=True), zip(cells[2:], widths[2:], strict=True)
    return "  ".join([*(c.ljust(w) for c, w in words), *(c.rjust(w) for c, w in numbers)]).rstrip()
