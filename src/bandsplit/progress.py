"""How far a command is: a bar in a terminal; in a log file or pipe a plain line every half minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Self, TypeVar

from tqdm import tqdm

T = TypeVar("T")

FIRST_LINE, LINES = 5.0, 30.0
"""Seconds after which the first plain line is written, and between two of them."""


class Progress:
    """What is done, how much of it, the rate, and the time left; on stderr. Nothing for what takes a moment."""

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "images",
        done: int = 0,
        shown: bool = True,
        lines: bool = True,
    ) -> None:
        """
        Args:
            total, done: in `unit`; "B" stands for bytes, which are shown as MB or GB. `done` was done before.
            shown: whether this process shows anything, as one of several ranks.
            lines: whether it also does so outside of a terminal.
        """
        in_terminal = sys.stderr.isatty()
        self._what, self._total, self._unit = what, total, unit
        self._done = self._before = done
        self._note = ""
        self._lines = shown and lines and not in_terminal
        self._began = time.monotonic()
        self._next, self._told = self._began + FIRST_LINE, False
        self._bar = tqdm(
            desc=what,
            total=total,
            initial=done,
            unit=unit if unit == "B" else f" {unit}",
            unit_scale=unit == "B",
            dynamic_ncols=True,
            delay=0.5,
            leave=None,  # unless it is within another one
            disable=not (shown and in_terminal),
        )

    def advance(self, count: int = 1) -> None:
        self._done += count
        self._bar.update(count)
        if self._lines and time.monotonic() >= self._next:
            self._next, self._told = time.monotonic() + LINES, True
            self._write(self._line())

    def note(self, text: str) -> None:
        """Shown from now on, after the rate."""
        self._note = text
        self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        self._bar.close()
        if self._told:
            self._told = False
            self._write(f"{self._amount(self._done)} in {duration(time.monotonic() - self._began)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _line(self) -> str:
        rate = (self._done - self._before) / (time.monotonic() - self._began)
        note = f", {self._note}" if self._note else ""
        if self._total is None:
            return f"{self._amount(self._done)}, {self._rate(rate)}{note}"
        left = f", {duration((self._total - self._done) / rate)} left" if rate else ""
        share = 100 * self._done / self._total if self._total else 100
        of = f"{self._amount(self._done, short=True)} of {self._amount(self._total)}"
        return f"{of} ({share:.0f} %), {self._rate(rate)}{left}{note}"

    def _rate(self, rate: float) -> str:
        if self._unit == "B":
            return f"{tqdm.format_sizeof(rate)}B/s"
        if 0 < rate < 1:
            return f"{duration(1 / rate)} each"
        return f"{f'{rate:,.0f}' if rate >= 100 else f'{rate:.3g}'} {self._unit}/s"

    def _amount(self, count: int, short: bool = False) -> str:
        if self._unit == "B":
            return f"{tqdm.format_sizeof(count)}B"
        return f"{count:,}" if short else f"{count:,} {self._unit}"

    def _write(self, text: str) -> None:
        with suppress(OSError):  # whoever read the pipe is gone
            print(f"{time.strftime('%H:%M:%S')} {self._what}: {text}", file=sys.stderr, flush=True)


def followed(
    items: Iterable[T], what: str, total: int | None = None, unit: str = "images", shown: bool = True
) -> Iterator[T]:
    """The items, with the progress of what is done with them."""
    with Progress(what, total, unit, shown=shown) as progress:
        for item in items:
            yield item
            progress.advance()


def duration(seconds: float) -> str:
    """Such as `45 s`, `12 min`, `3 h 20 min` or `2 d 5 h`."""
    minutes = round(seconds / 60)
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
