"""Trackers say what metrics.jsonl says, also of resumed runs, and nothing that happens to them reaches the run."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from loguru import logger

from bandsplit.errors import UserError
from bandsplit.runs.directory import RunDirectory
from bandsplit.runs.metrics import Metrics
from bandsplit.tracking import follower, launch, tracker
from tests.compare import metrics, wait_for
from tests.conftest import Done, Launch
from tests.tracking import read_back

CLOSED = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}


@pytest.fixture
def run_dir(finished: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a finished run, of a run that is nothing but this."""
    return Path(shutil.copytree(finished(1), tmp_path / "tiny-seed0", symlinks=True))


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def told(run_dir: Path) -> read_back.Values:
    """All numbers of metrics.jsonl by name and step."""
    values = {}
    for line in lines(run_dir):
        for key, value in line.items():
            if key not in ("event", "step"):
                name, step = f"{line['event']}/{key}", line["step"]
                entries = {f"{name}/{k}": entry for k, entry in enumerate(value)} if isinstance(value, list) else {}
                values |= {(each, step): entry for each, entry in (entries or {name: value}).items()}
    return values


def in_float32(values: read_back.Values) -> read_back.Values:
    return {key: float(np.float32(value)) for key, value in values.items()}


def train_again(run_dir: Path, step: int) -> None:
    """Repeats the steps after one as a resumed run does, with other losses."""
    repeated = [line for line in lines(run_dir) if line["step"] > step or line["event"] == "end"]
    metrics_file = Metrics(run_dir / "metrics.jsonl")
    metrics_file.forget_after(step)
    for line in repeated:
        metrics_file.write(**{**line, "loss": line["loss"] + 1})


def test_events_of_tensorboard_equal_the_metrics_in_float32_also_after_steps_were_repeated(run_dir: Path) -> None:
    whole = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "metrics.jsonl").write_text(whole[: len(whole) // 2])  # within a line, which is being written
    follower.follow(run_dir, "tensorboard", live=False)
    assert 0 < len(read_back.tensorboard(run_dir)[0]) < len(told_of(whole, run_dir))
    assert not read_back.tensorboard_figures(run_dir)

    (run_dir / "metrics.jsonl").write_text(whole)
    train_again(run_dir, step=6)
    follower.follow(run_dir, "tensorboard", live=False)
    found, times = read_back.tensorboard(run_dir)
    assert found == in_float32(told(run_dir))
    began = json.loads((run_dir / "environment.json").read_text())[0]["started"]
    first = next(line for line in lines(run_dir) if line["step"] == 8)
    assert time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(times["train/loss", 8] - first["seconds"])) == began
    assert {"figures/loss", "figures/branches", "figures/accuracy_step"} <= {*read_back.tensorboard_figures(run_dir)}


def told_of(text: str, run_dir: Path) -> read_back.Values:
    (run_dir / "all").mkdir()
    (run_dir / "all/metrics.jsonl").write_text(text)
    return told(run_dir / "all")


@pytest.mark.slow
def test_wandb_gets_each_value_once(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first follower ends between the training line of a step and its validation: the next one gives both."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    whole = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines_of_13 = [json.loads(line)["event"] for line in whole if '"step": 13,' in line]
    assert lines_of_13 == ["train", "validation"]
    (run_dir / "metrics.jsonl").write_text("".join(whole[:4]))
    assert "sends it; the last step waits for the next one" in follower.follow(run_dir, "wandb", live=False)
    noted = json.loads((run_dir / "wandb/sent.json").read_text())
    assert (noted["event"], noted["step"]) == ("train", 12)
    before = {(name, step): value for (name, step), value in told(run_dir).items() if step <= 12}
    (run_dir / "metrics.jsonl").write_text("".join(whole))
    train_again(run_dir, step=6)
    time.sleep(1.1)  # wandb 0.31 loses the second of two offline runs of one name and second
    for expected in ("sends it", "nothing new to hand to wandb"):
        assert expected in follower.follow(run_dir, "wandb", live=False)
    found, records = read_back.wandb(run_dir)
    assert found == told(run_dir) | before  # of what was repeated, the first counts
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert len({run.run_id for run in runs}) == 1
    (run,) = {(run.project, run.display_name) for run in runs}
    assert run == ("bandsplit", "tiny-seed0")
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["train"]["batch_size"] == 12


@pytest.mark.slow
def test_what_a_killed_process_handed_to_wandb_is_handed_over_again(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the figures, in the same run: the process ends while it draws them, with no event on the disk."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    code = """
import os, sys
from pathlib import Path
from bandsplit.tracking import follower
follower.figures = lambda of: os._exit(9)
follower.follow(Path(sys.argv[1]), "wandb", live=False)
"""
    assert subprocess.run([sys.executable, "-c", code, run_dir]).returncode == 9
    (folder,) = run_dir.glob("wandb/offline-run-*")
    folder.rename(run_dir / "killed")
    for expected in ("sends it", "nothing new to hand to wandb"):
        assert expected in follower.follow(run_dir, "wandb", live=False)
    found, records = read_back.wandb(run_dir)
    assert found == told(run_dir)
    figures = {item.nested_key[0] for record in records for item in record.history.item if item.nested_key}
    assert {"figures/loss", "figures/branches"} <= figures
    ids = {record.run.run_id for record in records if record.WhichOneof("record_type") == "run"}
    assert [f"-{each}" in folder.name for each in ids] == [True]


def test_a_tracker_that_dies_after_the_last_line_is_told_too(run_dir: Path) -> None:
    warnings: list[str] = []
    sink = logger.add(warnings.append, format="{message}")
    try:
        started = launch.Followers(RunDirectory(run_dir), ["tensorboard"])
        (process,) = (each.process for each in started._running.values())
        process.kill()
        process.wait()
        started("end")
    finally:
        logger.remove(sink)
    assert "tracker tensorboard has ended: exit code -9, see " in "".join(warnings)


def test_seeds_are_runs_of_a_group(run_dir: Path) -> None:
    from bandsplit.reporting.settings import read_settings
    from bandsplit.tracking.wandb import group

    def of(*changes: tuple[str, str]) -> str:
        text = (run_dir / "config.toml").read_text()
        for before, after in changes:
            assert before in text
            text = text.replace(before, after)
        (run_dir / "changed.toml").write_text(text)
        return group(read_settings(run_dir / "changed.toml")[0])

    assert of() == of(("seed = 0", "seed = 1"), ("log_every = 4", "log_every = 5")) != of(("lr = 0.05", "lr = 0.06"))
    assert of().startswith("tiny-")


def test_branches_that_are_trained_alone_keep_their_numbers() -> None:
    event = {"event": "validation", "step": 3, "top1": 50.0, "branch_top1": [10.0, 20.0], "stopped_after": [None, 2]}
    assert dict(tracker.scalars(event, [3, 1])) == {
        "validation/top1": 50.0,
        "validation/branch_top1/3": 10.0,
        "validation/branch_top1/1": 20.0,
        "validation/stopped_after/1": 2,
    }


def test_a_package_that_is_missing_ends_the_command_before_the_run(
    config_file: Path, run_here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == "wandb" else found(name, *of))
    done = run_here("train.py", config_file, "--run-dir", tmp_path / "run", "--set", "log.trackers=tensorboard,wandb")
    assert done.returncode == 2
    expected = "log.trackers: 'wandb' given, but the package wandb is not installed: pip install -e .[wandb]"
    assert expected in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_named(run_dir: Path) -> None:
    (run_dir / "tensorboard").touch()
    with pytest.raises(UserError, match="tensorboard: cannot be written"):
        follower.follow(run_dir, "tensorboard", live=False)
    with pytest.raises(UserError, match="not a run directory"):
        follower.follow(run_dir / "logs", "tensorboard", live=False)


def test_a_run_is_in_progress_while_its_process_lives(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert not directory.in_progress
    with directory.locked():
        assert directory.in_progress
    assert not directory.in_progress
    with pytest.raises(UserError), directory.locked():
        raise UserError("the disk is full")
    assert not directory.owner.exists(), "another host knows no more than this file"
    child = os.fork()
    if not child:
        with directory.locked():
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # dead, and not yet waited for
    assert directory.owner.exists()
    assert not directory.in_progress
    os.waitpid(child, 0)
    assert not directory.in_progress


def test_a_follower_that_finishes_is_waited_for_but_not_one_of_a_run_that_goes_on(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(follower, "SECONDS_IN_SILENCE", 0.1)
    lock = FileLock(run_dir / ".tensorboard.lock", thread_local=False)
    with lock:
        with RunDirectory(run_dir).locked(), pytest.raises(UserError, match="another process passes its events on"):
            follower.follow(run_dir, "tensorboard", live=False)
        assert not capsys.readouterr().err
        threading.Timer(0.5, lock.release).start()
        follower.follow(run_dir, "tensorboard", live=False)
        assert "waiting for the process" in capsys.readouterr().err
    assert read_back.tensorboard(run_dir)[0] == in_float32(told(run_dir))


def followers(run_dir: Path) -> dict[str, int]:
    """The processes that follow a run, by tracker."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if "bandsplit.cli.track" in words and str(run_dir) in words:
            found[words[words.index("--to") + 1]] = int(path.parent.name)
    return found


@pytest.fixture
def tracked(config_file: Path, tmp_path: Path) -> Iterator[tuple[Path, Launch]]:
    """A run whose wandb server does not answer; no follower is left behind."""
    run_dir = tmp_path / "tracked"
    trackers = ("--set", "log.trackers=tensorboard,wandb")
    yield run_dir, Launch("train.py", config_file, "--run-dir", run_dir, *trackers, ranks=1, env=CLOSED)
    for pid in followers(run_dir).values():
        os.kill(pid, signal.SIGKILL)


def test_a_killed_tracker_and_a_server_that_does_not_answer_do_not_touch_a_run(
    tracked: tuple[Path, Launch], finished: Callable[..., Path]
) -> None:
    run_dir, launch = tracked
    wait_for(run_dir / "logs/track_tensorboard.log", launch)
    while "tensorboard" not in followers(run_dir):
        time.sleep(0.01)
    os.kill(followers(run_dir)["tensorboard"], signal.SIGKILL)
    done = launch.wait()
    assert done.returncode == 0
    assert metrics(run_dir) == metrics(finished(1))
    assert done.stderr.count("tracker tensorboard has ended") == 1
    assert f"bandsplit track {run_dir} --to tensorboard" in done.stderr
    follower.follow(run_dir, "tensorboard", live=False)
    assert read_back.tensorboard(run_dir)[0] == in_float32(told(run_dir))
