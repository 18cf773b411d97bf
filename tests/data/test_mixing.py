"""Mixup and CutMix of bands against those of whole images."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bandsplit.config import loading
from bandsplit.data import mixing
from bandsplit.spectral import transforms


def groups(images: Tensor, matrix: np.ndarray, block: int, branches: list[list[int]]) -> list[Tensor]:
    bands = transforms.split(images, torch.from_numpy(matrix).float(), block)
    return [torch.cat([bands[k] for k in branch], dim=1) for branch in branches]


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_bands_is_mixing_images(config_file: Path, kind: str) -> None:
    """For branches with any bands, and for whole images next to them, with CutMix boxes in whole blocks."""
    config = loading.load(config_file, [f"mix.{kind}=1.0"])
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 32, 32, generator=generator)
    labels = torch.tensor([0, 1, 2, 3, 4, 5])
    matrix, branches = transforms.transform_matrix("dct2d", 4), [[0], [1, 5, 7], [15]]
    mixed_something = 0
    for step in range(20):
        bands = groups(images, matrix, 4, branches)
        inputs, targets = mixing.mix([*bands, images], labels, config, step, 0)
        share = targets[range(6), labels]
        assert torch.allclose(targets.sum(-1), torch.ones(6))
        assert torch.equal(targets, targets[range(6), labels][:, None] * nn.functional.one_hot(labels, 10) + (
            1 - share
        )[:, None] * nn.functional.one_hot(labels.roll(1), 10))  # fmt: skip
        if kind == "mixup":
            whole = share[0] * images + (1 - share[0]) * images.roll(1, 0)
        else:  # the position of the box follows from the first band
            inside = (inputs[0] != bands[0]).any(dim=1, keepdim=True).any(dim=0, keepdim=True)
            area = float(inside.float().mean())
            assert area == pytest.approx(1 - float(share[0]), abs=1e-6)
            mask = inside.repeat_interleave(4, 2).repeat_interleave(4, 3)
            whole = torch.where(mask, images.roll(1, 0), images)
        for x, wanted in zip(inputs, [*groups(whole, matrix, 4, branches), whole], strict=True):
            torch.testing.assert_close(x, wanted, atol=1e-5, rtol=1e-5)
            assert x.is_contiguous(memory_format=torch.channels_last)
        mixed_something += bool(share[0] < 0.99)
    assert mixed_something > 10


def test_how_often_and_how_batches_are_mixed(config_file: Path) -> None:
    x, labels = torch.randn(4, 3, 8, 8), torch.arange(4)

    def shares(*keys: str, steps: int = 400) -> list[Tensor]:
        config = loading.load(config_file, list(keys))
        return [mixing.mix([x], labels, config, step, 0)[1] for step in range(steps)]

    assert all(target is labels for target in shares(steps=5))
    half = sum(bool((target < 1).all()) for target in shares("mix.mixup=1.0", "mix.probability=0.5"))
    assert abs(half - 200) < 4 * math.sqrt(100)
    config = loading.load(config_file, ["mix.mixup=1.0", "mix.cutmix=1.0"])
    kept = [bool((mixing.mix([x], labels, config, step, 0)[0][0] == x).any()) for step in range(400)]
    assert abs(sum(kept) - 200) < 60  # CutMix leaves pixels as they are, Mixup none

    places = ((3, 0), (3, 0), (4, 0), (3, 1))
    one, same, other_batch, other_stream = (mixing.mix([x], labels, config, *place)[1] for place in places)
    assert torch.equal(one, same)
    assert not torch.equal(one, other_batch)
    assert not torch.equal(one, other_stream)


def test_mixing_leaves_torchs_random_state_alone(config_file: Path) -> None:
    config = loading.load(config_file, ["mix.mixup=1.0"])
    before = torch.get_rng_state()
    mixing.mix([torch.randn(4, 3, 8, 8, generator=torch.Generator())], torch.arange(4), config, 0, 0)
    assert torch.equal(before, torch.get_rng_state())
