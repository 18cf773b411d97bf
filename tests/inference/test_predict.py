"""The command predict: the logits of validation, every output tells the same, and bad files cost only themselves."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bandsplit.cli import predict
from bandsplit.errors import UserError
from bandsplit.inference import weights
from bandsplit.inference.loading import load
from bandsplit.runs.directory import RunDirectory
from tests.conftest import Done
from tests.inference.models import classifier


def test_folders_are_classified_as_in_validation(
    finished: Callable[..., Path], image_root: Path, tmp_path: Path, run_here: Callable[..., Done]
) -> None:
    """Of a run and of its exported file, with a part of its branches too: the very logits of evaluate.py --save.

    In the precision of the run; in float32 confidences differ by up to 6 %.
    """
    run_dir, saved = Path(shutil.copytree(finished(1), tmp_path / "run", symlinks=True)), tmp_path / "saved.npz"
    config = (run_dir / "config.toml").read_text()
    assert 'precision = "auto"' in config
    (run_dir / "config.toml").write_text(config.replace('precision = "auto"', 'precision = "bf16"'))
    done = run_here("evaluate.py", run_dir, "--save", saved, "--output", tmp_path / "evaluated.json")
    assert done.returncode == 0, done.stderr
    model, file, some = load(run_dir), tmp_path / "model.safetensors", tmp_path / "some.safetensors"
    weights.write(model, file)
    weights.write(model.only([2, 0]), some)
    tables = {}
    for name, path in (("run", run_dir), ("file", file), ("some", some)):
        output = ["--json", str(tmp_path / f"{name}.json"), "-k", "3", "--batch-size", "12"]  # that of evaluate.py
        predict.main([str(path), str(image_root / "val"), *output])
        tables[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert tables["run"] == tables["file"]
    with np.load(saved, allow_pickle=False) as arrays:
        logits = arrays["logits"].astype(np.float64)  # (images, branches, classes)
    order = json.loads(RunDirectory(run_dir).classes.read_text())
    assert len(tables["run"]) == len(logits) == 50
    for row, z in zip(tables["run"], logits, strict=True):
        p = np.exp(z.mean(0)) / np.exp(z.mean(0)).sum()
        assert [each["confidence"] for each in row["top"]] == pytest.approx(sorted(p)[:-4:-1], rel=2e-3)
        assert p[order.index(row["top"][0]["class"])] == pytest.approx(p.max(), rel=2e-3)
        votes = [order.index(each["class"]) for each in row["branches"]]
        assert np.allclose(z[range(4), votes], z.max(-1), atol=1e-2)
    for row, whole in zip(tables["some"], tables["run"], strict=True):
        assert [each["branch"] for each in row["branches"]] == [2, 0]
        for vote, k in zip(row["branches"], (2, 0), strict=True):
            assert vote["class"] == whole["branches"][k]["class"]
            assert vote["confidence"] == pytest.approx(whole["branches"][k]["confidence"], rel=1e-4)


def test_single_files_by_pillow(
    config_file: Path, image_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `predict` of the model says; table, CSV and JSON tell the same."""
    model, path = classifier(config_file), tmp_path / "model.safetensors"
    weights.write(model, path)
    images = [str(image) for image in sorted((image_root / "val").glob("*/00000.jpg"))[:3]]
    images.insert(1, images[0])  # named twice
    images.append(shutil.copy(images[0], os.fsdecode(bytes(tmp_path / "caf") + b"\xe9.jpg")))  # not UTF-8
    predict.main([str(path), *images, "--json", str(tmp_path / "p.json"), "--batch-size", "2", "-k", "2"])
    table = capsys.readouterr().out
    predict.main([str(path), *images, "--csv", "-", "-k", "2"])
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    told = json.loads((tmp_path / "p.json").read_text())
    for image, each, row in zip(images, told, rows, strict=True):
        expected = model.predict(image, k=2)
        assert each["file"] == row["file"] == image.replace("\udce9", r"\xe9")
        assert [(guess["class"], pytest.approx(guess["confidence"], rel=1e-4)) for guess in each["top"]] == [
            (guess.name, guess.confidence) for guess in expected.top
        ]
        assert [row["top1"], row["top2"]] == [guess.name for guess in expected.top]
        assert float(row["top1_confidence"]) == pytest.approx(expected.top[0].confidence, rel=1e-4)
        assert [row[f"branch{k}"] for k in range(4)] == [vote.name for vote in expected.votes]
        assert f"{each['file']}\n  {expected.top[0].confidence:7.2%}  {expected.top[0].name}" in table


def test_files_that_cannot_be_read_cost_only_themselves(
    config_file: Path, image_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = tmp_path / "model.safetensors", tmp_path / "images"
    weights.write(classifier(config_file), path)
    (folder / "below").mkdir(parents=True)
    good = folder / "below" / "good.jpg"
    shutil.copy(next((image_root / "val").glob("*/*.jpg")), good)
    (folder / "text.jpg").write_text("no image")
    (folder / "cut.jpg").write_bytes(good.read_bytes()[:300])
    (folder / "cut.qoi").write_bytes(b"qoif\0\0\0\x40\0\0\0\x40\3\0\xfe")  # an IndexError of Pillow
    (folder / "below" / "above").symlink_to(folder)  # not followed
    single = ("text.jpg", "nowhere.jpg", "cut.qoi", "x" * 300 + ".jpg")
    for where, found in [(folder, 3), *((folder / name, 1) for name in single)]:
        with pytest.raises(UserError, match=f"of {found} images cannot be read or decoded") as error:
            predict.main([str(path), str(where), "--json", str(tmp_path / "p.json")])
        told = json.loads((tmp_path / "p.json").read_text())
        assert len(told) == found
        assert [each["file"] for each in told if "top" in each] == [str(good)] * (where == folder)
        assert all(f"{each['file']}: {each['error']}" in str(error.value) for each in told if "error" in each)
    good.unlink()
    with pytest.raises(UserError, match="2 of 2 images"):
        predict.main([str(path), str(folder)])
    capsys.readouterr()


def test_circular_links(config_file: Path, image_root: Path, tmp_path: Path) -> None:
    """In place of a file to write, and of a model."""
    path, links = tmp_path / "model.safetensors", [tmp_path / name for name in ("p.json", "p.csv", "model")]
    weights.write(classifier(config_file), path)
    for link in links:
        link.symlink_to(link)
    image, outputs = str(next((image_root / "val").glob("*/*.jpg"))), ["--json", str(links[0]), "--csv", str(links[1])]
    predict.main([str(path), image, *outputs])
    assert [link.is_file() for link in links] == [True, True, False]
    with pytest.raises(UserError, match=f"{links[2]}: no such model"):
        predict.main([str(links[2]), image, *outputs])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "nowhere: no such model"),
        (["MODEL", "--json", "nowhere/p.json"], "--json nowhere/p.json: there is no folder nowhere"),
        (["MODEL", "--json", "-", "--csv", "-"], "only one of them can go to standard output"),
        (["MODEL", "--json", "p", "--csv", "../here/p"], "--csv ../here/p: only one of them can go to one file"),
        (["MODEL", "--json", "x" * 300], "--json x*: File name too long"),
        (["MODEL", "--device", "abacus"], "--device abacus"),
        (["MODEL", "--fusion", "rank"], "an exported model has one checkpoint and one fusion"),
    ],
)
def test_mistakes(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    path = tmp_path / "model.safetensors"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    weights.write(classifier(config_file), path)
    with pytest.raises(UserError, match=message):
        predict.main([str(path) if word == "MODEL" else word for word in options] + ["image.jpg"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/locked").mkdir(0)
    if os.getuid():  # root reads everything
        with pytest.raises(UserError, match="locked: cannot be read: Permission denied"):
            predict.main([str(path), str(tmp_path / "empty")])
    (tmp_path / "empty/locked").rmdir()
    with pytest.raises(UserError, match="no images in this folder"):
        predict.main([str(path), str(tmp_path / "empty")])


def test_files_are_written_though_nobody_reads_the_lines(
    finished: Callable[..., Path], image_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `predict RUN FOLDER --json FILE | head`."""

    def no_reader(*_: object, file: object = None, **__: object) -> None:
        if file is None:
            raise BrokenPipeError

    monkeypatch.setattr("builtins.print", no_reader)
    predict.main([str(finished(1)), str(image_root / "val"), "--json", str(tmp_path / "p.json")])
    assert len(json.loads((tmp_path / "p.json").read_text())) == 50
    with pytest.raises(UserError, match="--csv .*: this is a folder; name a file"):
        predict.main([str(finished(1)), str(image_root / "val"), "--csv", str(tmp_path)])
