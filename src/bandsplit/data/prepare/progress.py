"""Progress in bytes that several threads make, and that stops them."""

from __future__ import annotations

import threading
from collections.abc import Callable

from bandsplit import progress


class Stopped(Exception):
    """Another thread has failed."""


class Progress(progress.Progress):
    """Bytes done, rate and images."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        """`total` and `done` in bytes."""
        super().__init__(what, total, "B", done)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._images = 0
        self.position: Callable[[], int] | None = None
        """Where the bytes done are read from, instead of adding them up: of a compressed file."""

    def advance(self, size: int = 1, images: int = 0) -> None:
        """Raises Stopped after `stop`."""
        if self._stopped.is_set():
            raise Stopped
        with self._lock:
            self._images += images
            if self._images:
                self.note(f"{self._images:,} images")
            super().advance(size if self.position is None else self.position() - self._done)

    def stop(self) -> None:
        self._stopped.set()
