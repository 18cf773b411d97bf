"""What an ensemble reads of an image. Imports no DALI."""

from __future__ import annotations

from dataclasses import dataclass

from bandsplit.config.schema import RunConfig, Split


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
