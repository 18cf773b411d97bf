"""The center of a resized image as DALI's `fn.resize` makes it, to a gray level: others place samples otherwise.

DALI rounds the sides of the result, but keeps the scale exact and the centers aligned. Filters are stretched when the
image gets smaller (antialiasing), and pixels beyond an edge are those at the edge.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def resized_center(image: Tensor, shorter: int, size: int, interpolation: str) -> Tensor:
    """The center crop of an image (C, H, W), 0 to 255, that is resized so that its shorter side is `shorter`.

    Only the crop is computed, so that time and memory do not depend on how long the longer side is.

    Args:
        size: sides of the crop, at most `shorter`.
        interpolation: "bilinear" or "bicubic" (Keys, *Cubic Convolution Interpolation*, 1981, with a = -1/2).

    Returns:
        (C, size, size), float32, rounded to whole numbers from 0 to 255.
    """
    scale = shorter / min(image.shape[-2:])
    (rows, down), (columns, across) = (_weights(length, scale, size, interpolation) for length in image.shape[-2:])
    image = image[:, rows, columns].float()
    for weights in (across, down):  # each time the last axis is resized and exchanged with the other
        channels, other, length = image.shape
        resized = torch.sparse.mm(weights, image.permute(2, 0, 1).reshape(length, channels * other))
        image = resized.reshape(-1, channels, other).permute(1, 2, 0).transpose(1, 2)
    return image.clamp(0, 255).round()


def _round_half_up(x: float) -> int:
    return math.floor(x + 0.5)


def _weights(length: int, scale: float, size: int, interpolation: str) -> tuple[slice, Tensor]:
    """The pixels of a row that the center crop needs, and what each of its samples takes of each: sparse (size, n)."""
    samples = _round_half_up(length * scale)
    first = _round_half_up((samples - size) / 2)
    centers = length / 2 + (first + torch.arange(size, dtype=torch.float64) + 0.5 - samples / 2) / scale
    stretch = max(1.0, 1 / scale)
    reach = 3 * stretch
    begin, end = max(0, math.floor(centers[0] - reach)), min(length, math.ceil(centers[-1] + reach))
    pixels = torch.arange(begin - math.ceil(reach), end + math.ceil(reach))
    weights = _kernel((pixels + 0.5 - centers[:, None]) / stretch, interpolation)
    weights /= weights.sum(1, keepdim=True)
    at_edges = pixels.clamp(begin, end - 1) - begin
    needed = torch.zeros(size, end - begin).double().index_add_(1, at_edges, weights)
    return slice(begin, end), needed.float().to_sparse()


def _kernel(x: Tensor, interpolation: str) -> Tensor:
    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0))
