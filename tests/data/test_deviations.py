"""`split.scale`: bands are divided by a power of their deviation, which is measured once and kept in the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch
from PIL import Image

from bandsplit.config import loading
from bandsplit.config.schema import Split
from bandsplit.data import deviations
from bandsplit.data.loader import TrainingLoader
from bandsplit.data.pipeline import Shard
from bandsplit.errors import UserError
from bandsplit.runs import checkpoint
from bandsplit.spectral.view import View
from tests.compare import assert_same_run, metrics
from tests.conftest import Done, image_files, run
from tests.training.tiny import ALONE

WHOLE = ["data.scale=1,1", "data.ratio=1,1", "data.image_size=64", "data.resize_size=64"]  # as they were drawn
SCALED = ["split.scale=0.5"]


@pytest.mark.parametrize("transform", ["dct2d", "identity"])
def test_the_deviations_are_those_of_the_pixels(config_file: Path, tmp_path: Path, transform: str) -> None:
    """Against Pillow and scipy, over all of 100 images: two batches."""
    draw = np.random.default_rng(0)
    for n in range(100):
        path = tmp_path / "drawn" / str(n % 2) / f"{n}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(path, quality=95)
    files = image_files(tmp_path / "drawn")
    split = [f"split.transform={transform}", "split.block=4"]
    config = loading.load(config_file, [*WHOLE, *split, "data.hflip=1"])
    images = np.stack([np.asarray(Image.open(path), dtype=np.float64) for path in files.paths])
    normalized = (images - config.data.mean) / config.data.std
    blocks = normalized.reshape(100, 16, 4, 16, 4, 3).transpose(2, 4, 0, 1, 3, 5)
    bands = scipy.fft.dctn(blocks, axes=(0, 1), norm="ortho") if transform == "dct2d" else blocks
    sigma = deviations.measured(config, files)
    np.testing.assert_allclose(sigma, bands.reshape(16, -1).std(axis=1), rtol=0.01)
    mixed = loading.load(config_file, [*WHOLE, *split, "mix.mixup=1.0", "augment.auto={type='rand_augment'}"])
    assert deviations.measured(mixed, files) == sigma


def test_the_operator_and_torch_divide_by_the_deviations(
    config_file: Path, image_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 1, all bands together have deviation 1; a sigma that is given is taken."""
    files, shard = image_files(image_root / "train"), Shard(0, 1, 53, 1, None)
    plain = loading.load(config_file)
    sigma = deviations.measured(plain, files)
    exact = [next(TrainingLoader(plain, files, [shard])).inputs]
    for keys, powers in (([], 0.0), ([f"split.sigma={list(sigma)}", "split.scale=0.5"], 0.5)):
        config = loading.load(config_file, keys)
        assert View.of(config).factors.tolist() == [s**-powers for s in sigma]
        by_operator = next(TrainingLoader(config, files, [shard])).inputs
        with monkeypatch.context() as patch:
            patch.setattr("bandsplit.data.pipeline.has_operator", lambda device: False)
            by_torch = next(TrainingLoader(config, files, [shard])).inputs
        for k, (x, y) in enumerate(zip(by_operator, by_torch, strict=True)):
            torch.testing.assert_close(x, exact[0][k] / sigma[k] ** powers, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    one = loading.load(config_file, [f"split.sigma={list(sigma)}", "split.scale=1", "data.hflip=0"])
    loader = TrainingLoader(one, files, [shard])
    batches = [next(loader).inputs for _ in range(3)]  # the images of the measurement
    for k in range(4):
        assert torch.cat([inputs[k] for inputs in batches]).double().std() == pytest.approx(1, abs=1e-4)


def test_a_band_that_is_constant_is_told(config_file: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "flat" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), (90, 90, 90)).save(tmp_path / "flat" / name / "gray.jpg", quality=100)
    config = loading.load(config_file, SCALED)
    with pytest.raises(UserError, match=r"split.scale: 0.5 given, but band 1 is constant in 2 training images"):
        deviations.with_sigma(config, image_files(tmp_path / "flat"), ALONE.ranks)
    assert deviations.with_sigma(loading.load(config_file), image_files(tmp_path / "flat"), ALONE.ranks).split == Split(
        block=2
    )


@pytest.mark.slow
def test_a_run_keeps_its_deviations(
    finished: Callable[..., Path], config_file: Path, run_here: Callable[..., Done], image_root: Path, tmp_path: Path
) -> None:
    """In its config and every checkpoint: resuming is bit-equal, and evaluation finds the same figures."""
    done = finished(1, *SCALED)
    config = loading.load(done / "config.toml")
    sigma = deviations.measured(loading.load(config_file), image_files(image_root / "train"))
    assert config.split.sigma == sigma
    for step in (13, 26):
        kept = checkpoint.read_run(done / f"checkpoints/step_{step:08d}")["config"]["split"]
        assert (kept["scale"], tuple(kept["sigma"])) == (0.5, sigma)
    copy = Path(shutil.copytree(done, tmp_path / "copy", symlinks=True))
    for step in (24, 26):
        shutil.rmtree(copy / f"checkpoints/step_{step:08d}")
    other = run_here("train.py", config_file, "--run-dir", copy, "--resume", "--set", "split.scale=0.4")
    assert "split.scale was 0.5, now 0.4" in other.stderr
    resumed = run("train.py", config_file, "--run-dir", copy, "--resume", "--set", "split.scale=0.5")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(copy, done)
    found = run_here("evaluate.py", copy, "--checkpoint", "last", "--output", tmp_path / "found.json")
    assert found.returncode == 0, found.stderr
    validated = [line for line in metrics(done) if line["event"] == "validation"][-1]
    assert json.loads((tmp_path / "found.json").read_text())["branch_top1"] == validated["branch_top1"]
    refused = run_here("evaluate.py", copy, finished(1), "--checkpoint", "last")
    assert refused.returncode == 2
    assert "split.scale: 0.0, but" in refused.stderr
