"""The file of `evaluate --save`: what is in it follows from the evaluation, on any number of ranks."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bandsplit.errors import UserError
from bandsplit.evaluation.measures import calibration
from bandsplit.models import fusion
from bandsplit.runs import checkpoint
from bandsplit.runs.predictions import Predictions
from bandsplit.statistics import calibration_error
from tests.conftest import VAL_PER_CLASS, Done, run
from tests.evaluation.test_evaluation import naive_counts
from tests.reporting.synthetic import predictions


def logits_of(saved: Predictions) -> NDArray[np.float16]:
    assert saved.logits is not None
    return saved.logits


def test_predictions_are_the_same_on_any_number_of_ranks(
    finished: Callable[..., Path], image_root: Path, tmp_path: Path
) -> None:
    """Accuracies, loss, calibration and cumulative accuracy follow from them."""
    saved, told = [], []
    for ranks in (1, 2, 3):
        path, output = tmp_path / f"{ranks}.npz", tmp_path / f"{ranks}.json"
        done = run("evaluate.py", finished(1), "--save", path, "--output", output, ranks=ranks)
        assert done.returncode == 0, done.stderr
        saved.append(Predictions.read(path))
        told.append(json.loads(output.read_text()))
    one = saved[0]
    assert one.folder == str(image_root / "val")
    assert one.names == [str(p.relative_to(image_root / "val")) for p in sorted((image_root / "val").rglob("*.jpg"))]
    assert one.class_names == one.classes
    assert [one.classes[label] for label in one.labels] == [Path(name).parts[0] for name in one.names]
    assert logits_of(one).shape == (10 * VAL_PER_CLASS, 4, 10)
    assert [branch.bands for branch in one.branches] == [(0,), (1,), (2,), (3,)]
    assert {(branch.run, branch.step) for branch in one.branches} == {(str(finished(1)), told[0]["step"])}
    for other in saved[1:]:
        assert other.names == one.names
        assert np.array_equal(other.labels, one.labels)
        assert np.allclose(logits_of(other), logits_of(one), atol=0.01)
        assert np.array_equal(other.fused.classes[:, :, 0], one.fused.classes[:, :, 0])
        assert np.allclose(other.fused.confidences, one.fused.confidences, atol=1e-5)
        assert np.allclose(other.fused.losses, one.fused.losses, atol=1e-4)
    for other in told[1:]:
        assert other.keys() == told[0].keys()
        for key, value in other.items():
            assert value == pytest.approx(told[0][key], abs=1e-6), key

    logits, labels = torch.from_numpy(logits_of(one)).float().transpose(0, 1), torch.from_numpy(one.labels).long()
    right = [naive_counts(branch, labels) for branch in logits]
    assert told[0]["branch_top1"] == [2.0 * top1 for top1, _ in right]
    fused, rounding = logits.mean(0), float(logits.abs().max()) * 2**-11  # logits are saved as float16
    assert told[0]["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(fused, labels)), abs=2 * rounding)
    assert told[0]["ece"] == pytest.approx(calibration_error(calibration(fused, labels).tolist()), abs=0.5)
    so_far = [naive_counts(logits[: k + 1].mean(0), labels) for k in range(4)]
    assert told[0]["cumulative_top1"] == [2.0 * top1 for top1, _ in so_far]
    assert told[0]["cumulative_top5"] == [2.0 * top5 for _, top5 in so_far]
    assert told[0]["cumulative_top1"][-1] == told[0]["top1"]

    top = torch.from_numpy(one.fused.confidences[:, 0])
    assert torch.allclose(top, fused.softmax(-1).topk(5).values, atol=rounding)
    found = torch.from_numpy(one.fused.classes[:, 0]) == labels[:, None]
    assert (told[0]["top1"], told[0]["top5"]) == (2.0 * found[:, 0].sum(), 2.0 * found.any(1).sum())
    assert told[0]["loss"] == pytest.approx(one.fused.losses[:, 0].mean(dtype=np.float64), abs=1e-6)


def test_a_sample_of_predictions(finished: Callable[..., Path], tmp_path: Path) -> None:
    whole, some, few = (tmp_path / name for name in ("whole.npz", "some.npz", "few.npz"))
    for path, ranks, options in ((whole, 1, ()), (some, 2, ("--save-sample", 13)), (few, 3, ("--save-sample", 1))):
        done = run("evaluate.py", finished(1), "--save", path, *options, ranks=ranks)
        assert done.returncode == 0, done.stderr
    everything, thirteen, one = (Predictions.read(path) for path in (whole, some, few))
    rows = [everything.names.index(name) for name in thirteen.names]
    assert rows == sorted(rows)
    assert len(set(rows)) == 13
    assert thirteen.images == everything.images == 50
    assert len(set(everything.labels[rows].tolist())) > 3
    assert np.array_equal(thirteen.labels, everything.labels[rows])
    assert np.allclose(logits_of(thirteen), logits_of(everything)[rows], atol=0.01)
    assert np.allclose(thirteen.fused.losses, everything.fused.losses[rows], atol=1e-4)
    assert set(one.names) <= set(thirteen.names)


def test_predictions_that_do_not_fit_are_refused(
    finished: Callable[..., Path], tmp_path: Path, run_here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But a sample fits, and what is fused alone."""
    monkeypatch.setattr("bandsplit.evaluation.collector.LIMIT", 2 * 20 * 4 * 10)
    done = run_here("evaluate.py", finished(1), "--save", tmp_path / "x.npz")
    assert done.returncode == 2
    assert "50 images, 4 branches and 10 classes" in done.stderr
    assert "--save-sample 20, or what is fused alone with --save-fused" in done.stderr
    assert not list(tmp_path.glob("*.npz"))
    done = run_here("evaluate.py", finished(1), "--save", tmp_path / "x.npz", "--save-sample", 20)
    assert done.returncode == 0, done.stderr
    assert len(Predictions.read(tmp_path / "x.npz").names) == 20
    done = run_here("evaluate.py", finished(1), "--save", tmp_path / "x.npz", "--save-fused")
    assert done.returncode == 0, done.stderr
    saved = Predictions.read(tmp_path / "x.npz")
    assert (len(saved.names), saved.logits) == (50, None)


@pytest.fixture
def trained(finished: Callable[..., Path], tmp_path: Path) -> Path:
    """A run with held-out images that a test may change."""
    return Path(shutil.copytree(finished(1, "data.holdout=4", "train.epochs=4"), tmp_path / "run", symlinks=True))


def test_fusion_is_fitted_again_from_the_file_alone(
    trained: Path, tmp_path: Path, run_here: Callable[..., Done]
) -> None:
    """And what every fusion predicts is in it, with or without logits."""
    whole, fused, output = tmp_path / "whole.npz", tmp_path / "fused.npz", tmp_path / "x.json"
    done = run_here("evaluate.py", trained, "--fit-fusion", "--fusion", "rank", "--save", whole, "--output", output)
    assert done.returncode == 0, done.stderr
    told = json.loads(output.read_text())
    done = run_here("evaluate.py", trained, "--save", fused, "--save-fused")
    assert done.returncode == 0, done.stderr
    saved, without = Predictions.read(whole), Predictions.read(fused)
    assert (saved.fusion, without.fusion, without.logits, without.held_out) == ("rank", "mean", None, None)
    assert saved.held_out is not None
    assert np.bincount(saved.held_out.labels).tolist() == [4] * 10

    fitted = json.loads((checkpoint.find(trained / "checkpoints", "best") / "fusion.json").read_text())["fusions"]
    again = fusion.fit(saved.held_out.logits, saved.held_out.labels)
    assert list(saved.fusions) == list(again) == list(fitted)
    for n, (name, each) in enumerate(again.items()):
        assert each.weights == saved.fusions[name] == fitted[name]["weights"]
        z = np.einsum("k,nkc->nc", each.weights, logits_of(saved).astype(float))
        assert np.array_equal(saved.fused.classes[:, n, 0], z.argmax(1))
        for file in (saved, without):
            found = file.fused.classes[:, n] == file.labels[:, None]
            expected = told["fusions"][name]
            assert (expected["top1"], expected["top5"]) == (2.0 * found[:, 0].sum(), 2.0 * found.any(1).sum())
            assert expected["loss"] == pytest.approx(file.fused.losses[:, n].mean(dtype=np.float64), abs=1e-6)


def test_of_several_crops_only_what_is_fused_is_saved(
    finished: Callable[..., Path], tmp_path: Path, run_here: Callable[..., Done]
) -> None:
    path, output = tmp_path / "x.npz", tmp_path / "x.json"
    done = run_here("evaluate.py", finished(1), "--ten-crop", "--save", path)
    assert done.returncode == 2
    assert "logits are saved of the center crop only; with --flip or --ten-crop, --save-fused" in done.stderr
    names = tmp_path / "names.json"
    names.write_text(json.dumps([f"name {c}" for c in range(10)]))
    more = ("--output", output, "--set", f"data.class_names={names}")
    done = run_here("evaluate.py", finished(1), "--ten-crop", "--save", path, "--save-fused", *more)
    assert done.returncode == 0, done.stderr
    saved, told = Predictions.read(path), json.loads(output.read_text())
    assert saved.crops == "ten"
    assert saved.class_names == [f"name {c}" for c in range(10)]
    assert told["top1"] == 2.0 * (saved.fused.classes[:, 0, 0] == saved.labels).sum()
    assert told["loss"] == pytest.approx(saved.fused.losses.mean(dtype=np.float64), abs=1e-6)
    done = run_here("evaluate.py", finished(1), "--save-fused")
    assert done.returncode == 2
    assert "--save-fused needs --save" in done.stderr


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = predictions(images=7, branches=2, classes=3, held_out=5)
    written = replace(written, names=[f"ü \udcff{i}" for i in range(7)])
    written.write(tmp_path / "x.npz")
    read = Predictions.read(tmp_path / "x.npz")
    for key, value in vars(written).items():
        for one, other in zip(parts(value), parts(getattr(read, key)), strict=True):
            assert np.array_equal(one, other), key


def parts(value: Any) -> list[Any]:
    return list(vars(value).values()) if hasattr(value, "__dict__") else [value]


def test_files_that_hold_no_predictions_are_named(tmp_path: Path) -> None:
    whole = tmp_path / "whole.npz"
    predictions(images=3, branches=1, classes=3).write(whole)
    content = whole.read_bytes()
    for name, wrong in (("empty", b""), ("text", b"hello"), ("cut", content[: len(content) // 2])):
        (tmp_path / name).write_bytes(wrong)
        with pytest.raises(UserError, match=f"{name}: not the predictions"):
            Predictions.read(tmp_path / name)
    np.savez(tmp_path / "foreign.npz", logits=np.zeros((2, 1, 3)))
    np.save(tmp_path / "foreign.npy", np.zeros(3))
    for name in ("foreign.npz", "foreign.npy"):
        with pytest.raises(UserError, match=f"{name}: not the predictions"):
            Predictions.read(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        Predictions.read(tmp_path / "nowhere.npz")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("labels", np.array([0, 1, 3], dtype=np.int32), "labels that are not indices of 3 classes"),
        ("labels", np.array([0, 1], dtype=np.int32), "labels of shape"),
        ("logits", np.zeros((3, 2, 3), dtype=np.float16), "logits of shape"),
        ("logits", np.full((3, 1, 3), np.nan, dtype=np.float16), "logits that are not finite"),
        ("fused_confidences", np.zeros((3, 1, 3), dtype=np.int32), "fused_confidences of shape"),
        ("about", np.array('{"format": 1}'), "format 1; this version reads format 2, so save it anew"),
        ("about", np.array("[]"), "list indices"),
    ],
)
def test_arrays_that_do_not_fit_each_other_are_named(tmp_path: Path, key: str, value: Any, told: str) -> None:
    predictions(images=3, branches=1, classes=3).write(tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as arrays:
        np.savez(tmp_path / "x.npz", **{**arrays, key: value})
    with pytest.raises(UserError, match=rf"x\.npz: not the predictions .*{told}"):
        Predictions.read(tmp_path / "x.npz")


def test_a_damaged_byte_is_noticed_or_does_not_matter(tmp_path: Path) -> None:
    """Wherever it is: never another error, never other numbers."""
    path = tmp_path / "x.npz"
    predictions(images=3, branches=1, classes=3).write(path)
    content, drawn = path.read_bytes(), random.Random(0)
    expected = Predictions.read(path)
    for _ in range(400):
        damaged = bytearray(content)
        damaged[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
        path.write_bytes(damaged)
        try:
            read = Predictions.read(path)
        except UserError as error:
            assert "not the predictions of src/evaluate.py --save, or damaged" in str(error)  # noqa: PT017
            continue
        assert np.array_equal(logits_of(read), logits_of(expected))
