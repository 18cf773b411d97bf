"""Logging to one file per rank and to the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from loguru import logger
from tqdm import tqdm

from bandsplit.errors import Interrupted, ReportedElsewhere, UserError

if TYPE_CHECKING:
    from loguru import Message, Record


class LogFile:
    """The log file of a rank.

    Lines are buffered until `open`, so that a run that is refused writes nothing. An error with a traceback opens the
    file at once; if the file cannot be written, it goes to the terminal.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: list[Message] = []
        self._file: FileIO | None = None
        self._failed = False

    @property
    def is_open(self) -> bool:
        return self._file is not None or self._failed

    def open(self) -> None:
        """Writes the buffered lines; later lines are written immediately."""
        held, self._held = self._held, []
        if not self._failed:
            try:
                if self._file is None:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    self._file = self._path.open("ab", buffering=0)
                self._file.write("".join(held).encode(errors="backslashreplace"))
            except OSError as error:
                self._failed = True
                sys.stderr.write(f"{self._path}: cannot be written: {error}\n")
        if self._failed:
            sys.stderr.writelines(message for message in held if _is_unexpected(message.record))

    def write(self, message: Message) -> None:
        """Called by loguru for every line."""
        self._held.append(message)
        if self.is_open or _is_unexpected(message.record):
            self.open()

    def stop(self) -> None:
        """Called by loguru when the log ends."""
        if self._file is not None:
            self._file.close()


@contextmanager
def logged(folder: Path, rank: int) -> Iterator[LogFile]:
    """Inside, this rank logs to ``folder/rankN.log`` and, for the user, to the terminal.

    An error that ends the block is logged to the file with its traceback. Tracebacks are not logged to the terminal:
    the entry point prints a UserError, and Python prints the traceback of all other errors.
    """
    file = LogFile(folder / f"rank{rank}.log")
    logger.remove()
    written = logger.add(
        file, format="{time:YYYY-MM-DD HH:mm:ss} {level: <7} {message}", backtrace=False, diagnose=False
    )
    _log_to_terminal(rank)
    try:
        yield file
    except (Interrupted, ReportedElsewhere):
        raise
    except UserError as error:
        if file.is_open:
            logger.opt(exception=error).debug("this rank ends: {}", error)
        raise
    except Exception as error:
        logger.opt(exception=error).error("this rank failed: {}", error)
        raise
    finally:
        logger.remove(written)


def _log_to_terminal(rank: int) -> None:
    """Rank 0 logs INFO above its progress bar, or DEBUG (with train metrics) without a terminal; others only errors."""
    form, level = "{time:HH:mm:ss} {message}", "INFO" if sys.stderr.isatty() else "DEBUG"
    if rank > 0:
        form, level = f"{{time:HH:mm:ss}} rank {rank}: {{message}}", "ERROR"
    logger.add(_write_to_terminal, format=form, level=level, filter=_has_no_traceback)


def _write_to_terminal(message: Message) -> None:
    try:
        tqdm.write(message, end="", file=sys.stderr)
    except OSError:  # terminal or pipe closed: go on, so that a checkpoint can be written
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115


def _is_unexpected(record: Record) -> bool:
    return record["exception"] is not None and record["level"].name == "ERROR"


def _has_no_traceback(record: Record) -> bool:
    return record["exception"] is None
