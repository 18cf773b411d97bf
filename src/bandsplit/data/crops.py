"""Crops of a validation image, of which the class probabilities are averaged."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Crop:
    """Where a crop lies in the resized image, as a fraction of the way it can move, and whether it is mirrored."""

    x: float = 0.5
    """0: left, 1: right."""
    y: float = 0.5
    """0: top, 1: bottom."""
    mirror: bool = False


CENTER = (Crop(),)
"""The default."""

FLIP = (Crop(), Crop(mirror=True))

_FIVE = ((0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5))

TEN = (*(Crop(x, y) for x, y in _FIVE), *(Crop(1 - x, y, mirror=True) for x, y in _FIVE))
"""Corners and center of the image and of its mirror image, in the order of torchvision's `ten_crop` (Krizhevsky et al.,
*ImageNet Classification with Deep Convolutional Neural Networks*, 2012, section 4.1)."""

CROPS = {"center": CENTER, "flip": FLIP, "ten": TEN}
