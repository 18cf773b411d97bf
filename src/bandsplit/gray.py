"""Gray of more than 8 bits, scaled as DALI does; Pillow would clip it."""

import numpy as np
from PIL import Image


def with_8_bits(image: Image.Image) -> Image.Image:
    """Gray of 16 bits, whose white is 65535, or of floating point, whose white is 1, with 8 bits; others as they are.

    Raises ValueError for gray of integers that are signed or have 32 bits.
    """
    if image.mode == "I" and image.format != "PPM":
        raise ValueError("gray of 32 bits, or signed, whose white is not known; save it with 8 or 16 bits, unsigned")
    if not image.mode.startswith(("I", "F")):
        return image
    white = 1 if image.mode == "F" else 65535
    values = np.clip(np.nan_to_num(np.asarray(image, np.float32)), 0, white) * (255 / white)
    return Image.fromarray((values + 0.5).astype(np.uint8))
