"""The run directory: what is refused, kept and set aside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
from bandsplit.runs.metrics import Metrics
from tests.conftest import REPOSITORY

CLASSES = ["alpha", "bravo", "charlie"]


def test_a_run_is_not_overwritten_and_not_changed(tmp_path: Path, config_file: Path) -> None:
    config, directory = loading.load(config_file), RunDirectory(tmp_path / "run")
    directory.check(config, resume=False)
    directory.create(config, CLASSES, {"world_size": 1})
    with pytest.raises(UserError, match="already holds a run; --resume continues it"):
        directory.check(config, resume=False)
    directory.check(config, resume=True)
    changed = loading.load(config_file, ["optim.lr=0.07", "train.epochs=1"])
    with pytest.raises(UserError, match=r"optim.lr was 0.05, now 0.07; train.epochs was 2, now 1"):
        directory.check(changed, resume=True)
    directory.check(loading.load(config_file, ["train.epochs=3"]), resume=True)  # it may become longer


def test_a_launch_of_torchrun_is_that_of_its_process(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, directory = loading.load(config_file), RunDirectory(tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    directory.create(config, ["a"], environment(1, "cpu"))
    directory.check(config, resume=True, own_only=True)
    child = os.fork()
    if not child:  # of another process than torchrun's
        try:
            directory.check(config, resume=True, own_only=True)
        except UserError:
            os._exit(3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    directory.create(config, ["a"], {"world_size": 1})
    with pytest.raises(UserError, match="already holds a run"):
        directory.check(config, resume=True, own_only=True)
    directory.check(config, resume=True)


def test_where_a_run_is_computed_may_change(tmp_path: Path, config_file: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.create(loading.load(config_file, ["parallel.branch_groups=4"]), CLASSES, {"world_size": 8})
    moved = loading.load(
        config_file, ["parallel.branch_groups=2", "data.root=/elsewhere", "checkpoint.every_minutes=3"]
    )
    directory.check(moved, resume=True)
    directory.create(moved, CLASSES, {"world_size": 4})
    assert loading.load(directory.config).data.root == "/elsewhere"


def test_a_run_that_began_before_a_key_was_known_has_its_default(tmp_path: Path, config_file: Path) -> None:
    config, directory = loading.load(config_file), RunDirectory(tmp_path / "run")
    directory.create(config, CLASSES, {})
    text = directory.config.read_text()
    assert "hflip = 0.5\n" in text
    directory.config.write_text(text.replace("hflip = 0.5\n", ""))
    directory.check(config, resume=True)
    with pytest.raises(UserError, match=r"data.hflip was 0.5, now 0.1"):
        directory.check(loading.load(config_file, ["data.hflip=0.1"]), resume=True)


def test_every_launch_is_noted_and_the_config_is_complete(tmp_path: Path, config_file: Path) -> None:
    config, directory = loading.load(config_file), RunDirectory(tmp_path / "run")
    for ranks in (1, 2):
        directory.create(config, CLASSES, environment(ranks, "cpu"))
    launches = json.loads(directory.environment.read_text())
    assert [launch["world_size"] for launch in launches] == [1, 2]
    assert set(PACKAGES) < set(launches[0]["versions"])
    assert tomli.loads(directory.config.read_text())["optim"]["momentum"] == 0.9


def test_versions_are_those_of_the_packages_in_use(tmp_path: Path) -> None:
    """Even without package metadata: here only the standard library has any."""
    site = Path(pydantic.__file__).parents[1]
    for entry in site.iterdir():
        if entry.suffix not in (".dist-info", ".egg-info"):
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "bandsplit").symlink_to(REPOSITORY / "src/bandsplit")  # without the metadata of an editable install
    code = """
import importlib.metadata, json, numpy, nvidia.dali
from bandsplit.runs.directory import environment
assert not [*importlib.metadata.distributions()]
print(json.dumps(environment(1, "cpu")["versions"]))
"""
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
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


def test_a_run_that_cannot_be_read_is_not_treated_as_missing(tmp_path: Path, config_file: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: .*File name too long"):
        RunDirectory(tmp_path / ("run" * 100)).check(loading.load(config_file), resume=True)


def test_files_that_were_edited_by_hand(tmp_path: Path, config_file: Path) -> None:
    config, directory = loading.load(config_file), RunDirectory(tmp_path / "run")
    directory.create(config, CLASSES, {"world_size": 1})
    directory.environment.write_text("[{")
    directory.create(config, CLASSES, {"world_size": 2})
    assert json.loads(directory.environment.read_text()) == [{"world_size": 2}]
    assert (tmp_path / "run/set_aside/environment.json").read_text() == "[{"
    directory.config.write_text("name = ")
    with pytest.raises(UserError, match="config.toml: not valid TOML"):
        directory.check(config, resume=True)


def test_classes_are_compared_by_name(tmp_path: Path, config_file: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.check_classes(CLASSES, "/data")  # nothing there yet
    directory.create(loading.load(config_file), CLASSES, {})
    assert json.loads((tmp_path / "run/classes.json").read_text()) == CLASSES
    directory.check_classes(CLASSES, "/data")
    for found, message in (
        (["bravo", "charlie", "zulu"], "missing alpha; new zulu"),
        (["alpha", "bravo"], "missing charlie"),
        (["bravo", "alpha", "charlie"], "the same in another order"),
        ([*CLASSES, *map(str, range(8))], "new 0, 1, 2, 3, 4 and 3 more"),
    ):
        with pytest.raises(
            UserError, match=f"^/data: the classes are not those that {tmp_path}/run was trained on: {message}$"
        ):
            directory.check_classes(found, "/data")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ('["alpha", "bra', "not valid JSON"),
        ('{"alpha": "Alpha"}', "not a list of names"),
        ("[1, 2, 3]", "not a list of names"),
        ('["Alpha", "Bravo"]', "2 names in it, but there are 3 classes"),
    ],
)
def test_damaged_names_of_classes_are_told(tmp_path: Path, content: str, message: str) -> None:
    directory = RunDirectory(tmp_path)
    assert directory.readable_names(CLASSES) == CLASSES  # none are there
    directory.class_names.write_text(content)
    with pytest.raises(UserError, match=f"class_names.json: {message}"):
        directory.readable_names(CLASSES)
    directory.class_names.write_text('["Alpha", "Bravo", "Charlie"]')
    assert directory.readable_names(CLASSES) == ["Alpha", "Bravo", "Charlie"]


def written(path: Path) -> list[tuple[str, int]]:
    return [(line["event"], line["step"]) for line in map(json.loads, path.read_text().splitlines())]


def test_lines_after_the_checkpoint_and_half_lines_are_set_aside(tmp_path: Path) -> None:
    path, forgotten = tmp_path / "metrics.jsonl", tmp_path / "metrics_set_aside.jsonl"
    metrics = Metrics(path)
    metrics.forget_after(3)  # nothing there yet
    for step in (2, 4, 6):
        metrics.write("train", step=step)
    metrics.write("validation", step=4)
    metrics.write("end", step=4)
    assert metrics.ended
    half = '{"event": "train", "st'
    with path.open("a") as file:
        file.write(half)
    assert not metrics.ended
    metrics.forget_after(4)
    assert written(path) == [("train", 2), ("train", 4), ("validation", 4)]
    lines = forgotten.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[:2]] == [6, 4]
    assert lines[2:] == [half]
    metrics.forget_after(0)
    assert written(path) == []
    assert len(forgotten.read_text().splitlines()) == 6


@pytest.mark.parametrize(
    "end", [b"", b"\0" * 400, b"[1, 2]\n", b"17", b'{"event": "train", "loss": 1}\n', b"\xff\xfe\n"]
)
def test_lines_stay_separate_whatever_a_crash_leaves_at_the_end(tmp_path: Path, end: bytes) -> None:
    """An incomplete line, zeros after a power failure, and other lines that we did not write."""
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.write("train", step=1)
    metrics.write("train", step=2)
    path.write_bytes(path.read_bytes()[: -1 if not end else None] + end)
    metrics.forget_after(2)
    metrics.write("train", step=3)
    assert written(path) == [("train", 1), ("train", 2), ("train", 3)]
    if end:
        assert (tmp_path / "metrics_set_aside.jsonl").read_bytes() == end.rstrip(b"\n") + b"\n"
