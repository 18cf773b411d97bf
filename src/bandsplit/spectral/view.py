"""What an ensemble is shown of an image; needs no DALI."""

from __future__ import annotations

from dataclasses import dataclass

from bandsplit.config.schema import RunConfig, Split


@dataclass(frozen=True)
class View:
    """What an ensemble is shown of an image: bands of a transform, and which mean and deviation colors have."""

    split: Split
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, config: RunConfig) -> View:
        return cls(config.split, config.data.mean, config.data.std)
