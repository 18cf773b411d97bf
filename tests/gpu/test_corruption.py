"""Corruptions on the GPU against those on the CPU, which tests/data/test_corruption.py tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bandsplit.config import loading
from bandsplit.data.corruption import KINDS, Corruption
from bandsplit.data.crops import Crop
from bandsplit.data.images import ImageFiles
from bandsplit.data.loader import ValidationLoader
from bandsplit.data.pipeline import Shard

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

SIDE, COUNT = 64, 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_corrupts_as_a_cpu_does(config_file: Path, tmp_path: Path, kind: str) -> None:
    """To one of 255 levels; JPEG, whose codecs differ, to three on average."""
    files = []
    for n in range(COUNT):
        down, across = np.linspace(0, 3 + n, SIDE), np.arange(SIDE * 3).reshape(SIDE, 3) / 20
        waves = 128 + 100 * np.sin(down)[:, None, None] * np.cos(across)
        files.append(str(tmp_path / f"{n}.png"))  # decoded without loss on both
        Image.fromarray(waves.astype(np.uint8)).save(files[-1])
    keys = ["split.block=1", "data.mean=[0,0,0]", "data.std=[1,1,1]", f"data.image_size={SIDE}"]
    config = loading.load(config_file, [*keys, f"data.resize_size={SIDE}"])
    for value in (KINDS[kind][0], KINDS[kind][-1]):
        shown = []
        for device in (None, 0):
            shard = Shard(0, 1, 2, threads=1, device_id=device)
            crops = [Crop(corruption=Corruption(kind, value))]
            images = ImageFiles(files, list(range(COUNT)), ["all"])
            batches = [(b.inputs[0].cpu(), b.labels.cpu()) for b in ValidationLoader(config, images, shard, crops)]
            shown.append(torch.cat([x[labels >= 0] for x, labels in batches]))
        difference = (shown[0] - shown[1]).abs()
        assert difference.mean() < 3 if kind == "jpeg" else difference.max() <= 1
