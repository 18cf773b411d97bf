"""Progress: a bar in a terminal, plain lines now and then in a log, nothing for what takes a moment."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import termios
import time

import pytest

from bandsplit import progress
from bandsplit.data.prepare import progress as bytes_of
from bandsplit.progress import Progress, duration, followed


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    monkeypatch.setattr(progress, "LINES", 0.1)


@pytest.mark.usefixtures("hasty")
def test_a_log_gets_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("examining train", 4000, done=1000) as scan:
        scan.note("2 bad")
        for _ in range(4):
            scan.advance(500)
            scan.advance(250)
            time.sleep(0.11)
    text = capsys.readouterr().err
    first, *_, last, end = text.splitlines()
    assert re.fullmatch(
        r"[\d:]{8} examining train: 1,500 of 4,000 images \(38 %\), [\d,]+ images/s, \d+ s left, 2 bad", first
    )
    assert re.search(r": 3,750 of 4,000 images \(94 %\), [\d,]+ images/s, 0 s left, 2 bad$", last)
    assert re.search(r"examining train: 4,000 images in 0 s$", end)
    assert len(text.splitlines()) == 5
    assert "\r" not in text


@pytest.mark.usefixtures("hasty")
def test_bytes_and_what_has_no_end(capsys: pytest.CaptureFixture[str]) -> None:
    with bytes_of.Progress("unpacking a.tar", 2_000_000_000) as unpacking:
        unpacking.advance(500_000_000, images=10)
    with Progress("walking", unit="files") as walking:
        walking.advance(7)
    lines = capsys.readouterr().err.splitlines()
    assert re.search(r"unpacking a.tar: 500MB of 2.00GB \(25 %\), \S+B/s, \d+ s left, 10 images$", lines[0])
    assert re.search(r"walking: 7 files, \S+ files/s$", lines[2])


@pytest.mark.usefixtures("hasty")
def test_slow_work_has_a_time_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("building", 3, "commands") as building:
        time.sleep(1.6)
        building.advance()
    line = capsys.readouterr().err.splitlines()[0]
    assert re.search(r"building: 1 of 3 commands \(33 %\), \d s each, \d s left$", line)


def test_nothing_is_said_of_a_moment_or_by_other_ranks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(followed(range(3), "counting", 3)) == [0, 1, 2]
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    assert list(followed(range(3), "counting", 3, shown=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        for _ in followed(range(8), "validating", 8, "batches"):
            time.sleep(0.15)
    shown = b""
    with contextlib.suppress(OSError):  # at its end
        while more := os.read(ours, 4096):
            shown += more
    os.close(ours)
    assert b"\rvalidating:" in shown
    assert re.search(rb"8/8 \[00:01<00:00, +\d+\.\d\d batches/s\]", shown)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3599, "1 h 0 min"), (12000, "3 h 20 min"), (190_000, "2 d 4 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
