"""Uploaded files: what is refused before it is decoded, and why."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image

from bandsplit.errors import UserError
from bandsplit.inference import preparation

MOST_BYTES = 20 * 2**20
MOST_PIXELS = 50_000_000
MOST_RATIO = 50
"""Of the longer side to the shorter one, which is resized to a fixed length."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
"""Of Pillow; none of them starts another program, as its EPS does."""


def opened(path: Path) -> Image.Image:
    """Decodes an image whose size in bytes and whose header are within the limits, to RGB.

    Raises UserError, in a sentence for the page, if the file is none or cannot be decoded.
    """
    name, size = path.name, path.stat().st_size
    if not size:
        raise UserError(f"{name} is empty: it has 0 bytes.")
    if size > MOST_BYTES:
        raise UserError(
            f"{name} has {size / 2**20:.1f} MiB; files of at most {MOST_BYTES / 2**20:.0f} MiB are read. Save it "
            "smaller."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:
        raise UserError(f"{name} has too many pixels; at most {_million(MOST_PIXELS)} are decoded.") from None
    except MemoryError:
        raise
    except Exception:  # damaged bytes can make decoders raise anything
        raise UserError(f"{name} is not an image in a format that is read: {_listed(FORMATS)}.") from None
    with image:
        _require_fitting(name, *image.size)
        try:
            image.load()
        except MemoryError:
            raise
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise UserError(f"{name} is damaged or cut off, and cannot be decoded: {reason}.") from None
        try:
            return preparation.rgb(image)
        except UserError as error:
            raise UserError(f"{name} is {error}.") from None


def _require_fitting(name: str, width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise UserError(
            f"{name} is {width:,} × {height:,}, {_million(width * height)} pixels; at most {_million(MOST_PIXELS)} are "
            "decoded. Save it smaller."
        )
    if max(width, height) > MOST_RATIO * min(width, height):
        raise UserError(
            f"{name} is {width:,} × {height:,} pixels; the longer side may be {MOST_RATIO} times the shorter one."
        )


def _million(count: int) -> str:
    return f"{count / 1e6:.0f} million"


def _listed(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"
