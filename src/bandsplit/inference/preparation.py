"""From an image file, a Pillow image, an array or a tensor to the crop that a validation image would give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from bandsplit.errors import UserError
from bandsplit.gray import with_8_bits
from bandsplit.inference.description import Description
from bandsplit.inference.resizing import resized_center

Source = str | Path | Image.Image | npt.NDArray[np.generic] | Tensor
"""A file, a Pillow image, an array (H, W, 3) or (H, W), or a tensor (3, H, W) or (1, H, W); RGB, or gray.

Arrays and tensors are uint8 from 0 to 255, or floating point from 0 to 1.
"""


def pixels(image: Source) -> Tensor:
    """The image as (3, H, W), RGB; uint8, or float32 from 0 to 1.  A file is not rotated by EXIF, as in training.

    Raises UserError if a file cannot be read or decoded, or has gray of integers that are signed or have 32 bits,
    and ValueError if an array or tensor is not as in `Source`.
    """
    if isinstance(image, str | Path):
        image = _decoded(Path(image))
    if isinstance(image, Image.Image):
        image = np.asarray(rgb(image))
    if isinstance(image, np.ndarray):
        tensor = torch.from_numpy(np.array(image))
        tensor = tensor[None] if tensor.ndim == 2 else tensor.movedim(-1, 0)
    else:
        tensor = image.cpu()
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3) or not tensor.numel():
        raise ValueError(
            f"image of shape {tuple(image.shape)}: expected an array (H, W, 3) or (H, W), or a tensor (3, H, W)"
        )
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise ValueError(f"image of dtype {image.dtype}: expected uint8 from 0 to 255, or floating point from 0 to 1")
    if tensor.is_floating_point() and not (tensor.min() >= -0.01 and tensor.max() <= 1.01):
        raise ValueError(f"image with values {tensor.min():g} to {tensor.max():g}: expected 0 to 1, or uint8")
    return (tensor if tensor.dtype == torch.uint8 else tensor.float()).expand(3, -1, -1)


def prepared(image: Source, description: Description) -> Tensor:
    """The center crop of the resized image, (3, val_size, val_size), uint8, as DALI makes it in validation.

    Raises UserError and ValueError as `pixels` does.
    """
    full = pixels(image)
    scaled = full * 255 if full.is_floating_point() else full
    size, interpolation = description.val_size, description.interpolation
    return resized_center(scaled, description.resize_size, size, interpolation).byte()


def _decoded(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes can make decoders raise anything
        reason = getattr(error, "strerror", None) or str(error).replace(f" {str(path)!r}", "") or type(error).__name__
        raise UserError(f"{path}: cannot be read as an image: {reason}") from error


def rgb(image: Image.Image) -> Image.Image:
    """The image with 8 bits for each color, as DALI decodes it: 1.0 is the white of floating point.

    Raises UserError if it has gray of integers that are signed or have 32 bits.
    """
    try:
        return with_8_bits(image).convert("RGB")
    except ValueError as error:
        raise UserError(str(error)) from None
