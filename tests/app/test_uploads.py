"""Uploads: what is refused says why before anything is decoded, and what is read is read as `predict` reads it."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from bandsplit.app import uploads
from bandsplit.errors import UserError
from bandsplit.inference import preparation
from tests.app.files import photograph
from tests.inference.models import classifier


def header(width: int, height: int) -> bytes:
    """A PNG without any data after its header: nothing that decodes it gets far."""
    data = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + data + struct.pack(">I", zlib.crc32(data)) + b"\0\0\x10\0IDAT"


def tiff(mode: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (40, 30)).save(file, "TIFF")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "told"),
    [  # content of image.jpg, and words of the sentence
        (b"", "image.jpg is empty: it has 0 bytes."),
        (b"only a text\n" * 100, "image.jpg is not an image in a format that is read: JPEG, PNG, "),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "is not an image in a format that is read"),
        (header(10_000, 10_000), "image.jpg is 10,000 × 10,000, 100 million pixels; at most 50 million are decoded."),
        (header(60_000, 60_000), "image.jpg has too many pixels; at most 50 million are decoded."),
        (header(20_000, 300), "image.jpg is 20,000 × 300 pixels; the longer side may be 50 times the shorter one."),
        (header(400, 300), "image.jpg is damaged or cut off, and cannot be decoded: "),
        (header(400, 300) + bytes(20 * 2**20), "image.jpg has 20.0 MiB; files of at most 20 MiB are read."),
        (
            tiff("I"),
            "image.jpg is gray of 32 bits, or signed, whose white is not known; save it with 8 or 16 bits, unsigned.",
        ),
    ],
    ids=["empty", "text", "postscript", "100 megapixels", "bomb", "long", "cut off", "large", "32 bits"],
)
def test_what_is_refused_says_why(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        uploads.opened(path)
    assert told in str(refused.value)
    assert str(tmp_path) not in str(refused.value)


@pytest.mark.parametrize("error", [MemoryError, KeyError])
def test_a_lack_of_memory_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    photograph(40, 30).save(tmp_path / "image.png")
    for owner, name, told in (
        (PngImageFile, "load", "image.png is damaged or cut off, and cannot be decoded: KeyError."),
        (Image, "open", "image.png is not an image in a format that is read"),
    ):
        monkeypatch.setattr(owner, name, fail)
        with pytest.raises(MemoryError if error is MemoryError else UserError) as raised:
            uploads.opened(tmp_path / "image.png")
        assert error is MemoryError or str(raised.value).startswith(told)


def test_whatever_colors_are_read_as_predict_reads_them(tmp_path: Path, config_file: Path) -> None:
    image, description = photograph(70, 50), classifier(config_file).description
    sixteen = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    alpha = image.copy()
    alpha.putalpha(image.convert("L"))
    files = {
        "rgb.jpg": image,
        "cmyk.jpg": image.convert("CMYK"),
        "gray.png": image.convert("L"),
        "sixteen.png": sixteen,
        "float.tiff": Image.fromarray(np.asarray(image.convert("L")) / np.float32(255)),
        "alpha.png": alpha,
        "palette.gif": image.quantize(16),
        "one_bit.tiff": image.convert("1"),
        "a.webp": image,
    }
    for name, each in files.items():
        each.save(tmp_path / name)
        ours = preparation.prepared(uploads.opened(tmp_path / name), description)
        assert torch.equal(ours, preparation.prepared(tmp_path / name, description)), name
