"""A run that is asked to stop finishes its step, writes a checkpoint and ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Preemption or `scancel`, and the end of a Slurm job's time (``--signal=B:USR1@120``)."""


class Interruption:
    """Which of SIGNALS this process has received, if any."""

    def __init__(self) -> None:
        self.signal = 0

    def note(self, number: int, _: FrameType | None) -> None:
        self.signal = number


@contextmanager
def noticed() -> Iterator[Interruption]:
    """Inside, SIGNALS are noted and do nothing else."""
    interruption = Interruption()
    before = {number: signal.signal(number, interruption.note) for number in SIGNALS}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
