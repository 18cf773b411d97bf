"""A progress bar on stderr that several threads move, and that stops them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm


class Stopped(Exception):
    """Another thread has failed."""


class Progress:
    """Bytes done, rate and images; in a log file one line in half a minute."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        """`total` and `done` in bytes."""
        seconds = 0.1 if sys.stderr.isatty() else 30
        self._bar = tqdm(
            desc=what, total=total, initial=done, unit="B", unit_scale=True, mininterval=seconds, maxinterval=seconds
        )
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._images = 0
        self.position: Callable[[], int] | None = None
        """Where the bytes done are read from, instead of adding them up: of a compressed file."""

    def advance(self, size: int, images: int = 0) -> None:
        """Raises Stopped after `stop`."""
        if self._stopped.is_set():
            raise Stopped
        with self._lock:
            self._images += images
            if self._images:
                self._bar.set_postfix(images=f"{self._images:,}", refresh=False)
            self._bar.update(size if self.position is None else self.position() - self._bar.n)

    def stop(self) -> None:
        self._stopped.set()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
