"""Signals are recorded, and a second Ctrl-C ends the run immediately."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from bandsplit.training import interruption


@pytest.fixture(autouse=True)
def _hangup_is_not_ignored() -> Iterator[None]:
    """Also if the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_signals_are_recorded_and_handlers_restored() -> None:
    before = {number: signal.getsignal(number) for number in interruption.SIGNALS}
    for number in interruption.SIGNALS:
        with interruption.noticed() as interrupted:
            assert interrupted.signal == 0
            os.kill(os.getpid(), number)
            assert interrupted.signal == number
    assert {number: signal.getsignal(number) for number in interruption.SIGNALS} == before


def test_a_second_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not if the same one is delivered twice."""
    with interruption.noticed() as interrupted:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupted.signal == signal.SIGINT
        monkeypatch.setattr(interruption, "SAME_PRESS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruption.noticed() as interrupted:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupted.signal == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
