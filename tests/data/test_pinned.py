"""A run knows its images: what it resumes on is compared with what it began with."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from loguru import logger

from bandsplit.config import loading
from bandsplit.config.schema import RunConfig
from bandsplit.data import loader, pinned
from bandsplit.data.images import ImageFiles
from bandsplit.distributed.ranks import Ranks
from bandsplit.errors import UserError


@pytest.fixture
def config(image_root: Path, config_file: Path, tmp_path: Path) -> RunConfig:
    """Of a copy of the data that a test may change; contents are read, but not decoded."""
    root = shutil.copytree(image_root, tmp_path / "copy")
    return loading.load(config_file, [f"data.root={root}", "data.check=headers"])


@pytest.fixture
def log() -> Iterator[list[str]]:
    lines: list[str] = []
    sink = logger.add(lines.append, format="{message}")
    yield lines
    logger.remove(sink)


def opened(config: RunConfig) -> dict[str, ImageFiles]:
    return loader.open_data(config, Ranks(0, 1, 0, 1, torch.device("cpu")))


def began(config: RunConfig, run: Path) -> dict[str, ImageFiles]:
    run.mkdir()
    files = opened(config)
    pinned.keep(run / "data", files)
    return files


def train(config: RunConfig) -> list[Path]:
    return sorted(Path(config.data.root, "train").rglob("*.jpg"))


def test_the_same_images_are_the_same(config: RunConfig, tmp_path: Path) -> None:
    before = began(config, tmp_path / "run")
    elsewhere = config.model_copy(
        update={"data": config.data.model_copy(update={"root": shutil.copytree(config.data.root, tmp_path / "moved")})}
    )
    after = pinned.as_began(tmp_path / "run/data", opened(elsewhere), elsewhere.data)
    for part, files in before.items():
        assert after[part].digest == files.digest
        assert [Path(p).name for p in after[part].paths] == [Path(p).name for p in files.paths]
        assert str(tmp_path / "moved") in after[part].paths[0]


def gone(files: list[Path]) -> str:
    files[7].unlink()
    return f"1 gone (such as '{files[7].parent.name}/{files[7].name}')"


def new(files: list[Path]) -> str:
    shutil.copy(files[7], files[9].with_name("zz.jpg"))
    return f"1 new (such as '{files[9].parent.name}/zz.jpg')"


def other_content(files: list[Path]) -> str:
    shutil.copy(files[30], files[31])
    return f"1 changed (such as '{files[31].parent.name}/{files[31].name}')"


def damaged(files: list[Path]) -> str:
    files[31].write_bytes(b"x" * files[31].stat().st_size)
    return f"1 changed (such as '{files[31].parent.name}/{files[31].name}')"


def other_class(files: list[Path]) -> str:
    moved = files[7].rename(files[-1].with_name("moved.jpg"))
    names = [f"{file.parent.name}/{file.name}" for file in (files[7], moved)]
    return "1 gone (such as '{}'), 1 new (such as '{}')".format(*names)


@pytest.mark.parametrize("change", [gone, new, other_content, damaged, other_class])
def test_few_differences_are_told_and_the_run_keeps_its_list(
    config: RunConfig, tmp_path: Path, change: Callable[[list[Path]], str], log: list[str]
) -> None:
    before = began(config, tmp_path / "run")
    told = change(train(config))
    after = pinned.as_began(tmp_path / "run/data", opened(config), config.data)
    assert any(f"train: {told} since the run began" in line for line in log), log
    assert list(after["train"].paths) == list(before["train"].paths)
    assert list(after["train"].labels) == list(before["train"].labels)
    assert after["train"].digest == before["train"].digest
    for key, value in (("max_bad", 0), ("on_bad", "error")):
        strict = config.data.model_copy(update={key: value})
        with pytest.raises(UserError) as raised:
            pinned.as_began(tmp_path / "run/data", opened(config), strict)
        assert told in str(raised.value)


@pytest.mark.parametrize("mended", [True, False])
def test_what_was_left_out_may_be_mended_or_removed(
    config: RunConfig, tmp_path: Path, mended: bool, log: list[str]
) -> None:
    bad, good = train(config)[30:32]
    bad.write_bytes(b"no image")
    before = began(config, tmp_path / "run")
    log.clear()
    if mended:
        shutil.copy(good, bad)
    else:
        bad.unlink()
    after = pinned.as_began(tmp_path / "run/data", opened(config), config.data)
    assert list(after["train"].paths) == list(before["train"].paths)
    (told,) = log
    assert told.startswith("train: images that the run began without have been removed or repaired")


def test_many_differences_are_refused(config: RunConfig, tmp_path: Path) -> None:
    began(config, tmp_path / "run")
    for file in train(config)[::9]:
        file.unlink()
    with pytest.raises(UserError, match=r"142 images in train, not the 160 that .*/run began with: 18 gone \(such as"):
        pinned.as_began(tmp_path / "run/data", opened(config), config.data)


def test_other_classes_are_told_by_name(config: RunConfig, tmp_path: Path) -> None:
    began(config, tmp_path / "run")
    for part in ("train", "val"):
        folder = Path(config.data.root, part, "disc_striped")
        folder.rename(folder.with_name("zebra"))
    with pytest.raises(UserError, match="classes are not those .*: missing disc_striped; new zebra"):
        pinned.as_began(tmp_path / "run/data", opened(config), config.data)


def test_without_checksums_sizes_decide(config: RunConfig, tmp_path: Path) -> None:
    unchecked = config.model_copy(update={"data": config.data.model_copy(update={"check": "off"})})
    began(unchecked, tmp_path / "run")
    after = pinned.as_began(tmp_path / "run/data", opened(config), config.data)
    assert len(after["train"]) == 160
