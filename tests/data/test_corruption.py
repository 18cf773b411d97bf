"""Corruptions of validation images: against Pillow, scipy and colorsys, and the same in any batch and on any rank."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from bandsplit.config import loading
from bandsplit.data.corruption import KINDS, Corruption
from bandsplit.data.crops import Crop
from bandsplit.data.images import ImageFiles
from bandsplit.data.loader import ValidationLoader
from bandsplit.data.pipeline import Shard

SIDE, COUNT = 48, 7
Pixels = NDArray[np.uint8]


@pytest.fixture
def stored(tmp_path: Path) -> ImageFiles:
    """Smooth and noisy images, some pixels black, that neither resizing nor cropping changes."""
    files = []
    for n in range(COUNT):
        rng = np.random.default_rng(n)
        ramp = np.linspace(0, 255, SIDE)[:, None, None] * rng.random((1, SIDE, 3)) + 20 * rng.standard_normal(
            (SIDE, 1, 3)
        )
        pixels = np.clip(ramp + 20 * rng.standard_normal((SIDE, 1, 3)), 0, 255).astype(np.uint8)
        pixels[:4] = 0
        files.append(str(tmp_path / f"{n}.png"))
        Image.fromarray(pixels).save(files[-1])
    return ImageFiles(files, list(range(COUNT)), ["all"])


@pytest.fixture
def show(config_file: Path, stored: ImageFiles) -> Callable[..., NDArray[np.float32]]:
    """The images (COUNT, SIDE, SIDE, 3) that a network gets, on the scale of pixels."""

    def call(corruption: Corruption | None, batch_size: int = 3, ranks: int = 1) -> NDArray[np.float32]:
        keys = ["split.block=1", "data.mean=[0,0,0]", "data.std=[1,1,1]", f"data.image_size={SIDE}"]
        config = loading.load(config_file, [*keys, f"data.resize_size={SIDE}"])
        images = np.empty((COUNT, SIDE, SIDE, 3), dtype=np.float32)
        for rank in range(ranks):
            shard = Shard(rank, ranks, batch_size, threads=1, device_id=None)
            for batch in ValidationLoader(config, stored, shard, [Crop(corruption=corruption)]):
                some = batch.labels >= 0
                images[batch.labels[some].numpy()] = batch.inputs[0][some].permute(0, 2, 3, 1).numpy()
        return images

    return call


def pixels(stored: ImageFiles) -> NDArray[np.float64]:
    return np.stack([np.asarray(Image.open(path)) for path in stored.paths]).astype(np.float64)


@pytest.mark.parametrize(("kind", "value"), [("noise", 0), ("blur", 0), ("brightness", 0), ("contrast", 1)])
def test_nothing_changes_at_strength_zero(
    show: Callable[..., NDArray[np.float32]], stored: ImageFiles, kind: str, value: float
) -> None:
    assert np.array_equal(show(Corruption(kind, value)), show(None))
    assert np.array_equal(show(None), pixels(stored))


@pytest.mark.parametrize("strength", [0, 4])
def test_every_kind_is_that_of_another_library(
    show: Callable[..., NDArray[np.float32]], stored: ImageFiles, strength: int
) -> None:
    plain = pixels(stored)
    found = {kind: show(Corruption(kind, values[strength])) for kind, values in KINDS.items() if kind != "noise"}

    sigma = KINDS["blur"][strength]
    blurred = gaussian_filter(plain, (0, sigma, sigma, 0), mode="mirror", truncate=4)
    assert np.abs(found["blur"] - blurred).max() < 0.51

    mean = plain.mean((1, 2), keepdims=True)
    faded = np.clip((plain - mean) * KINDS["contrast"][strength] + mean, 0, 255)
    assert np.abs(found["contrast"] - faded).max() < 0.51

    def brighter(color: NDArray[np.float64]) -> list[float]:
        h, s, v = colorsys.rgb_to_hsv(*color / 255)
        return [255 * x for x in colorsys.hsv_to_rgb(h, s, min(1, v + KINDS["brightness"][strength]))]

    for n in (0, COUNT - 1):
        wanted = np.apply_along_axis(brighter, 2, plain[n])
        assert np.abs(found["brightness"][n] - wanted).max() < 0.51

    for n, image in enumerate(found["jpeg"]):
        file = io.BytesIO()
        Image.fromarray(plain[n].astype(np.uint8)).save(file, "JPEG", quality=int(KINDS["jpeg"][strength]))
        assert np.abs(image - np.asarray(Image.open(file)).astype(float)).max() <= 1


def test_noise_has_its_deviation_and_is_independent(config_file: Path, tmp_path: Path) -> None:
    """Measured on gray images, where little is clipped."""
    side, files = 224, []
    for n in range(4):
        files.append(str(tmp_path / f"gray{n}.png"))
        Image.new("RGB", (side, side), (128, 128, 128)).save(files[-1])
    keys = ["split.block=1", "data.mean=[0,0,0]", "data.std=[1,1,1]", f"data.image_size={side}"]
    config = loading.load(config_file, [*keys, f"data.resize_size={side}"])
    for value in KINDS["noise"][:2]:
        shown = [Crop(corruption=Corruption("noise", value))]
        shard = Shard(0, 1, 4, threads=1, device_id=None)
        (batch,) = ValidationLoader(config, ImageFiles(files, [0] * 4, ["all"]), shard, shown)
        noise = batch.inputs[0] - 128
        assert noise.std() == pytest.approx(255 * value, rel=0.01)
        assert abs(noise.mean()) < 0.01 * 255 * value
        assert torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max() < 0.01


def test_an_image_is_corrupted_the_same_in_every_batch_and_on_every_rank(
    show: Callable[..., NDArray[np.float32]],
) -> None:
    for kind in ("noise", "jpeg"):
        corruption = Corruption(kind, KINDS[kind][2])
        one = show(corruption)
        assert not np.array_equal(one, show(None))
        for batch_size, ranks in ((1, 1), (7, 1), (2, 2), (3, 3), (4, 9)):
            assert np.array_equal(one, show(corruption, batch_size, ranks))
