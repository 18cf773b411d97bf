"""The images of a data set, and every way in which its folders can be wrong."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from loguru import logger

from bandsplit.config import loading, schema
from bandsplit.data import check, images, index, loader
from bandsplit.data.folders import walk
from bandsplit.data.images import ImageFiles
from bandsplit.distributed.ranks import Ranks
from bandsplit.errors import UserError
from tests.conftest import REPOSITORY, TRAIN_PER_CLASS, VAL_PER_CLASS, Done, image_files


def data(root: Path, **keys: object) -> schema.Data:
    return schema.Data.model_validate({"name": "d", "root": str(root), "classes": 10, **keys})


def open_data(config: schema.Data, *parts: str) -> list[ImageFiles]:
    """What a training in one process opens."""
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"))
    whole = loading.load(REPOSITORY / "config/train/demo.toml").model_copy(update={"data": config})
    return list(loader.open_data(whole, ranks, parts or ("train", "val")).values())


@pytest.fixture
def copy(image_root: Path, tmp_path: Path) -> Path:
    """A data set that a test may break."""
    return Path(shutil.copytree(image_root, tmp_path / "copy"))


@pytest.mark.parametrize("labels", [["000", "001", "010"], ["0", "1", "10"], ["00", "n01", "10"]])
def test_numbers_of_classes_may_have_leading_zeros(labels: list[str]) -> None:
    """As `prepare flat` writes them; a class name that looks like a number stays a name."""
    classes = [f"n{number:02d}" for number in range(11)]
    files = ImageFiles(["a", "b", "c"], [0, 1, 2], labels)
    assert np.asarray(files.renumbered(classes, "run", "here", numbers=True).labels).tolist() == [0, 1, 10]
    named = ImageFiles(["a", "b", "c"], [0, 1, 2], ["010", "1", "002"])
    assert np.asarray(named.renumbered(["010", *classes], "run", "here", numbers=True).labels).tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="here: the classes are not those that run was trained on: .*new 0011"):
        ImageFiles(["a"], [0], ["0011"]).renumbered(classes, "run", "here", numbers=True)


def test_images_without_any_label_are_refused() -> None:
    """As in the list of a test set."""
    with pytest.raises(UserError, match="here: none of the 2 images has a label"):
        ImageFiles(["a", "b"], [0, 1], ["", ";"]).renumbered(["cat", "dog"], "run", "here")


def test_files_and_labels_are_sorted_and_complete(image_root: Path) -> None:
    train, val = open_data(data(image_root))
    assert (len(train), len(val)) == (10 * TRAIN_PER_CLASS, 10 * VAL_PER_CLASS)
    assert train.classes == val.classes == sorted(p.name for p in (image_root / "train").iterdir())
    assert [Path(file).parent.name for file in val.paths] == [val.classes[label] for label in val.labels]
    assert list(val.paths) == sorted(map(str, (image_root / "val").rglob("*.jpg")))


def test_suffixes_in_any_case_count_and_other_files_do_not(copy: Path) -> None:
    folder = min((copy / "val").iterdir())
    files = sorted(folder.iterdir())
    files[0].rename(folder / "a.JPEG")
    files[1].rename(folder / "b.JpG")
    (folder / "notes.txt").write_text("not an image")
    (copy / "val" / "readme.txt").write_text("not a class")
    assert len(image_files(copy / "val")) == 10 * VAL_PER_CLASS


def test_what_is_no_image_is_passed_over_and_counted(copy: Path) -> None:
    """AppleDouble files, folders of notebooks and NAS devices, notes, broken and circular links."""
    folder = min((copy / "val").iterdir())
    (folder / "._00000.jpg").write_bytes(b"\0\5\26\7")
    (copy / "val" / ".ipynb_checkpoints").mkdir()
    shutil.copy(folder / "00000.jpg", copy / "val" / ".ipynb_checkpoints")
    (folder / "@eaDir").mkdir()
    shutil.copy(folder / "00000.jpg", folder / "@eaDir")
    (folder / "notes.txt").write_text("no image")
    (folder / "gone.jpg").symlink_to(copy / "nowhere.jpg")
    (folder / "loop").symlink_to(folder)
    found = walk(copy / "val")
    assert (len(found.names), len(found.classes)) == (10 * VAL_PER_CLASS, 10)
    assert any(told.startswith("3 hidden, such as ") for told in found.passed_over)
    assert found.passed_over == (
        f"1 broken links or special files, such as '{folder.name}/gone.jpg'",
        # an entry that is hidden is not entered
        *(told for told in found.passed_over if told.startswith("3 hidden, such as ")),
        f"1 links to a folder above, such as '{folder.name}/loop'",
        f"1 of another type, such as '{folder.name}/notes.txt'",
    )


def test_classes_are_walked_to_their_bottom_and_a_folder_may_have_the_name_of_an_image(copy: Path) -> None:
    folder = min((copy / "val").iterdir())
    before = image_files(copy / "val")
    deep = folder / "x.jpg" / "deeper"
    deep.mkdir(parents=True)
    (folder / "00000.jpg").rename(deep / "00000.jpg")
    found = image_files(copy / "val")
    assert list(found.labels) == list(before.labels)
    assert str(deep / "00000.jpg") in found.paths
    assert walk(copy / "val").passed_over == ()


def test_validation_alone_needs_no_training_images(copy: Path) -> None:
    whole = open_data(data(copy))[1]
    shutil.rmtree(copy / "train")
    (alone,) = open_data(data(copy), "val")
    assert list(alone.paths) == list(whole.paths)
    assert alone.digest == whole.digest


def test_root_takes_variables(image_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PICTURES", str(image_root))
    assert len(open_data(data(Path("$PICTURES")))[1]) == 10 * VAL_PER_CLASS
    monkeypatch.delenv("PICTURES")
    with pytest.raises(UserError, match=r"data.root: '\$PICTURES' given, but the variable is not set"):
        open_data(data(Path("$PICTURES")))


def test_missing_and_empty_folders_are_named(copy: Path) -> None:
    with pytest.raises(UserError, match="data.root: .*/nowhere: no such folder"):
        open_data(data(copy / "nowhere"))
    empty = min((copy / "train").iterdir())
    shutil.rmtree(empty)
    empty.mkdir()
    with pytest.raises(UserError, match=f"{empty}: no images in this class folder"):
        open_data(data(copy))
    shutil.rmtree(copy / "train")
    with pytest.raises(UserError, match=f"{copy}/train: no such folder"):
        open_data(data(copy))
    (copy / "train").mkdir()
    with pytest.raises(UserError, match=f"{copy}/train: no class folders"):
        open_data(data(copy))


def test_classes_have_to_agree(copy: Path) -> None:
    with pytest.raises(UserError, match="data.classes: 9 given, but .*/train has 10 classes: disc_checkered, .*"):
        open_data(data(copy, classes=9))
    gone = min((copy / "val").iterdir())
    shutil.rmtree(gone)
    with pytest.raises(UserError, match=f"train and val differ in the class folders {gone.name}"):
        open_data(data(copy))


def test_a_part_without_a_good_image_is_refused_and_a_class_without_one_is_named(copy: Path) -> None:
    lines: list[str] = []
    sink = logger.add(lines.append, format="{message}")
    config = data(copy, check="headers")
    folder = min((copy / "val").iterdir())
    for file in folder.iterdir():
        file.write_bytes(b"no image")
    assert len(open_data(config)[1]) == 9 * VAL_PER_CLASS
    logger.remove(sink)
    assert f"val: no image is left of 1 of 10 classes: {folder.name}\n" in lines
    for file in (copy / "val").rglob("*.jpg"):
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match=rf"none of the {10 * VAL_PER_CLASS} images in val can be .*: not an image of"):
        open_data(config)
    for part, above in (("train", ""), ("val", "elsewhere/")):
        names = [str(path.relative_to(copy)) for path in sorted((copy / part).rglob("*.jpg"))]
        (copy / f"{part}.txt").write_text("".join(f"{above}{name} {Path(name).parent.name}\n" for name in names))
    with pytest.raises(UserError, match=r"none of the 50 images in val.txt .*'elsewhere/val/.*: no such file"):
        open_data(data(copy, check="headers", layout="list", train="train.txt", val="val.txt"))


def test_an_index_beside_data_that_cannot_be_written_any_more_is_used(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also that of so many images that they are not looked at one by one."""
    config = data(copy, check="headers")
    for folder in (copy / "train", copy / "val"):
        for each in (folder, *folder.iterdir()):
            os.utime(each, (1_700_000_000, 1_700_000_000))
    before = open_data(config)
    monkeypatch.setenv("BANDSPLIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    monkeypatch.setattr(check, "examine", None)
    monkeypatch.setattr(index, "_MANY", 0)
    assert [files.digest for files in open_data(config)] == [files.digest for files in before]
    assert [found.digest for found in images.scan(config).values()] == [files.digest for files in before]
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(index, "_MANY", 1000)
    for _ in range(2):
        assert [files.digest for files in open_data(config)] == [files.digest for files in before]
        shutil.rmtree(copy / ".bandsplit", ignore_errors=True)  # the cache has it now


def test_a_copy_of_an_index_says_nothing_of_the_images_beside_it(copy: Path) -> None:
    """As on a node to whose disk a data set was copied, with its index, but not all of its images."""
    config = data(copy, check="headers")
    place = images._examined(config, ["val"])["val"]
    files = images.read_part(config, "val", place)
    assert files is not None
    assert files.digest == place.opened().digest
    Path(shutil.copy2(place.path, copy / "copied")).replace(place.path)
    assert images.read_part(config, "val", place) is None
    Path(files.paths[0]).unlink()
    assert images._examined(config, ["val"])["val"].digest != place.digest


def test_parts_of_nearly_the_same_name_have_their_own_images(copy: Path) -> None:
    (copy / "a").mkdir()
    (copy / "train").rename(copy / "a/b")
    (copy / "val").rename(copy / "a_b")
    files = images.open_here(data(copy, check="headers", train="a/b", val="a_b"))
    assert [len(each) for each in files.values()] == [10 * TRAIN_PER_CLASS, 10 * VAL_PER_CLASS]
    assert all(Path(file).is_file() for each in files.values() for file in each.paths)


def test_an_index_that_is_not_the_same_any_more_is_refused(copy: Path) -> None:
    """Changed or removed between the examination and the opening."""
    places = images._examined(data(copy, check="headers"), ["train", "val"])
    shutil.copy(places["train"].path, places["val"].path)
    with pytest.raises(UserError, match=r"val\.arrow: this index of the images in .*/val cannot be read any more, or"):
        places["val"].opened()
    places["train"].path.unlink()
    with pytest.raises(UserError, match=r"train\.arrow: this index .*; start again"):
        places["train"].opened()


def test_images_are_generated_once_where_the_config_says_how(tmp_path: Path) -> None:
    config = data(tmp_path / "made", generate={"seed": 3, "train_per_class": 2, "val_per_class": 1})
    with pytest.raises(UserError, match="no such folder"):
        images.find(config, ("train", "val"), generate=False)
    train, val = open_data(config)
    before = {file: Path(file).stat().st_mtime_ns for file in train.paths}
    assert (len(train), len(val)) == (20, 10)
    lock = tmp_path / ".made.lock"
    lock.unlink(missing_ok=True)
    lock.mkdir()  # stands for a folder that cannot be written to any more
    assert {file: Path(file).stat().st_mtime_ns for file in open_data(config)[0].paths} == before


def test_a_relative_root_is_told_with_the_folder_that_it_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = rf"data.root: {tmp_path}/a/b: no such folder \('a/b' is relative to the working directory\); point to the"
    with pytest.raises(UserError, match=message):
        open_data(data(Path("a/b")))
    with pytest.raises(UserError, match=f"data.root: {tmp_path}/nowhere: no such folder; point to the data set"):
        open_data(data(tmp_path / "nowhere"))


def test_a_home_that_is_not_known() -> None:
    with pytest.raises(UserError, match="data.root: '~nobodyknows/x' given, but ~nobodyknows has no home folder here"):
        open_data(data(Path("~nobodyknows/x")))


OPEN = """
import sys
from bandsplit.config.schema import Data
from bandsplit.data.images import find
try:
    find(Data(name="d", root=sys.argv[1], classes=10), ("train", "val"))
except ValueError as error:
    print(repr(error))
"""


@pytest.mark.parametrize(("folder", "named"), [("", "train"), ("train", "train"), ("val/ring_striped",) * 2])
def test_a_folder_that_cannot_be_read_is_named(
    copy: Path, unprivileged: Callable[..., Done], folder: str, named: str
) -> None:
    """Of a root without permission, the first folder in it: the root itself can be seen."""
    (copy / folder).chmod(0)
    done = unprivileged("-c", OPEN, copy)
    (copy / folder).chmod(0o755)
    assert done.stdout == f"UserError('{copy / named}: cannot be read: Permission denied')\n", done.stderr


@pytest.mark.slow
def test_a_training_whose_images_cannot_be_read_ends_with_one_message(
    copy: Path, config_file: Path, unprivileged: Callable[..., Done]
) -> None:
    folder, run_dir = copy / "train/disc_striped", config_file.with_name("run")
    folder.chmod(0)
    here = f"data.root={copy}"
    done = unprivileged(REPOSITORY / "src/train.py", config_file, "--set", here, "--run-dir", run_dir)
    folder.chmod(0o755)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: {folder}: cannot be read: Permission denied"
    assert "Traceback" not in done.stderr
    assert not run_dir.exists()
