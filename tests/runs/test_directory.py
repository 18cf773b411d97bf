"""The run directory: what is refused, what is kept, what is forgotten."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import tomli

from bandsplit.config import loading
from bandsplit.errors import UserError
from bandsplit.runs.directory import PACKAGES, RunDirectory, environment
from bandsplit.runs.metrics import Metrics, Stopwatch


def test_a_run_is_not_overwritten_and_not_changed(tmp_path: Path, config_file: Path) -> None:
    config, directory = loading.load(config_file), RunDirectory(tmp_path / "run")
    directory.check(config, resume=False)
    directory.create(config, {"world_size": 1})
    with pytest.raises(UserError, match="already holds a run; --resume continues it"):
        directory.check(config, resume=False)
    directory.check(config, resume=True)
    changed = loading.load(config_file, ["optim.lr=0.07", "train.epochs=3"])
    with pytest.raises(UserError, match=r"optim.lr was 0.05, now 0.07; train.epochs was 2, now 3"):
        directory.check(changed, resume=True)


def test_where_a_run_is_computed_may_change(tmp_path: Path, config_file: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.create(loading.load(config_file, ["parallel.branch_groups=4"]), {"world_size": 8})
    moved = loading.load(
        config_file, ["parallel.branch_groups=2", "data.root=/elsewhere", "checkpoint.every_minutes=3"]
    )
    directory.check(moved, resume=True)
    directory.create(moved, {"world_size": 4})
    assert loading.load(directory.config).data.root == "/elsewhere"


def test_every_launch_is_noted_and_the_config_is_complete(tmp_path: Path, config_file: Path) -> None:
    config, directory = loading.load(config_file), RunDirectory(tmp_path / "run")
    for ranks in (1, 2):
        directory.create(config, environment(ranks, "cpu"))
    launches = json.loads(directory.environment.read_text())
    assert [launch["world_size"] for launch in launches] == [1, 2]
    assert set(PACKAGES) < set(launches[0]["versions"])
    assert tomli.loads(directory.config.read_text())["optim"]["momentum"] == 0.9


def test_a_run_directory_that_is_a_file(config_file: Path) -> None:
    with pytest.raises(UserError, match="this is a file"):
        RunDirectory(config_file).check(loading.load(config_file), resume=False)


def test_lines_after_the_checkpoint_and_half_lines_are_forgotten(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.forget_after(3)  # nothing there yet
    for step in (2, 4, 6):
        metrics.write("train", step=step)
    metrics.write("validation", step=4)
    metrics.write("end", step=4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
    metrics.forget_after(4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["event"], line["step"]) for line in lines] == [("train", 2), ("train", 4), ("validation", 4)]


def test_the_watch_stands_still_while_paused() -> None:
    watch = Stopwatch(100.0)
    with watch.paused():
        time.sleep(0.2)
    assert 100.0 <= watch.seconds < 100.15
