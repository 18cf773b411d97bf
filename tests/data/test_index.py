"""The index of a data set: what it holds, that each file is examined once, and that it survives interruptions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest
from PIL import Image

from bandsplit import paths
from bandsplit.data import check, index
from bandsplit.data.folders import Found, walk
from bandsplit.data.index import Index

T = TypeVar("T")


def finish(work: Generator[None, None, T]) -> T:
    while True:
        try:
            next(work)
        except StopIteration as stop:
            value: T = stop.value
            return value


@pytest.fixture
def folder(image_root: Path, tmp_path: Path) -> Path:
    """50 images of ten classes, one of them damaged."""
    folder = Path(shutil.copytree(image_root / "val", tmp_path / "val"))
    (min(folder.iterdir()) / "00001.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are examined."""
    seen: list[str] = []
    real = check.examine

    def examine(files: Any, *arguments: Any, **options: Any) -> Any:
        listed = list(files)
        seen.extend(listed)
        return real(listed, *arguments, **options)

    monkeypatch.setattr(check, "examine", examine)
    return seen


def refresh(folder: Path, level: str = "decode") -> Index:
    return finish(index.refresh(walk(folder), index.place(folder.parent, "val"), level, "checking"))


def test_an_index_says_what_files_are(folder: Path) -> None:
    found = refresh(folder)
    assert len(found) == 50
    (bad,) = found.bad()
    assert bad == (f"{min(folder.iterdir()).name}/00001.jpg", "not an image of a known format")
    theirs = pyarrow.feather.read_table(index.place(folder.parent, "val")).to_pandas()
    for row in theirs[theirs["reason"] == ""].itertuples():
        path = folder / os.fsdecode(row.name)
        with Image.open(path) as image:
            mode = {"RGB": "rgb", "L": "gray"}[image.mode]
            assert (row.width, row.height, row.format, row.color) == (*image.size, "jpeg", mode)
        assert row.bytes == path.stat().st_size
        assert path.parent.name == found.classes[row.label]
    assert theirs["checksum"].nunique() == 50


def test_a_file_is_examined_once_and_again_when_it_changes(folder: Path, examined: list[str]) -> None:
    first = refresh(folder)
    assert len(examined) == 50
    assert refresh(folder).digest == first.digest
    assert len(examined) == 50
    files = sorted(folder.rglob("*.jpg"))
    shutil.copy(files[10], files[1])  # mended
    files[20].unlink()
    shutil.copy(files[30], files[30].with_name("new.jpg"))
    os.utime(files[40])
    examined.clear()
    second = refresh(folder)
    assert sorted(examined) == sorted(map(str, (files[1], files[30].with_name("new.jpg"), files[40])))
    assert (len(second), second.bad()) == (50, [])
    assert second.digest != first.digest


def test_deeper_examinations_are_done_once_more_and_shallower_ones_not(folder: Path, examined: list[str]) -> None:
    assert refresh(folder, "off").bad() == []
    assert examined == []
    assert len(refresh(folder, "headers").bad()) == 1
    assert len(refresh(folder, "decode").bad()) == 1
    assert len(examined) == 100
    refresh(folder, "headers")
    refresh(folder, "off")
    assert len(examined) == 100


def test_digests_do_not_depend_on_the_place_and_time_but_on_names_classes_sizes_and_what_is_left_out(
    folder: Path,
) -> None:
    first = refresh(folder)
    elsewhere = Path(shutil.copytree(folder, folder.parent / "elsewhere/val"))
    assert refresh(elsewhere).digest == first.digest
    assert refresh(Path(shutil.copytree(folder, folder.parent / "unchecked/val")), "off").digest != first.digest
    seen = {first.digest}
    for change in (
        lambda files: files[0].rename(files[0].with_name("other.jpg")),
        lambda files: files[3].rename(files[-1].with_name("moved.jpg")),
        lambda files: files[5].write_bytes(files[5].read_bytes() + b" "),
    ):
        change(sorted(elsewhere.rglob("*.jpg")))
        seen.add(refresh(elsewhere).digest)
    assert len(seen) == 4


def test_an_interrupted_scan_continues(folder: Path, examined: list[str]) -> None:
    work = index.refresh(walk(folder), index.place(folder.parent, "val"), "decode", "checking")
    for _ in range(21):
        next(work)
    work.close()
    examined.clear()
    found = refresh(folder)
    assert len(examined) == 50 - 21
    assert len(found.bad()) == 1


def test_a_file_that_could_not_be_read_is_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the disk or of permissions says nothing about the content, which keeps size and time."""
    real, bad = check.examine, min(folder.iterdir()) / "00002.jpg"

    def failing(files: Any, *arguments: Any, **options: Any) -> Any:
        files = list(files)
        for path, verdict in zip(files, real(files, *arguments, **options), strict=True):
            yield check.Verdict(reason="input/output error") if path == str(bad) else verdict

    monkeypatch.setattr(check, "examine", failing)
    assert len(refresh(folder).bad()) == 2
    monkeypatch.setattr(check, "examine", real)
    assert len(refresh(folder).bad()) == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "version"])
def test_a_damaged_index_is_made_anew(folder: Path, examined: list[str], damage: str) -> None:
    first, path = refresh(folder), index.place(folder.parent, "val")
    content = path.read_bytes()
    damaged = {"cut": content[: len(content) // 2], "empty": b"", "text": b"x" * 1000}
    path.write_bytes(damaged.get(damage, content.replace(b'"version": 2', b'"version": 1')))
    assert refresh(folder).digest == first.digest
    assert len(examined) == 100


def test_an_index_lies_beside_the_data_or_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    assert index.place(tmp_path / "data", "train", 10) == tmp_path / "data/.bandsplit/train.arrow"
    odd = ("训练", "验证", "train+", "train=", "a/b", "a b", "a//b", "x" * 255, "x" * 254, "a_b")
    placed = [index.place(tmp_path / "data", part, 10) for part in odd]
    assert len(set(placed)) == len(odd)
    assert placed[-1].name == "a_b.arrow"
    monkeypatch.setenv("BANDSPLIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "other").write_text("no folder: nothing can be written beside it")
    places = [index.place(tmp_path / "other", part, 10) for part in ("train", "val")]
    assert [place.parent.parent for place in places] == [tmp_path / "cache/index"] * 2
    assert paths.cache_folder() == tmp_path / "cache"


def test_data_sets_and_parts_may_have_names_of_any_length(
    image_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the index is in the cache."""
    roots = [tmp_path / name for name in ("r" * 250, os.fsdecode("🐈".encode() * 63), "r" * 251)]
    for root in roots:
        shutil.copytree(min((image_root / "val").iterdir()), root / ("p" * 255) / "cat")
    monkeypatch.setenv("BANDSPLIT_CACHE", str(tmp_path / "cache"))
    for images in (1, 10**15):
        placed = [index.place(root, "p" * 255, images) for root in roots]
        for root, path in zip(roots, placed, strict=True):
            assert len(finish(index.refresh(walk(root / ("p" * 255)), path, "headers", "checking"))) == 5
            assert path.is_file()
        assert len(set(placed)) == 3


def test_folders_of_a_large_set_that_have_not_changed_are_not_walked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = min(folder.iterdir())
    assert index.unchanged(folder, folder.parent, "val", "decode") is None
    os.utime(first)
    refresh(folder)
    monkeypatch.setattr(index, "_MANY", 0)
    assert index.unchanged(folder, folder.parent, "val", "decode") is None  # one folder is too young to be trusted

    def settle() -> None:
        for each in (folder, *folder.iterdir()):
            os.utime(each, (1_700_000_000, 1_700_000_000))

    settle()
    digest = refresh(folder, "headers").digest
    known = index.unchanged(folder, folder.parent, "val", "decode")
    assert known is not None
    assert (known[0], known[1].digest) == (index.place(folder.parent, "val"), digest)
    for change in (first.joinpath("00001.jpg").unlink, (folder / "new").mkdir, first.joinpath("deeper").mkdir):
        change()
        assert index.unchanged(folder, folder.parent, "val", "headers") is None
        settle()
    first.rename(folder / "other")
    settle()
    assert index.unchanged(folder, folder.parent, "val", "headers") is None


def test_without_space_beside_the_data_the_index_lies_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BANDSPLIT_CACHE", str(tmp_path / "cache"))
    assert index.place(tmp_path, "train", 10**15).parent.parent == tmp_path / "cache/index"


def test_a_second_process_waits_for_the_first_and_examines_nothing(folder: Path, examined: list[str]) -> None:
    first, second = (
        index.refresh(walk(folder), index.place(folder.parent, "val"), "decode", "checking") for _ in range(2)
    )
    with ThreadPoolExecutor(1) as pool:
        next(first)
        waiting = pool.submit(finish, second)
        time.sleep(1.5)
        assert not waiting.done()
        assert len(finish(first)) == len(waiting.result()) == 50
    assert len(examined) == 50


def synthetic(count: int, classes: int = 10_450) -> Found:
    """As many files as ImageNet-21K has, which do not exist."""
    labels = np.sort(np.arange(count, dtype=np.int32) % classes)
    names = pa.array([b"n%08d/n%08d_%d.JPEG" % (k, k, i) for i, k in enumerate(labels.tolist())], pa.large_binary())
    sizes = np.full(count, 110_000, dtype=np.int64)
    return Found(Path("/data/train"), names, labels, sizes, sizes * 10**9, [f"n{k:08d}" for k in range(classes)])


OPEN = """
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from bandsplit.data import images, index
from bandsplit.data.images import Place
from bandsplit.data.order import TrainingOrder
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
files = images.ImageFiles.of(index.read(Path(sys.argv[1])), Path("/data/train"))
order = TrainingOrder(len(files), 256, seed=0, stream=3, streams=8)
names = [files.paths[i] for i in order.batch(len(files) // 2048).tolist()]
print(len(files), names[0], peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [1_300_000, pytest.param(14_200_000, marks=pytest.mark.long)])
def test_many_images_are_opened_in_little_memory(tmp_path: Path, count: int) -> None:
    """A rank holds at most 60 bytes per image, with what it has read of the mapped index."""
    facts = index._Facts(synthetic(count), None)
    facts._columns["checked"][:] = 2
    index.write(facts.index(), tmp_path / "train.arrow")
    del facts
    done = subprocess.run(
        [sys.executable, "-c", OPEN, tmp_path / "train.arrow"], capture_output=True, text=True, check=True
    )
    found, name, kib = done.stdout.split()
    assert int(found) == count
    assert name.startswith("/data/train/n0")
    assert int(kib) * 1024 < 60 * count + 100 * 2**20
