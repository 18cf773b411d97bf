"""Pillow's images as RGB: what DALI decodes from the same file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from bandsplit.inference import preparation


@pipeline_def(batch_size=1, num_threads=1, device_id=None)
def decoding(path: Path) -> object:
    encoded, _ = fn.readers.file(files=[str(path)])
    return fn.decoders.image(encoded, device="cpu", output_type=types.RGB)


@pytest.mark.parametrize("name", ["float.tiff", "sixteen.tiff", "sixteen.png", "sixteen.pgm"])
def test_gray_of_many_levels_is_what_dali_decodes(tmp_path: Path, name: str) -> None:
    """All values of 16 bits; of floating point ones between two levels, below black, above white, infinite, none."""
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    if name == "float.tiff":
        values = np.arange(-40, 600, dtype=np.float32).reshape(16, 40) / np.float32(510)
        values[:, 0] = [np.inf, -np.inf, np.nan, 1e30, *np.linspace(0, 1, 12)]
    Image.fromarray(values).save(tmp_path / name)
    pipe = decoding(tmp_path / name)
    pipe.build()
    expected = np.asarray(pipe.run()[0].at(0))
    ours = preparation.pixels(tmp_path / name).movedim(0, -1).numpy()
    assert (expected.min(), expected.max()) == (0, 255)
    np.testing.assert_array_equal(ours, expected)
