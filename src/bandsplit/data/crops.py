"""What is shown of a validation image: crops, of which the class probabilities are averaged."""

from __future__ import annotations

from dataclasses import dataclass

from bandsplit.data.corruption import Corruption


@dataclass(frozen=True)
class Crop:
    """Where a crop lies in the resized image, as a fraction of the way it can move, and what is done to it."""

    x: float = 0.5
    """0: left, 1: right."""
    y: float = 0.5
    """0: top, 1: bottom."""
    mirror: bool = False
    corruption: Corruption | None = None
    """The same for all crops of an image."""


CENTER = (Crop(),)
"""The default."""

FLIP = (Crop(), Crop(mirror=True))

_FIVE = ((0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5))

TEN = (*(Crop(x, y) for x, y in _FIVE), *(Crop(1 - x, y, mirror=True) for x, y in _FIVE))
"""Corners and center of the image and of its mirror image, in the order of torchvision's `ten_crop` (Krizhevsky et al.,
*ImageNet Classification with Deep Convolutional Neural Networks*, 2012, section 4.1)."""

CROPS = {"center": CENTER, "flip": FLIP, "ten": TEN}
