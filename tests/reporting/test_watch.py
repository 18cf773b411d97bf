"""The table of `report --watch`: its numbers are those of metrics.jsonl, and it ends with the runs."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bandsplit.errors import UserError
from bandsplit.reporting.watch import watch
from bandsplit.runs.directory import RunDirectory
from tests.conftest import Done


def test_a_run_is_watched_from_its_start_until_its_process_ends(
    finished: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done, run_dir = finished(1), tmp_path / "run"
    run_dir.mkdir()
    shutil.copy(done / "config.toml", run_dir)
    lines = (done / "metrics.jsonl").read_text().splitlines(keepends=True)
    trains = threading.Event()

    def train() -> None:
        with RunDirectory(run_dir).locked(), (run_dir / "metrics.jsonl").open("w", buffering=1) as file:
            trains.set()
            time.sleep(0.5)
            for line in lines[:6]:
                file.write(line)
                time.sleep(0.3)

    training = threading.Thread(target=train)
    training.start()
    trains.wait()
    watch([run_dir, done], 0.1)
    training.join()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(str(run_dir))]
    assert [row[1] for row in rows] == sorted((row[1] for row in rows), key=["starting", "training", "stopped"].index)
    assert {row[1] for row in rows} == {"starting", "training", "stopped"}
    train_line, validation = json.loads(lines[5]), json.loads(lines[4])
    top1, best = f"{validation['top1']:.2f}", f"{max(validation['branch_top1']):.2f}"
    loss, speed, wait = (train_line[key] for key in ("loss", "images_per_second", "data_wait"))
    measured = ["1.23/2", "16", f"{loss:.4f}", top1, "%", best, "%", f"{speed:,.0f}", f"{100 * wait:.0f}", "%"]
    assert rows[-1] == [str(run_dir), "stopped", *measured]


def test_the_command(finished: Callable[..., Path], run_here: Callable[..., Done], tmp_path: Path) -> None:
    run_dir = finished(1)
    done = run_here("report.py", run_dir, "--watch")
    assert (done.returncode, done.stdout.count("ended"), done.stderr) == (0, 1, "")
    assert not (run_dir / "plots").exists()
    assert "run directories come before it" in run_here("report.py", "--watch", run_dir).stderr
    assert "--watch takes run directories alone" in run_here("report.py", run_dir, "--watch", "--output", "a").stderr
    with pytest.raises(UserError, match="no such folder"):
        watch([tmp_path / "nothing"], 1)
