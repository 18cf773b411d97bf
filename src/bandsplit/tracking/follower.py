"""Follows metrics.jsonl of a run and passes its events on to a tracker."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from bandsplit.errors import UserError
from bandsplit.paths import reading_from, writing_to
from bandsplit.reporting.events import KINDS, Event, parse
from bandsplit.runs.directory import RunDirectory
from bandsplit.tracking.tracker import Tracker, opener, require

SECONDS = 2.0
"""Between two looks at the file."""

TIME_TO_FINISH = 600
"""Seconds after the end of a run in which a follower in the background must be done."""

SECONDS_IN_SILENCE = 5.0
"""That a command waits for another one before it says so."""


def follow(path: Path, name: str, live: bool) -> str:
    """Passes the events of a run on to the tracker `name`, those that were not yet; returns what to tell the user.

    Args:
        live: goes on until the run ends, or the process that trains it; with low priority.

    Another process that passes on the last events of a run that has ended is waited for.

    Raises UserError if this is no run, if another process does the same during the run, or if the tracker fails.
    """
    require([name], "--to")
    directory = RunDirectory(path)
    if not directory.holds_run:
        raise UserError(f"{path}: not a run directory, config.toml is missing")
    if live:
        os.nice(19)
    with writing_to(path):
        lock = FileLock(path / f".{name}.lock")
        # a follower goes on for a while after its run has ended, or was killed and resumed
        patience = -1 if live else 0 if directory.in_progress else TIME_TO_FINISH
        try:
            _acquire(lock, patience, f"waiting for the process that passes events of {path} on to {name}")
        except Timeout:
            raise UserError(f"{path}: another process passes its events on to {name}") from None
    with lock:
        return _follow(directory, opener(name)(directory), live)


def _acquire(lock: FileLock, patience: float, waiting: str) -> None:
    """Says on stderr that it is waiting, unless that takes a moment."""
    if patience:
        with suppress(Timeout):
            lock.acquire(SECONDS_IN_SILENCE)
            return
        print(waiting, file=sys.stderr, flush=True)
    lock.acquire(patience)


def _follow(directory: RunDirectory, tracker: Tracker, live: bool) -> str:
    lines, ended = Lines(directory.metrics, tracker.restart), False
    while True:
        goes_on = live and directory.in_progress  # asked first, so that the last lines are read after its end
        for event in lines.new():
            tracker.log(event)
            ended = event["event"] == "end"
        tracker.flush()
        if ended or not goes_on:
            break
        time.sleep(SECONDS)
    if live:
        signal.alarm(TIME_TO_FINISH)  # which kills this process
    return tracker.finish(partial(figures, directory) if ended else dict)


class Lines:
    """The complete lines of a file that grows, and that may be replaced by another one of its name."""

    def __init__(self, path: Path, restarted: Callable[[], None]) -> None:
        """`restarted` is called before the first line, and again where another file has taken the name."""
        self._path, self._restarted = path, restarted
        self._file: IO[bytes] | None = None
        self._rest = b""

    def new(self) -> list[Event]:
        """The events of the lines that are new; damaged lines are passed over."""
        with reading_from(self._path):
            if self._file is None or not self._is_current(self._file):
                if not self._path.exists():
                    return []
                if self._file is not None:
                    self._file.close()
                self._file, self._rest = self._path.open("rb"), b""
                self._restarted()
            *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        events = [parse(line.decode("utf-8", errors="replace")) for line in lines]
        return [event for event in events if event and event["event"] in KINDS]

    def _is_current(self, file: IO[bytes]) -> bool:
        """Whether it still has its name; a file that is held open keeps its number."""
        try:
            named = self._path.stat()
        except FileNotFoundError:  # on its way to another disk
            return True
        return os.path.samestat(named, os.fstat(file.fileno())) and named.st_size >= file.tell()


def figures(directory: RunDirectory) -> dict[str, bytes]:
    """The figures of a report of this run, as PNG."""
    import matplotlib as mpl

    from bandsplit.reporting.figures import STYLE
    from bandsplit.reporting.report import draw
    from bandsplit.reporting.runs import group_runs, read_run

    images = {}
    with mpl.rc_context(STYLE):
        for name, figure in draw(group_runs([read_run(directory.path)])).items():
            if figure is not None:
                png = io.BytesIO()
                figure.savefig(png, format="png")
                images[name] = png.getvalue()
    return images
