"""Checkpoints are complete or absent, damaged ones are not used, and enough of them are kept."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bandsplit.errors import UserError
from bandsplit.runs import checkpoint, saver

FILES = checkpoint.files_of([0, 3], streams=1)


def states(value: float, best: int = 0) -> dict[str, checkpoint.State]:
    branch = {"network": {"w": torch.full((3000,), value)}, "optimizer": {"state": {}, "none": None}}
    progress = {"step": int(value), "best_step": best}
    return {
        "run.pt": {"format": checkpoint.FORMAT, "branches": [0, 3], "streams": 1, "progress": progress},
        "branch_00.pt": branch,
        "branch_03.pt": branch,
        "stream_00.pt": {"loader": b"\x00state"},
    }


def save(folder: Path, step: int, best: int = 0, keep: int = 2) -> saver.Writer:
    """`best`: step of the best validation so far; 0 if there was none."""
    writer = saver.Writer(folder, leads=True, keep=keep)
    writer.start(step, states(step, best), FILES)
    wait(writer)
    return writer


def wait(writer: saver.Writer) -> None:
    wait_for(lambda: not writer.busy)


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    for step, best in ((1, 1), (2, 1), (3, 3), (4, 3), (5, 3)):
        save(tmp_path, step, best, keep)
    assert names(tmp_path) == {"last", "best", *(f"step_{step:08d}" for step in kept)}
    assert (value(tmp_path / "best"), value(tmp_path / "last")) == (3, 5)


def test_later_changes_do_not_reach_a_checkpoint(tmp_path: Path) -> None:
    """Training continues while a checkpoint is written."""
    weights = torch.ones(1000)
    copy = checkpoint.on_host({"a": [weights, {"b": weights}], "c": 1, "d": (2, None)})
    weights.add_(1)
    assert copy["a"][0].sum() == copy["a"][1]["b"].sum() == 1000
    assert (copy["c"], copy["d"]) == (1, [2, None])


def test_several_ranks_write_one_checkpoint(tmp_path: Path) -> None:
    """It gets its name when the last file of the last rank is written, in any order of ranks."""
    first, second = (saver.Writer(tmp_path, leads, 2) for leads in (True, False))
    files = states(7)
    theirs = {"branch_03.pt": files.pop("branch_03.pt")}
    first.start(7, files, FILES)
    time.sleep(0.2)
    assert first.busy
    assert checkpoint.latest(tmp_path) is None
    second.start(7, theirs, FILES)
    wait(first)
    assert value(tmp_path / "last") == 7


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("dies_in", ["fsync", "replace", "rename"])
def test_a_kill_while_writing_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    save(tmp_path, 1, best=1)

    def die(*_: object) -> None:
        raise SystemExit  # ends the writer's thread at this point

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", die) if dies_in == "fsync" else patch.setattr(Path, dies_in, die)
        save(tmp_path, 2, best=2)
    assert value(tmp_path / "last") == 1
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000001"
    checkpoint.set_aside_unused(tmp_path, tmp_path / "step_00000001")
    assert names(tmp_path) == {"step_00000001", "last", "best", "set_aside"}
    save(tmp_path, 3, best=3)
    assert value(tmp_path / "best") == 3


@pytest.mark.parametrize("seed", range(20))
def test_damage_anywhere_is_found_and_the_one_before_is_used(tmp_path: Path, seed: int) -> None:
    """A flipped byte, a truncated file or a missing file, at random positions."""
    chance = random.Random(seed)
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / "step_00000002" / chance.choice(FILES)
    content = bytearray(path.read_bytes())
    kind = ("flip", "cut", "remove")[seed % 3]
    if kind == "flip":  # within a record: padding between records has no meaning
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
    found = files_in(tmp_path / "step_00000002")
    checkpoint.set_aside_unused(tmp_path, tmp_path / "step_00000001")
    assert checkpoint.saved(tmp_path) == [tmp_path / "step_00000001"]
    assert files_in(tmp_path / "set_aside/step_00000002") == found
    assert value(tmp_path / "last") == 1


def test_if_all_are_damaged_the_run_does_not_silently_start_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step_00000001/branch_00.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.latest(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_reported_and_leaves_the_last_good_one(small_disk: Path) -> None:
    assert save(small_disk, 1).error is None
    (small_disk / "filler").write_bytes(b"0" * (shutil.disk_usage(small_disk).free - 20_000))
    writer = save(small_disk, 2)
    writer.give_up()
    error = writer.error
    assert error is not None
    assert error.one_rank
    assert "the checkpoint of step 2 cannot be written: [Errno 28] No space left on device" in str(error)
    assert "the last good one is step_00000001" in str(error)
    assert checkpoint.latest(small_disk) == small_disk / "step_00000001"
    assert names(small_disk) == {"step_00000001", "last", "filler"}


def test_a_folder_that_is_gone_is_reported(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("seed", range(4))
def test_damaged_bytes_are_damage_whatever_error_they_cause(tmp_path: Path, seed: int) -> None:
    """Python's zipfile raises nine kinds of errors for damaged bytes, including OSError."""
    chance = random.Random(seed)
    save(tmp_path, 1)
    path = tmp_path / "step_00000001/stream_00.pt"
    good = path.read_bytes()
    for _ in range(250):
        content = bytearray(good)
        for _ in range(chance.choice((1, 2, 8))):
            content[-1 - chance.randrange(min(600, len(content)))] = chance.randrange(256)
        path.write_bytes(content)
        wrong = checkpoint.damage(tmp_path / "step_00000001")
        assert wrong is None or wrong.startswith("stream_00.pt: ")


def fails_once(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Opening a file of this name fails once, as on a network disk with a short interruption."""
    real, failed = zipfile.ZipFile.__init__, []

    def init(self: zipfile.ZipFile, file: object, *arguments: object, **keys: object) -> None:
        if str(file).endswith(name) and not failed:
            failed.append(file)
            raise OSError(number, os.strerror(number), str(file))
        real(self, file, *arguments, **keys)  # type: ignore[arg-type]

    monkeypatch.setattr(zipfile.ZipFile, "__init__", init)


@pytest.mark.parametrize("name", ["step_00000002/run.pt", "step_00000002/branch_03.pt"])
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_an_error_of_the_disk_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    before = files_in(tmp_path)
    fails_once(monkeypatch, name, number)
    message = f"{name}: cannot be read: {os.strerror(number)}. Nothing was changed"
    with pytest.raises(UserError, match=message) as told:
        checkpoint.latest(tmp_path)
    assert told.value.one_rank
    assert files_in(tmp_path) == before
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000002"


def test_a_folder_that_cannot_be_read_is_not_treated_as_empty(tmp_path: Path) -> None:
    """Otherwise a new run would replace the existing one."""
    save(tmp_path, 1)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(UserError, match="loop: cannot be read: .*Too many levels of symbolic links"):
        checkpoint.latest(loop)
    with pytest.raises(UserError, match="loop/run.pt: cannot be read: .*Too many levels of symbolic links"):
        checkpoint.read(loop, "run.pt")
    assert checkpoint.latest(tmp_path / "none") is None


@pytest.mark.parametrize("copied", ["as folders", "not at all", "as text"])
def test_a_copy_without_links(tmp_path: Path, copied: str) -> None:
    """`scp -r` turns links into folders, object storage drops them, some archives turn them into files."""
    run, copy = tmp_path / "run", tmp_path / "copy"
    run.mkdir()
    for step, best in ((1, 1), (2, 1), (3, 1)):
        save(run, step, best)
    shutil.copytree(run, copy)
    if copied != "as folders":
        for name in ("last", "best"):
            shutil.rmtree(copy / name)
            if copied == "as text":
                (copy / name).write_text("step_00000001")
    assert checkpoint.find(copy, "last") == copy / "step_00000003"
    assert checkpoint.find(copy, "best") == copy / "step_00000001"
    assert save(copy, 4, best=1).error is None
    assert {path.name for path in checkpoint.saved(copy)} == {"step_00000001", "step_00000003", "step_00000004"}
    assert (value(copy / "best"), value(copy / "last")) == (1, 4)
    assert (copy / "set_aside").exists() == (copied != "not at all")
    if copied == "as folders":
        assert (value(copy / "set_aside/best"), value(copy / "set_aside/last")) == (1, 3)


def test_a_file_system_without_links_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    for step in (1, 2, 3):
        assert save(tmp_path, step, best=1).error is None
    assert names(tmp_path) == {"step_00000001", "step_00000002", "step_00000003"}
    assert checkpoint.find(tmp_path, "best") == tmp_path / "step_00000001"


def test_each_kept_checkpoint_keeps_its_best_one(tmp_path: Path) -> None:
    """So that a run can go back to the second to last without losing the best."""
    for step, best in ((1, 1), (2, 1), (3, 3)):
        save(tmp_path, step, best)
    assert len(checkpoint.saved(tmp_path)) == 3
    (tmp_path / "step_00000003/run.pt").write_bytes(b"nothing")
    assert checkpoint.find(tmp_path, "last") == tmp_path / "step_00000002"
    assert checkpoint.find(tmp_path, "best") == tmp_path / "step_00000001"


def test_a_checkpoint_that_cannot_be_removed_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS, a folder with a file that is still open is not empty and cannot be removed."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    for step in (1, 2, 3):
        assert save(tmp_path, step, keep=1).error is None
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000003"


def test_a_missing_checkpoint_is_reported_with_the_existing_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint yet"):
        checkpoint.find(tmp_path, "last")
    with pytest.raises(UserError, match="no best checkpoint.*there are none yet"):
        checkpoint.find(tmp_path, "best")
    save(tmp_path, 1)
    save(tmp_path, 2)
    with pytest.raises(UserError, match="no checkpoint of step 7; there are those of steps 1, 2"):
        checkpoint.find(tmp_path, "7")
    with pytest.raises(UserError, match="no best checkpoint, since no validation so far had a finite loss; there are"):
        checkpoint.find(tmp_path, "best")
    with pytest.raises(UserError, match="'newest' given; allowed: best, last or a step; there are those of steps 1, 2"):
        checkpoint.find(tmp_path, "newest")
    (tmp_path / "step_00000002/branch_03.pt").unlink()
    with pytest.raises(UserError, match="step_00000002: this checkpoint is damaged: branch_03.pt is missing"):
        checkpoint.find(tmp_path, "2")


def test_what_is_set_aside_twice_has_two_names(tmp_path: Path) -> None:
    for content in (b"first", b"second", b"third"):
        (tmp_path / ".step_00000005").mkdir()
        (tmp_path / ".step_00000005/branch_00.pt").write_bytes(content)
        checkpoint.set_aside_unused(tmp_path, None)
    assert files_in(tmp_path / "set_aside") == {
        "step_00000005/branch_00.pt": b"first",
        "step_00000005.2/branch_00.pt": b"second",
        "step_00000005.3/branch_00.pt": b"third",
    }


@pytest.mark.parametrize(("found", "by"), [(None, "an earlier"), (1, "an earlier"), (3, "a later")])
def test_another_format_is_refused_and_not_taken_for_damage(tmp_path: Path, found: int | None, by: str) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / "step_00000002/run.pt"
    run = torch.load(path)
    torch.save({**run, "format": found} if found is not None else {"branches": [0]}, path)
    with pytest.raises(UserError, match=f"this checkpoint has format {found}, written by {by} version"):
        checkpoint.latest(tmp_path)
    with pytest.raises(UserError, match=f"this checkpoint has format {found}, written by {by} version"):
        checkpoint.find(tmp_path, "2")


def test_a_rank_that_cannot_write_leaves_the_files_of_the_others(tmp_path: Path) -> None:
    first, second = (saver.Writer(tmp_path, leads, 2) for leads in (True, False))
    files = states(7)
    theirs = {"branch_03.pt": files.pop("branch_03.pt")}
    first.start(7, files, FILES)
    wait_for(lambda: all((tmp_path / f".step_00000007/{name}").exists() for name in files))
    (tmp_path / ".step_00000007/.branch_03.pt").mkdir()  # in place of a file that the second rank writes
    second.start(7, theirs, FILES)
    wait(second)
    assert "Is a directory" in str(second.error)
    assert names(tmp_path / ".step_00000007") >= set(files)
    assert first.busy
    (tmp_path / ".step_00000007/.branch_03.pt").rmdir()
    second.give_up()
    assert names(tmp_path / ".step_00000007") == set(files)
    first.give_up()
    assert not names(tmp_path)


def test_a_checkpoint_being_written_is_completed_before_the_end(tmp_path: Path) -> None:
    writer = saver.Writer(tmp_path, leads=True, keep=2)
    writer.start(3, states(3), FILES)
    writer.finish()
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000003"
