"""Corruptions of validation images, as operators of the DALI graph: after the crop, before the split.

Kinds and strengths are those of ImageNet-C (Hendrycks and Dietterich, *Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations*, ICLR 2019), for images of 224 x 224; its code, `make_imagenet_c.py`, has the numbers.
They differ from its published JPEG files in being applied to the crop that the network sees, without another
compression, and in rounding values where it truncates them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn as dali_fn
from nvidia.dali import math as dali_math
from nvidia.dali import types
from nvidia.dali.types import BatchInfo

from bandsplit import seeds

fn: Any = dali_fn
dali: Any = dali_math

KINDS: dict[str, tuple[float, ...]] = {
    "noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "blur": (1, 2, 3, 4, 6),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "jpeg": (25, 18, 15, 10, 7),
}
"""Parameter of each kind at strengths 1 to 5; `Corruption.value` has their meaning."""


@dataclass(frozen=True)
class Corruption:
    """One kind of corruption with its parameter."""

    kind: str
    """A key of `KINDS`."""
    value: float
    """
    - noise: standard deviation of Gaussian noise on the scale 0 to 1
    - blur: standard deviation of a Gaussian in pixels, cut at four of them, with mirrored borders
    - brightness: added to the value of HSV on the scale 0 to 1
    - contrast: factor of the distance of each color to its mean over the image
    - jpeg: quality from 1 to 100, with chroma at half the resolution
    """


def corrupted(
    images: Any, corruption: Corruption, numbers: Callable[[int], NDArray[np.int64]], seed: int, size: int
) -> Any:
    """Corrupts uint8 images (size, size, 3), RGB, on the CPU or on a GPU.

    Noise is drawn by NumPy for each image from the seed and its number, since DALI's generators depend on the place
    in the batch: it is the same in batches of any size, on any number of ranks, and, but for the factor, at each
    strength.

    Args:
        numbers: those of the images of a batch, given its number.
    """
    value = corruption.value
    if corruption.kind == "blur":
        return fn.gaussian_blur(images, sigma=value, window_size=2 * math.ceil(4 * value) + 1) if value else images
    if corruption.kind == "jpeg":
        return fn.jpeg_compression_distortion(images, quality=int(value))
    if corruption.kind == "noise":
        noise = fn.external_source(source=_Noise(numbers, seed, size), batch_info=True, dtype=types.FLOAT, ndim=3)
        changed = images + (noise.gpu() if images.device == "gpu" else noise) * (255 * value)
    elif corruption.kind == "contrast":
        mean = fn.reductions.mean(images, axes=[0, 1], keep_dims=True)
        changed = (images - mean) * value + mean
    else:
        assert corruption.kind == "brightness", corruption
        largest = fn.cast(fn.reductions.max(images, axes=[2], keep_dims=True), dtype=types.FLOAT)
        brighter = dali.min(largest + 255 * value, 255.0)
        changed = images * (brighter / dali.max(largest, 1.0)) + (largest < 0.5) * brighter  # black becomes gray
    return fn.cast(changed, dtype=types.UINT8)


@dataclass(frozen=True)
class _Noise:
    """Standard normal numbers for the images of a batch: one (size, size, 3), float32, each."""

    numbers: Callable[[int], NDArray[np.int64]]
    seed: int
    size: int

    def __call__(self, about: BatchInfo) -> list[NDArray[np.float32]]:
        return [self._of(number) for number in self.numbers(about.iteration).tolist()]

    def _of(self, number: int) -> NDArray[np.float32]:
        generator = np.random.default_rng(seeds.derived(self.seed, "corruption", number))
        return generator.standard_normal((self.size, self.size, 3), dtype=np.float32)
