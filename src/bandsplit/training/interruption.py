"""Signals that stop a run: the current step is finished and a checkpoint is written first."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""Preemption or `scancel`, Slurm's time limit (``--signal=B:USR1@120``), Ctrl-C, a closed terminal."""

SAME_PRESS = 1.0
"""Seconds within which a second SIGINT counts as the same Ctrl-C: Slurm and torchrun may both forward it."""


class Interruption:
    """The latest of SIGNALS that this process has received; `signal` is 0 before the first."""

    def __init__(self) -> None:
        self.signal = 0
        self._pressed: float | None = None

    def note(self, number: int, _: FrameType | None) -> None:
        """Signal handler. Raises KeyboardInterrupt on the second Ctrl-C."""
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._pressed is None:
                self._pressed = now
                if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":  # no print in a signal handler
                    os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again ends at once\n")
            elif now - self._pressed > SAME_PRESS:
                raise KeyboardInterrupt
        self.signal = number


@contextmanager
def noticed() -> Iterator[Interruption]:
    """Inside, SIGNALS are only recorded. SIGHUP stays ignored under `nohup`."""
    interruption = Interruption()
    noted = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, interruption.note) for number in noted}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
