"""Log files are written once a run has started or an error ends it, and contain the traceback."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from loguru import logger

from bandsplit.errors import ReportedElsewhere, UserError
from bandsplit.runs.logs import logged


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    yield
    logger.remove()


def test_lines_are_held_back_until_the_run_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run {0}/logs/rank0.log"
    with logged(path.parent, 0) as file:
        logger.warning("first \udcff")  # a file name that is not UTF-8
        assert not path.exists()
        file.open()
        logger.info("second")
        text = path.read_text()
    assert [line.split()[2:] for line in text.splitlines()] == [["WARNING", "first", "\\udcff"], ["INFO", "second"]]
    assert "second" in capsys.readouterr().err


def end(folder: Path, rank: int, error: Exception, begun: bool) -> None:
    """A run that an error ends, before or after it has started to write."""
    with logged(folder, rank) as file:
        logger.info("before")
        if begun:
            file.open()
        raise error


@pytest.mark.parametrize("error", [UserError("a mistake"), ReportedElsewhere()])
def test_a_run_that_is_refused_writes_nothing(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)):
        end(tmp_path / "logs", 0, error, begun=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("begun", [False, True])
def test_what_ends_a_run_is_in_the_log_with_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rank: int, begun: bool
) -> None:
    with pytest.raises(KeyError):
        end(tmp_path / "logs", rank, KeyError("nothing"), begun)
    text = (tmp_path / f"logs/rank{rank}.log").read_text()
    assert text.index("before") < text.index("this rank failed: 'nothing'") < text.index("Traceback")
    assert "in end\n    raise error" in text
    assert "Traceback" not in capsys.readouterr().err  # Python or torchrun prints it


def test_a_message_for_the_user_is_in_the_log_with_its_cause(tmp_path: Path) -> None:
    error = UserError("metrics.jsonl: cannot be written")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UserError):
        end(tmp_path, 0, error, begun=True)
    text = (tmp_path / "rank0.log").read_text()
    assert "this rank ends: metrics.jsonl: cannot be written" in text
    assert "OSError: [Errno 28] No space left on device" in text


def test_a_log_that_cannot_be_written_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training continues; tracebacks go to the terminal instead."""
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(KeyError):
        end(tmp_path / "logs", 1, KeyError("nothing"), begun=True)
    told = capsys.readouterr().err
    assert told.count("rank1.log: cannot be written: ") == 1
    assert "before" not in told
    assert told.count("Traceback") == 1


def test_a_terminal_that_is_gone_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example if the same Ctrl-C stopped the other end of a pipe."""
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w", buffering=1) as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with logged(tmp_path, 0) as file:
            file.open()
            for n in range(3):
                logger.info("line {}", n)
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):
            terminal.close()
    assert len((tmp_path / "rank0.log").read_text().splitlines()) == 3
