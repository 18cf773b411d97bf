"""What an ensemble reads of an image. Imports no DALI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from bandsplit.config.schema import RunConfig, Split
from bandsplit.spectral import transforms

T = TypeVar("T")


@dataclass(frozen=True)
class View:
    """What an ensemble reads of an image: the spectral split, and the normalization before it.

    A run and its teacher may have different views of the same images.
    """

    split: Split
    mean: tuple[float, float, float]
    """Mean of each color, on the 0..255 scale of the pixels."""
    std: tuple[float, float, float]
    """Standard deviation of each color, on the same scale."""

    @classmethod
    def of(cls, config: RunConfig) -> View:
        return cls(config.split, config.data.mean, config.data.std)

    @property
    def inputs(self) -> list[tuple[int, ...]]:
        """The different lists of bands that branches read; branches with the same list share their input."""
        return list(dict.fromkeys(self.split.groups))

    def of_branches(self, inputs: Sequence[T]) -> list[T]:
        """The input of each branch, of one for each of `inputs`."""
        found = dict(zip(self.inputs, inputs, strict=True))
        return [found[group] for group in self.split.groups]

    @property
    def factors(self) -> npt.NDArray[np.float64]:
        """(N,), by which each band is multiplied: 1 / σ^γ with γ = `split.scale`."""
        if not self.split.scale:
            return np.ones(self.split.bands)
        assert self.split.sigma is not None, "split.scale without split.sigma, which is measured when a run starts"
        return np.asarray(self.split.sigma, dtype=np.float64) ** -self.split.scale

    @property
    def matrix(self) -> npt.NDArray[np.float64]:
        """(N, N), the transform of a block with the factors of the bands in its rows."""
        split = self.split
        return self.factors[:, None] * transforms.transform_matrix(split.transform, split.block, split.norm)
