"""Images resized as DALI's `fn.resize` does it, to a gray level: other libraries place the samples otherwise.

DALI rounds the sides of the result, but keeps the scale exact and the centers aligned. Filters are stretched when the
image gets smaller (antialiasing), and pixels beyond an edge are those at the edge.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def resize_shorter(image: Tensor, size: int, interpolation: str) -> Tensor:
    """Resizes an image (C, H, W), 0 to 255, so that its shorter side is `size`.

    Args:
        interpolation: "bilinear" or "bicubic" (Keys, *Cubic Convolution Interpolation*, 1981, with a = -1/2).

    Returns:
        (C, h, w), float32, rounded to whole numbers from 0 to 255.
    """
    scale = size / min(image.shape[-2:])
    for _ in range(2):  # along W, then along H: each time the last axis is resized and exchanged with the other
        channels, other, length = image.shape
        columns = image.float().permute(2, 0, 1).reshape(length, channels * other)
        resized = torch.sparse.mm(_weights(length, scale, interpolation), columns)
        image = resized.reshape(-1, channels, other).permute(1, 2, 0).transpose(1, 2)
    return image.clamp(0, 255).round()


def round_half_up(x: float) -> int:
    return math.floor(x + 0.5)


def _weights(length: int, scale: float, interpolation: str) -> Tensor:
    """Sparse (round(length * scale), length): what each sample takes of each pixel of a row."""
    samples = round_half_up(length * scale)
    stretch = max(1.0, 1 / scale)
    beyond = math.ceil(3 * stretch)
    pixels = torch.arange(-beyond, length + beyond)
    centers = length / 2 + (torch.arange(samples, dtype=torch.float64) + 0.5 - samples / 2) / scale
    weights = _kernel((pixels + 0.5 - centers[:, None]) / stretch, interpolation)
    weights /= weights.sum(1, keepdim=True)
    at_edges = pixels.clamp(0, length - 1)
    return torch.zeros(samples, length).double().index_add_(1, at_edges, weights).float().to_sparse()


def _kernel(x: Tensor, interpolation: str) -> Tensor:
    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0))
