"""The stopwatch of a run."""

from __future__ import annotations

import pytest

from bandsplit.runs import metrics


def test_the_stopwatch_does_not_run_while_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 5.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    watch = metrics.Stopwatch(100.0)
    now = 7.0
    assert watch.seconds == 102.0
    with watch.paused():
        assert watch.seconds == 102.0, "a checkpoint is written in a pause"
        now = 20.0
        assert watch.seconds == 102.0
    now = 21.0
    assert watch.seconds == 103.0
