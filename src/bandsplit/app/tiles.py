"""The bands of an image, as images for the eye."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bandsplit.inference.classifier import Classifier

STRONG = 99
"""Percentile of a detail band's absolute values that is shown as black or white."""


@dataclass(frozen=True, eq=False)
class Tile:
    """A band as an image."""

    pixels: NDArray[np.uint8]
    """(h, w, 3)."""
    contrast: float | None
    """Of a detail band: by how much its contrast is stretched; None: the band has natural color."""


@torch.inference_mode()
def tiles(model: Classifier, crop: Tensor) -> list[Tile]:
    """The N bands of a crop (3, H, W).

    A band whose weights all have one sign is a weighted mean of pixels, and is shown in natural color. All others are
    details: gray is 0, and black and white are what STRONG percent of its values do not exceed. A contrast of 1 would
    show the largest value that such a band can have, 255 · Σ_n |w_n| / 2 for weights w, as white.
    """
    centered = (model.split(crop[None])[:, 0] * model.std).double()
    mean = model.mean.double()
    shown = []
    for values, weights in zip(centered, model.matrix.double(), strict=True):
        total, size = weights.sum(), weights.abs().sum()
        contrast = None
        if total.abs() > 0.999 * size:
            pixels = values / total + mean
        else:
            details = values / (127.5 * size)
            strong = float(np.percentile(details.abs().numpy(), STRONG))
            contrast = 1 / max(strong, 1 / 255)
            pixels = 127.5 * (1 + contrast * details)
        image = pixels.round().clamp(0, 255).to(torch.uint8).movedim(0, -1)
        shown.append(Tile(image.numpy(), contrast))
    return shown
