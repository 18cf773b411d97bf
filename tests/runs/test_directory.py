"""The run directory: what is refused, what is kept, what is forgotten."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy
import nvidia.dali
import pydantic
import pytest
import tomli

import bandsplit
from bandsplit.config import loading
from bandsplit.cpus import available_cpus
from bandsplit.errors import UserError
from bandsplit.runs.directory import PACKAGES, RunDirectory, environment
from bandsplit.runs.metrics import Metrics, Stopwatch
from tests.conftest import REPOSITORY


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


def test_versions_are_those_of_the_packages_in_use(tmp_path: Path) -> None:
    """However they are installed: here all but the standard library has lost its metadata."""
    site = Path(pydantic.__file__).parents[1]
    for entry in site.iterdir():
        if entry.suffix not in (".dist-info", ".egg-info"):
            (tmp_path / entry.name).symlink_to(entry)
    code = """
import importlib.metadata, json, numpy, nvidia.dali
from bandsplit.runs.directory import environment
assert not [*importlib.metadata.distributions()]
print(json.dumps(environment(1, "cpu")["versions"]))
"""
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY / 'src'}"}
    done = subprocess.run([sys.executable, "-S", "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    versions = json.loads(done.stdout)
    used = {"nvidia.dali": nvidia.dali.__version__, "numpy": numpy.__version__, "bandsplit": bandsplit.__version__}
    assert {name: versions[name] for name in used} == used
    assert versions["torch"] is None  # not in use


def test_the_cpus_of_a_launch_are_recorded() -> None:
    launch = environment(1, "cpu")
    assert (launch["cpu_count"], launch["available_cpus"]) == (os.cpu_count(), available_cpus())


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
