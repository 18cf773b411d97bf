"""Two evaluations of one run: ours, and one with torch, torchvision, Pillow and SciPy alone."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from script import independent

from bandsplit.distributed.ranks import Ranks
from bandsplit.evaluation.joined import Joined
from bandsplit.runs.predictions import Predictions
from tests.conftest import Done

OTHERWISE = (  # all that the script covers besides the defaults
    "split.branches=[[0, 3], [1]]",
    "split.transform='dct1d'",
    "split.norm='none'",
    "split.scale=0.5",
    "model.stem='small'",
    "train.ema_decay=0.9",
    "data.interpolation='bicubic'",
)


@pytest.mark.parametrize("overrides", [(), OTHERWISE])
def test_equal_on_the_same_pixels(
    finished: Callable[..., Path], tmp_path: Path, run_here: Callable[..., Done], overrides: tuple[str, ...]
) -> None:
    run_dir = finished(1, *overrides)
    done = run_here("evaluate.py", run_dir, "--checkpoint", "last", "--output", tmp_path / "evaluation.json")
    assert done.returncode == 0, done.stderr
    ours = json.loads((tmp_path / "evaluation.json").read_text())
    pixels, labels = pixels_of(run_dir)
    theirs = independent.evaluated(independent.Run.read(run_dir, "last"), pixels, labels)
    for key in ("step", "top1", "top5", "branch_top1"):
        assert theirs[key] == ours[key], key
    assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-6)


def pixels_of(run_dir: Path) -> tuple[list[np.typing.NDArray[np.uint8]], np.typing.NDArray[np.int64]]:
    """Validation images as DALI has decoded, resized and cropped them, and their labels."""
    runs = Joined.of([run_dir], "last", [], Ranks(0, 1, 0, 1, torch.device("cpu")))
    config = runs.config
    whole = config.split.model_copy(update={"block": 1, "transform": "identity", "branches": "each", "scale": 0.0})
    plain = config.data.model_copy(update={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    loader = replace(runs, config=config.model_copy(update={"split": whole, "data": plain})).loader(
        runs.validation_files()
    )
    batches = list(loader)
    labels = torch.cat([batch.labels for batch in batches]).numpy()
    pixels = torch.cat([batch.inputs[0] for batch in batches]).permute(0, 2, 3, 1).numpy()
    assert (pixels == pixels.astype(np.uint8)).all()
    return list(pixels.astype(np.uint8)[labels >= 0]), labels[labels >= 0]


def test_from_files(
    finished: Callable[..., Path],
    tmp_path: Path,
    run_here: Callable[..., Done],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the checkpoint of the predictions. Pillow rounds to 8 bits after each axis, DALI once: one level apart.

    They differ by more in images whose longer side is no integer after scaling: DALI keeps the scale, Pillow stretches.
    """
    run_dir, saved = finished(1), tmp_path / "predictions.npz"
    assert run_here("evaluate.py", run_dir, "--checkpoint", "13", "--save", saved).returncode == 0
    pixels, _ = pixels_of(run_dir)
    run = independent.Run.read(run_dir, "13")
    root = Path(run.data["root"]) / "val"
    ours = Predictions.read(saved)
    own = [independent.prepared(root / name, run.data) for name in ours.names]
    levels = [np.abs(a.astype(int) - b.astype(int)) for a, b in zip(own, pixels, strict=True)]
    square = [len({*Image.open(root / name).size}) == 1 for name in ours.names]
    assert any(square)
    assert max(x.max() for x, same in zip(levels, square, strict=True) if same) <= 1
    assert np.mean(levels) < 0.5
    assert np.max(levels) < 12

    theirs = independent.logits_of(run, own)
    theirs -= theirs.max(-1, keepdims=True)
    mine = ours.logits.astype(np.float32)
    apart = np.abs(theirs - mine).max()
    second, first = np.sort(mine.mean(1), axis=1)[:, -2:].T
    unlike = theirs.mean(1).argmax(1) != mine.mean(1).argmax(1)
    assert (first - second)[unlike].max(initial=0) <= 2 * apart
    assert np.abs(theirs - mine).mean() < 0.1 * mine.std()

    monkeypatch.setattr(sys, "argv", ["independent.py", str(run_dir), "--predictions", str(saved)])
    independent.main()
    told = capsys.readouterr().out
    assert f"images with another top-1: {unlike.sum()} fused" in told
    assert '"step": 13,' in told


@pytest.mark.parametrize(("value", "dtype"), [(100 * 257, np.uint16), (100 / 255, np.float32)])
def test_gray_of_many_levels_is_not_clipped(tmp_path: Path, value: float, dtype: type) -> None:
    Image.fromarray(np.full((40, 40), value, dtype)).save(tmp_path / "x.tiff")
    data = {"image_size": 32, "resize_size": 36, "interpolation": "bilinear"}
    assert (independent.prepared(tmp_path / "x.tiff", data) == 100).all()
