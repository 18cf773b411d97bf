"""Bands in 8 bits: the range that they cover, chosen from a sample, and what rounding costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

BINS = 8192
"""Of the histograms of a sample, over all values that a band can have."""

TAILS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3)
"""Shares of a sample at either end that the range may leave out."""


def bounds(matrix: Floats, mean: Sequence[float], std: Sequence[float]) -> tuple[Floats, Floats]:
    """Smallest and largest value of every band and color for pixels of 0 to 255, (N, 3) each.

    Band k is Σ_n M[k, n] (p_n - mean) / std: every term is extreme at one end of the pixel's range.
    """
    low, high = ((pixel - np.array(mean)) / np.array(std) for pixel in (0.0, 255.0))
    ends = matrix[:, :, None] * low, matrix[:, :, None] * high
    return np.minimum(*ends).sum(1), np.maximum(*ends).sum(1)


@dataclass(frozen=True)
class Quantizer:
    """8 bits a value: value = stored · scale + offset; scale and offset (3,), float32, a color each."""

    scale: npt.NDArray[np.float32]
    offset: npt.NDArray[np.float32]

    @classmethod
    def over(cls, low: Floats, high: Floats) -> Quantizer:
        """The range from `low` to `high` (3,) in 255 equal steps."""
        return cls(((high - low) / 255).astype(np.float32), low.astype(np.float32))

    def stored(self, values: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Values (..., w, 3) in 8 bits, and how many of each color (3,) are outside of the range."""
        scale, offset = self._lines(values.shape[-2])
        steps = values.reshape(-1, len(scale)) - offset
        steps /= scale
        np.rint(steps, out=steps)
        inside = np.clip(steps, 0, 255)
        outside = (inside != steps).sum(0).reshape(-1, 3).sum(0)
        return inside.astype(np.uint8).reshape(values.shape), outside

    def values(self, stored: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """(..., w, 3) -> (..., w, 3)"""
        scale, offset = self._lines(stored.shape[-2])
        values = stored.reshape(-1, len(scale)).astype(np.float32)
        values *= scale
        values += offset
        return values.reshape(stored.shape)

    def _lines(self, width: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Scale and offset of whole lines (3 w,), which are faster than three numbers at a time."""
        return np.tile(self.scale, width), np.tile(self.offset, width)


def histogram(values: npt.NDArray[np.float32], low: Floats, high: Floats) -> npt.NDArray[np.int64]:
    """Counts (3, BINS) of values (..., 3) between the bounds (3,) of a band."""
    places = (values.reshape(-1, 3) - low) * (BINS / (high - low))
    bins = np.clip(places, 0, BINS - 1).astype(np.int64)
    return np.stack([np.bincount(bins[:, color], minlength=BINS) for color in range(3)])


def best_range(counts: npt.NDArray[np.int64], low: float, high: float) -> tuple[float, float]:
    """The range of least mean squared error for values with this histogram (BINS,) between two bounds.

    Rounding to steps of (b - a) / 255 costs a twelfth of a squared step; what is outside is moved to a or b.
    """
    edges = np.linspace(low, high, BINS + 1)
    centers = (edges[:-1] + edges[1:]) / 2
    share = np.cumsum(counts) / counts.sum()
    candidates = [(low, high)]
    for tail in TAILS:
        first = int(np.searchsorted(share, tail, side="right"))
        last = int(np.searchsorted(share, 1 - tail, side="left"))
        candidates.append((float(edges[first]), float(edges[min(last, BINS - 1) + 1])))

    def error(limits: tuple[float, float]) -> float:
        a, b = limits
        moved = centers - np.clip(centers, a, b)
        return float((counts * moved**2).sum() / counts.sum() + ((b - a) / 255) ** 2 / 12)

    return min(candidates, key=error)
