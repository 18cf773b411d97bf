"""The scan of the class folders, and every way in which folders can be wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bandsplit.config import schema
from bandsplit.data.images import open_data, scan
from bandsplit.errors import UserError
from tests.conftest import TRAIN_PER_CLASS, VAL_PER_CLASS


def data(root: Path, **keys: object) -> schema.Data:
    return schema.Data.model_validate({"name": "d", "root": str(root), "classes": 10, **keys})


@pytest.fixture
def copy(image_root: Path, tmp_path: Path) -> Path:
    """A data set that a test may break."""
    return Path(shutil.copytree(image_root, tmp_path / "copy"))


def test_files_and_labels_are_sorted_and_complete(image_root: Path) -> None:
    train, val = open_data(data(image_root))
    assert (len(train), len(val)) == (10 * TRAIN_PER_CLASS, 10 * VAL_PER_CLASS)
    assert train.classes == val.classes == sorted(p.name for p in (image_root / "train").iterdir())
    assert [Path(file).parent.name for file in val.paths] == [val.classes[label] for label in val.labels]
    assert val.paths == sorted(map(str, (image_root / "val").rglob("*.jpg")))


def test_suffixes_in_any_case_count_and_other_files_do_not(copy: Path) -> None:
    folder = min((copy / "val").iterdir())
    files = sorted(folder.iterdir())
    files[0].rename(folder / "a.JPEG")
    files[1].rename(folder / "b.JpG")
    (folder / "notes.txt").write_text("not a image")
    (copy / "val" / "readme.txt").write_text("not a class")
    assert len(scan(copy / "val")) == 10 * VAL_PER_CLASS


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
    with pytest.raises(UserError, match="data.classes: 9 given, but .*/train has 10 classes"):
        open_data(data(copy, classes=9))
    gone = min((copy / "val").iterdir())
    shutil.rmtree(gone)
    with pytest.raises(UserError, match=f"train and val differ in the class folders {gone.name}"):
        open_data(data(copy))


def test_images_are_generated_once_where_the_config_says_how(tmp_path: Path) -> None:
    config = data(tmp_path / "made", generate={"seed": 3, "train_per_class": 2, "val_per_class": 1})
    with pytest.raises(UserError, match="no such folder"):
        open_data(config, generate=False)
    train, val = open_data(config)
    before = {file: Path(file).stat().st_mtime_ns for file in train.paths}
    assert (len(train), len(val)) == (20, 10)
    assert {file: Path(file).stat().st_mtime_ns for file in open_data(config)[0].paths} == before
