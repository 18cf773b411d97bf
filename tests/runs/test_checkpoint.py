"""A checkpoint is whole or not there, good or not used; enough of them stay."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bandsplit.errors import UserError
from bandsplit.runs import checkpoint, saver

FILES = checkpoint.files_of([0, 3], streams=1)


def states(value: float) -> dict[str, checkpoint.State]:
    branch = {"network": {"w": torch.full((3000,), value)}, "optimizer": {"state": {}, "none": None}}
    return {
        "run.pt": {"branches": [0, 3], "streams": 1, "value": value},
        "branch_00.pt": branch,
        "branch_03.pt": branch,
        "stream_00.pt": {"loader": b"\x00state"},
    }


def save(folder: Path, step: int, best: bool = False, keep: int = 2) -> saver.Writer:
    writer = saver.Writer(folder, leads=True, keep=keep)
    writer.start(step, states(step), FILES, best)
    wait(writer)
    return writer


def wait(writer: saver.Writer) -> None:
    deadline = time.monotonic() + 20
    while writer.busy:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def value(path: Path) -> float:
    return float(checkpoint.read_ensemble(path, [0, 3])["branches.1.w"][0])


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, 3)
    path = tmp_path / "last"
    assert value(path) == 3
    assert checkpoint.read(path, "stream_00.pt") == {"loader": b"\x00state"}
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000003"


@pytest.mark.parametrize(("keep", "kept"), [(1, {3, 5}), (2, {3, 4, 5}), (3, {3, 4, 5})])
def test_the_last_ones_and_the_best_are_kept(tmp_path: Path, keep: int, kept: set[int]) -> None:
    for step, best in ((1, True), (2, False), (3, True), (4, False), (5, False)):
        save(tmp_path, step, best, keep)
    assert names(tmp_path) == {"last", "best", *(f"step_{step:08d}" for step in kept)}
    assert (value(tmp_path / "best"), value(tmp_path / "last")) == (3, 5)


def test_what_is_saved_is_what_was_handed_over(tmp_path: Path) -> None:
    """Training goes on while a checkpoint is written."""
    weights = torch.ones(1000)
    copy = checkpoint.on_host({"a": [weights, {"b": weights}], "c": 1, "d": (2, None)})
    weights.add_(1)
    assert copy["a"][0].sum() == copy["a"][1]["b"].sum() == 1000
    assert (copy["c"], copy["d"]) == (1, [2, None])


def test_several_ranks_write_one_checkpoint(tmp_path: Path) -> None:
    """It gets its name when the last file of the last rank is there, whoever is first."""
    first, second = (saver.Writer(tmp_path, leads, 2) for leads in (True, False))
    files = states(7)
    theirs = {"branch_03.pt": files.pop("branch_03.pt")}
    first.start(7, files, FILES, best=False)
    time.sleep(0.2)
    assert first.busy
    assert checkpoint.latest(tmp_path) is None
    second.start(7, theirs, FILES, best=False)
    wait(first)
    assert value(tmp_path / "last") == 7


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("dies_in", ["fsync", "replace", "rename"])
def test_a_kill_while_writing_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    save(tmp_path, 1, best=True)

    def die(*_: object) -> None:
        raise SystemExit  # ends the writer's thread there, with everything as it is

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", die) if dies_in == "fsync" else patch.setattr(Path, dies_in, die)
        save(tmp_path, 2, best=True)
    assert value(tmp_path / "last") == 1
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000001"
    checkpoint.clean_up(tmp_path, tmp_path / "step_00000001")
    assert names(tmp_path) == {"step_00000001", "last", "best"}
    save(tmp_path, 3, best=True)
    assert value(tmp_path / "best") == 3


@pytest.mark.parametrize("seed", range(20))
def test_damage_anywhere_is_found_and_the_one_before_is_used(tmp_path: Path, seed: int) -> None:
    """A flipped byte, a lost end or a lost file, at random places."""
    chance = random.Random(seed)
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / "step_00000002" / chance.choice(FILES)
    content = bytearray(path.read_bytes())
    kind = ("flip", "cut", "remove")[seed % 3]
    if kind == "flip":  # within a record: what pads records has no meaning
        start = content.find(torch.full((3000,), 2.0).numpy().tobytes()[:64])
        at = chance.randrange(start, start + 12000) if start >= 0 else content.find(b"\x80\x02}") + 3
        content[at] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    elif kind == "cut":
        path.write_bytes(content[: chance.randrange(len(content))])
    else:
        path.unlink()
    assert path.name in (checkpoint.damage(tmp_path / "step_00000002") or "")
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000001"
    checkpoint.clean_up(tmp_path, tmp_path / "step_00000001")
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000001"


def test_where_all_are_damaged_nothing_starts_over_silently(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step_00000001/branch_00.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.latest(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_told_and_leaves_the_last_good_one(small_disk: Path) -> None:
    assert save(small_disk, 1).error is None
    (small_disk / "filler").write_bytes(b"0" * (shutil.disk_usage(small_disk).free - 20_000))
    error = save(small_disk, 2).error
    assert error is not None
    assert error.one_rank
    assert "the checkpoint of step 2 cannot be written: [Errno 28] No space left on device" in str(error)
    assert "the last good one is step_00000001" in str(error)
    assert checkpoint.latest(small_disk) == small_disk / "step_00000001"
    assert names(small_disk) == {"step_00000001", "last", "filler"}


def test_a_folder_that_has_gone_is_told(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    error = save(gone, 2).error
    assert "No such file or directory" in str(error)
    assert "there is none before it" in str(error)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"last/run.pt: no such checkpoint"):
        checkpoint.read(tmp_path / "last", "run.pt")
    save(tmp_path, 1)
    path = tmp_path / "last" / "run.pt"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"last/run.pt: this checkpoint cannot be read"):
        checkpoint.read(tmp_path / "last", "run.pt")
