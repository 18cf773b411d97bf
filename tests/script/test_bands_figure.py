"""The figure of a photograph and its bands: its contents, the file it writes, and its messages."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from script import bands_figure

from bandsplit.errors import UserError
from bandsplit.spectral import transforms

SCRIPT = Path(bands_figure.__file__)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """101 x 83 pixels of noise on a ramp: neither side is a multiple of a block."""
    ramp = np.linspace(40, 200, 101)[None, :, None]
    noise = np.random.default_rng(0).uniform(-40, 40, (83, 101, 3))
    path = tmp_path / "image.png"
    Image.fromarray((ramp + noise).astype(np.uint8)).save(path)
    return path


@pytest.mark.parametrize("block", [2, 4])
def test_figure_of_an_image(image: Path, tmp_path: Path, block: int) -> None:
    matrix = bands_figure.transform_matrix("dct2d", block)
    square = bands_figure.read_square(image, block)
    assert square.shape == (83 // block * block,) * 2 + (3,)
    figure = bands_figure.draw(square, matrix, "dct2d")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert [text for text in texts if text.startswith("band ")] == [f"band {k}" for k in range(block**2)]
    output = tmp_path / "new" / "bands.png"
    bands_figure.write_png(figure, output)
    with Image.open(output) as image:
        assert image.width == round(bands_figure.WIDTH / bands_figure.SIDE * bands_figure.PIXELS)
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("transform", ["dct2d", "dct1d", "hadamard"])
def test_low_band_is_the_image_and_details_of_a_flat_one_are_grey(transform: transforms.Kind) -> None:
    matrix = transforms.transform_matrix(transform, 2)
    color = np.array([0.2, 0.5, 0.9])
    shown, _ = bands_figure.displayed(bands_figure.split(np.tile(color, (8, 8, 1)), matrix), matrix)
    np.testing.assert_allclose(shown[0], np.broadcast_to(color, (4, 4, 3)))
    np.testing.assert_allclose(shown[1:], 0.5)


def test_details_share_one_factor(image: Path) -> None:
    matrix = transforms.transform_matrix("dct2d", 2)
    bands = bands_figure.split(bands_figure.read_square(image, 2), matrix)
    shown, factor = bands_figure.displayed(bands, matrix)
    np.testing.assert_allclose(shown[1:], (0.5 + factor * bands[1:] / 2).clip(0, 1))
    assert np.mean((shown[1:] == 0) | (shown[1:] == 1)) < 0.05


def test_pixels_of_the_identity_are_all_in_natural_color(image: Path) -> None:
    matrix = transforms.transform_matrix("identity", 2)
    square = bands_figure.read_square(image, 2)
    shown, factor = bands_figure.displayed(bands_figure.split(square, matrix), matrix)
    assert factor == 0
    np.testing.assert_allclose(shown[1], square[0::2, 1::2])


@pytest.mark.slow
def test_missing_file_ends_with_one_message(tmp_path: Path) -> None:
    path = tmp_path / "none.jpg"
    output = tmp_path / "bands.png"
    command = [sys.executable, str(SCRIPT), str(path), "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {path}: no such file; expected an image\n"
    assert not output.exists()


def test_what_is_no_image_or_too_small_is_named(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    with pytest.raises(UserError, match="notes.txt: not an image"):
        bands_figure.read_square(text, 2)
    small = tmp_path / "small.png"
    Image.new("RGB", (9, 3)).save(small)
    with pytest.raises(UserError, match="--block: 4 given, but .*small.png has 9 x 3 pixels"):
        bands_figure.read_square(small, 4)


@pytest.mark.parametrize(("transform", "block"), [("dct2d", 1), ("dct2d", 9), ("hadamard", 6)])
def test_blocks_that_cannot_be_drawn_are_refused(transform: transforms.Kind, block: int) -> None:
    with pytest.raises(UserError, match=str(block)):
        bands_figure.transform_matrix(transform, block)
