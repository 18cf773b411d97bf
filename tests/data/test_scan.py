"""python src/data.py scan, and trainings on data as users have them."""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import ExifTags, Image

from tests.conftest import Done


@pytest.fixture
def root(image_root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(image_root, tmp_path / "copy"))


def test_a_scan_summarizes_the_data(config_file: Path, root: Path, run_here: Callable[..., Done]) -> None:
    files = sorted((root / "train").rglob("*.jpg"))
    files[0].write_bytes(b"")
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    for file in files[1:3]:
        Image.open(file).save(file, exif=turned)
    files[1].write_bytes(files[1].read_bytes()[:-200])
    shutil.copy(files[20], files[21])
    shutil.copy(files[50], root / "val" / files[50].parent.name / "leak.jpg")
    Image.open(files[60]).convert("CMYK").save(files[60])
    (root / "train" / "notes.txt").touch()
    (files[0].parent / "x.docx").touch()
    output = config_file.with_name("bad.csv")
    done = run_here("data.py", "scan", config_file, "--set", f"data.root={root}", "--output", output)
    assert done.returncode == 0, done.stderr
    for text in (
        f"train: 158 images, {sum(file.stat().st_size for file in files[2:]) / 2**20:.1f} MiB",
        "passed over   2 of another type, such as 'notes.txt'",
        "left out      2",
        "classes       10, with 14 to 16 images, median 16",
        "cmyk 1",
        "EXIF          1 images ask to be rotated",
        "'disc_checkered/00000.jpg': empty file",
        "'disc_checkered/00001.jpg': truncated: no end marker",
        "val: 51 images",
        "duplicates in train: 1 contents",
        "duplicates in train and val: 1 contents",
    ):
        assert text in done.stdout, done.stdout
    with output.open() as file:
        assert [(row["part"], row["reason"]) for row in csv.DictReader(file)] == [
            ("train", "empty file"),
            ("train", "truncated: no end marker"),
        ]


def test_a_scan_of_validation_images_alone(config_file: Path, root: Path, run_here: Callable[..., Done]) -> None:
    shutil.rmtree(root / "train")
    done = run_here("data.py", "scan", config_file, "--set", f"data.root={root}")
    assert done.stdout.startswith("val: 50 images")
    assert "duplicates: none" in done.stdout


def test_a_scan_that_cannot_begin_says_why(config_file: Path, tmp_path: Path, run_here: Callable[..., Done]) -> None:
    for arguments, message in (
        ((config_file, "--set", f"data.root={tmp_path}/nowhere"), "nowhere: no such folder"),
        ((config_file, "--output", tmp_path / "no/x.csv"), f"there is no folder {tmp_path}/no"),
    ):
        done = run_here("data.py", "scan", *arguments)
        assert done.returncode == 2
        assert message in done.stderr


def test_bad_images_are_left_out_named_and_limited(
    config_file: Path, root: Path, run_here: Callable[..., Done]
) -> None:
    files = sorted((root / "train").rglob("*.jpg"))
    for file in files[::40]:
        file.write_bytes(b"no image")
    keys = ("--set", f"data.root={root}", "--run-dir", config_file.with_name("run"), "--set", "train.epochs=1")
    done = run_here("train.py", config_file, *keys, "--set", "data.max_bad=3")
    assert done.returncode == 2
    assert "4 of 210 images cannot be read or decoded, and data.max_bad = 3" in done.stderr
    assert f"'train/{files[40].parent.name}/{files[40].name}': not an image of a known format" in done.stderr
    assert not config_file.with_name("run").exists()
    done = run_here("train.py", config_file, *keys, "--set", "data.on_bad=error")
    assert done.returncode == 2
    assert 'data.on_bad = "error"' in done.stderr
    done = run_here("train.py", config_file, *keys)
    assert done.returncode == 0, done.stderr
    assert "train: left out 4 of 160 images" in done.stderr
    assert "156 training and 50 validation images" in done.stderr


@pytest.mark.slow
def test_lists_train_and_are_evaluated_as_the_folders_are(
    config_file: Path, root: Path, run_here: Callable[..., Done], tmp_path: Path
) -> None:
    """In the order of the folders the run is the same; validation in any order has the same accuracy."""
    for part in ("train", "val"):
        files = sorted((root / part).rglob("*.jpg"))
        named = {file: file if part == "train" else file.relative_to(root) for file in files}
        lines = [f"{name} {file.parent.name}" for file, name in named.items()]
        if part == "val":
            random.Random(0).shuffle(lines)
        (root / f"{part}.txt").write_text("\n".join(lines))
    lists = [f"--set=data.{key}" for key in ("layout=list", "train=train.txt", "val=val.txt", "check=headers")]
    common = ("--set", f"data.root={root}", "--set", "data.classes=none", "--set", "data.check=off")
    a, b = tmp_path / "folders", tmp_path / "lists"
    for run_dir, options in ((a, ()), (b, lists)):
        done = run_here("train.py", config_file, *common, *options, "--run-dir", run_dir)
        assert done.returncode == 0, done.stderr
    ends = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in (a, b)]
    assert ends[0]["top1"] == ends[1]["top1"]
    assert ends[0]["loss"] == pytest.approx(ends[1]["loss"], rel=1e-5)
    done = run_here("evaluate.py", b)
    assert f"top-1 {ends[0]['top1']:6.2f} %" in done.stdout


def test_evaluation_maps_classes_by_name(
    config_file: Path, root: Path, run_here: Callable[..., Done], tmp_path: Path
) -> None:
    """Validation images of some of the classes, whose numbers differ from those in training."""
    run_dir = tmp_path / "run"
    keys = ("--set", f"data.root={root}", "--set", "data.check=off", "--run-dir", run_dir)
    assert run_here("train.py", config_file, *keys).returncode == 0
    whole = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    right = 0.0
    for half in (slice(0, 5), slice(5, 10)):
        part = tmp_path / f"half{half.start}"
        for folder in sorted((root / "val").iterdir())[half]:
            shutil.copytree(folder, part / "val" / folder.name)
        output = tmp_path / "out.json"
        done = run_here("evaluate.py", run_dir, "--checkpoint=last", f"--set=data.root={part}", "--output", output)
        assert done.returncode == 0, done.stderr
        right += json.loads(output.read_text())["top1"] / 2
    assert right == pytest.approx(whole["top1"])
    (part / "val" / "zebra").mkdir()
    shutil.copy(next(root.rglob("*.jpg")), part / "val" / "zebra")
    done = run_here("evaluate.py", run_dir, f"--set=data.root={part}")
    assert done.returncode == 2
    assert f"{part}: the classes are not those that {run_dir} was trained on: missing disc" in done.stderr
    assert "; new zebra" in done.stderr
