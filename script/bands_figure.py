"""Draw one photograph and its bands: python script/bands_figure.py [PICTURE] [--block 2] [--transform dct2d]"""

from __future__ import annotations

import argparse
import io
import math
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from einops import rearrange
from matplotlib import cbook, colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, Polygon, Rectangle
from PIL import Image, ImageOps, UnidentifiedImageError

from bandsplit.cli import entry
from bandsplit.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
LARGEST_BLOCK = 8

Transform = Literal["dct2d", "dct1d", "hadamard", "identity"]
Pixels = npt.NDArray[np.float64]
Color = tuple[float, float, float]
Point = tuple[float, float]
Place = tuple[int, int]  # row and column of a block, in blocks

# Positions and sizes in inches: x from the left edge, y from the vertical center.
WIDTH = 11.2
PHOTO_X, BLOCK_X, BANDS_X, NETWORKS_X, MEAN_X, LOGITS_X = 0.1, 3.25, 4.6, 7.97, 9.6, 10.36
SIDE = 2.7  # of the photograph, and of all bands together
PIXELS = 448  # pixels per SIDE: resolution of the figure, and maximum side of the photograph
CELLS = 0.74  # side of an enlarged block
PIXELS_Y, COEFFICIENTS_Y = 0.55, -1.29  # lower edges of the block before and after the transform
GAPS = 0.12  # between the columns of bands, together
NAME = 0.22  # room above a band
MEAN_RADIUS = 0.36
INK, SOFT, FAINT = "#222222", "#666666", "#c4c4c4"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", nargs="?", type=Path, help="photograph (default: Grace Hopper, from matplotlib)")
    parser.add_argument("--block", type=int, default=2, help=f"side of the pixel block, 2 to {LARGEST_BLOCK}")
    parser.add_argument("--transform", choices=get_args(Transform), default="dct2d")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "doc/bands.png", help="PNG file to write")
    arguments = parser.parse_args()

    if arguments.output.suffix.lower() != ".png":
        raise UserError(f"--output: {arguments.output} given; allowed: a name that ends in .png")
    matrix = transform_matrix(arguments.transform, arguments.block)
    square = read_square(arguments.image or default_image(), arguments.block)
    write_png(draw(square, matrix, arguments.transform), arguments.output)


# ---------------------------------------------------------------------------- photograph and bands


def default_image() -> Path:
    """The portrait of Grace Hopper that comes with matplotlib: a work of the US Navy, in the public domain."""
    return Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))


def transform_matrix(transform: Transform, block: int) -> Pixels:
    """(N, N), orthonormal. Raises UserError if the transform or the figure does not support the block."""
    from bandsplit.spectral import transforms

    if not 2 <= block <= LARGEST_BLOCK:
        raise UserError(f"--block: {block} given; allowed: 2 to {LARGEST_BLOCK}")
    try:
        return transforms.transform_matrix(transform, block)
    except ValueError as error:
        raise UserError(f"--transform {transform}: {error}") from None


def read_square(path: Path, block: int) -> Pixels:
    """A square crop of an image, (side, side, 3) in 0..1; side is at most PIXELS and a multiple of the block.

    Centered horizontally, above the center vertically, to keep the heads of portraits.
    Raises UserError if the image is missing, unreadable or smaller than the block.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected an image")
    try:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path}: not an image that can be read: {error}") from None
    if min(image.size) < block:
        raise UserError(f"--block: {block} given, but {path} has {image.width} x {image.height} pixels")
    scale = PIXELS / min(image.size)
    image.thumbnail((scale * image.width, scale * image.height), Image.Resampling.LANCZOS)
    side = min(image.size) // block * block
    left, top = (image.width - side) // 2, (image.height - side) // 5
    return np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float64) / 255


def split(square: Pixels, matrix: Pixels) -> Pixels:
    """(H, W, 3) -> (N, H/s, W/s, 3), by the reference `spectral.transforms.split`."""
    import torch

    from bandsplit.spectral import transforms

    images = torch.from_numpy(rearrange(square, "h w c -> 1 c h w").copy())
    return rearrange(transforms.split(images, matrix, block_of(matrix)).numpy(), "n 1 c h w -> n h w c")


def block_of(matrix: Pixels) -> int:
    return math.isqrt(len(matrix))


def displayed(bands: Pixels, matrix: Pixels) -> tuple[Pixels, int]:
    """Bands (N, h, w, 3) as colors in 0..1, and the contrast factor of the detail bands; 0 if there are none.

    A low band, whose row of the matrix has a non-zero sum, is divided by the sum and shows natural color. All others
    are detail bands: divided by the block, scaled by one common factor and shown around mid-gray.
    """
    sums = matrix.sum(axis=1)
    low = np.abs(sums) > 1e-9
    shown = np.empty_like(bands)
    shown[low] = bands[low] / sums[low, None, None, None]
    if low.all():
        return shown.clip(0, 1), 0
    details = bands[~low] / block_of(matrix)
    strong = float(np.percentile(np.abs(details), 97))
    factor = max(1, int(0.5 / max(strong, 0.01)))
    shown[~low] = 0.5 + factor * details
    return shown.clip(0, 1), factor


def liveliest_block(square: Pixels, block: int) -> Place:
    """Row and column of the block with the largest variance, right of the center of the image."""
    count = len(square) // block
    blocks = rearrange(square, "(h r) (w s) c -> h w (r s) c", r=block, s=block)
    variation = blocks.var(axis=2).sum(axis=-1)
    top, left = count // 4, count // 2
    middle = variation[top : max(top + 1, 3 * count // 4), left : max(left + 1, 3 * count // 4)]
    row, column = np.unravel_index(middle.argmax(), middle.shape)
    return top + int(row), left + int(column)


# ---------------------------------------------------------------------------- drawing


def draw(square: Pixels, matrix: Pixels, transform: Transform) -> Figure:
    """The whole drawing, from left to right."""
    block = block_of(matrix)
    shown, factor = displayed(split(square, matrix), matrix)
    colors = band_colors(len(matrix))
    top = grid_height(block) / 2 + 0.5
    figure = Figure(figsize=(WIDTH, 2 * top), dpi=PIXELS / SIDE, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(-top, top))
    axes.axis("off")
    place = liveliest_block(square, block)
    draw_photograph(axes, square, block, place)
    draw_transform(axes, square, block, place, transform, colors)
    draw_bands(axes, shown, factor, colors)
    draw_networks(axes, block, colors)
    draw_fusion(axes)
    return figure


def band_colors(count: int) -> list[Color]:
    return [colormaps["plasma"](x)[:3] for x in np.linspace(0.06, 0.74, count)]


def grid_height(block: int) -> float:
    """All bands with their names."""
    return SIDE + block * NAME


def draw_photograph(axes: Axes, square: Pixels, block: int, place: Place) -> None:
    """The photograph, a frame around one block, and lines from it to the enlarged block."""
    paint(axes, square, PHOTO_X, -SIDE / 2, SIDE)
    titles(axes, PHOTO_X + SIDE / 2, "photograph", f"{len(square)} × {len(square)} pixels")
    row, column = place
    scale = SIDE * block / len(square)
    x, y = PHOTO_X + (column + 0.5) * scale, SIDE / 2 - (row + 0.5) * scale
    half = max(scale / 2, 0.05)
    for width, color in ((2.6, "white"), (1.2, INK)):
        for bottom in (False, True):
            ends = y - half if bottom else y + half, PIXELS_Y if bottom else PIXELS_Y + CELLS
            axes.plot((x + half, BLOCK_X), ends, color=color, lw=0.7 * width, solid_capstyle="butt")
        axes.add_patch(Rectangle((x - half, y - half), 2 * half, 2 * half, fill=False, ec=color, lw=width, zorder=3))


def draw_transform(
    axes: Axes, square: Pixels, block: int, place: Place, transform: Transform, colors: list[Color]
) -> None:
    """The enlarged block, and below it its coefficients in the colors of their bands."""
    row, column = (index * block for index in place)
    paint(axes, square[row : row + block, column : column + block], BLOCK_X, PIXELS_Y, CELLS)
    paint(axes, np.array(colors).reshape(block, block, 3), BLOCK_X, COEFFICIENTS_Y, CELLS)
    middle, cell = BLOCK_X + CELLS / 2, CELLS / block
    for bottom in (PIXELS_Y, COEFFICIENTS_Y):
        for n in range(1, block):
            axes.plot((BLOCK_X + n * cell,) * 2, (bottom, bottom + CELLS), color="white", lw=1)
            axes.plot((BLOCK_X, BLOCK_X + CELLS), (bottom + n * cell,) * 2, color="white", lw=1)
    for k in range(len(colors)):
        x, y = BLOCK_X + (k % block + 0.5) * cell, COEFFICIENTS_Y + CELLS - (k // block + 0.5) * cell
        axes.text(x, y, str(k), fontsize=min(10, 44 * cell), color="white", ha="center", va="center_baseline")
    arrow(axes, (middle, PIXELS_Y - 0.05), (middle, COEFFICIENTS_Y + CELLS + 0.05))
    axes.text(middle + 0.12, 0, f"transform\n{transform}", fontsize=10, color=INK, va="center", linespacing=1.4)
    arrow(axes, (BLOCK_X + CELLS + 0.1, COEFFICIENTS_Y + CELLS / 2), (BANDS_X - 0.1, COEFFICIENTS_Y + CELLS / 2))
    titles(axes, middle, f"each {block} × {block} block", "coefficient k → band k")


def draw_bands(axes: Axes, shown: Pixels, factor: int, colors: list[Color]) -> None:
    """The bands, band u * block + v in row u and column v."""
    block = math.isqrt(len(shown))
    side, gap = SIDE / block, GAPS / (block - 1)
    for k, (band, color) in enumerate(zip(shown, colors, strict=True)):
        left = BANDS_X + k % block * (side + gap)
        bottom = grid_height(block) / 2 - (k // block + 1) * (side + NAME)
        paint(axes, band, left, bottom, side, color)
        name = f"band {k}" if block <= 4 else str(k)
        axes.text(left, bottom + side + 0.05, name, fontsize=10 if block <= 3 else 9, color=color)
    height, width = shown.shape[1:3]
    caption = f"details: gray is 0, contrast × {factor}" if factor else "each in natural color"
    titles(axes, BANDS_X + (SIDE + GAPS) / 2, f"{len(shown)} bands of {height} × {width}", caption)


def draw_networks(axes: Axes, block: int, colors: list[Color]) -> None:
    """One trapezoid per band, with a line to the mean."""
    pitch = grid_height(block) / len(colors)
    height = min(0.75 * pitch, 0.5)
    length = min(0.95, max(0.4, 3 * height))
    arrow(axes, (BANDS_X + SIDE + GAPS + 0.1, 0), (NETWORKS_X - 0.1, 0))
    for k, color in enumerate(colors):
        y = grid_height(block) / 2 - (k + 0.5) * pitch
        a, b = height / 2, height / 3
        x, end = NETWORKS_X, NETWORKS_X + length
        axes.add_patch(Polygon([(x, y - a), (x, y + a), (end, y + b), (end, y - b)], fc=color, ec="none"))
        axes.plot((end, MEAN_X), (y, 0), color=color, lw=1.3 if block <= 3 else 0.9, zorder=1)
        if pitch > 0.3:
            axes.text((x + end) / 2, y, f"network {k}", fontsize=10, color="white", ha="center", va="center")
    titles(axes, NETWORKS_X + 0.55, "one network per band", "trained independently")


def draw_fusion(axes: Axes) -> None:
    """The mean of the logits, and bars for the fused logits, the largest highlighted."""
    axes.add_patch(Circle((MEAN_X, 0), MEAN_RADIUS, fc="white", ec=INK, lw=1.2, zorder=3))
    axes.text(MEAN_X, 0, "mean of\nlogits", fontsize=10, color=INK, ha="center", va="center", zorder=4)
    arrow(axes, (MEAN_X + MEAN_RADIUS + 0.03, 0), (LOGITS_X - 0.1, 0))
    for n, logit in enumerate((0.32, 0.2, 0.6, 0.14, 0.26)):
        color = INK if logit == 0.6 else FAINT
        axes.add_patch(Rectangle((LOGITS_X, 0.32 - 0.16 * n - 0.055), logit, 0.11, fc=color, ec="none"))
    titles(axes, LOGITS_X + 0.24, "prediction", "")


def paint(axes: Axes, image: Pixels, left: float, bottom: float, side: float, edge: Color | str = INK) -> None:
    """An image (H, W, 3) in a frame."""
    extent = (left, left + side, bottom, bottom + side)
    axes.imshow(image, extent=extent, interpolation="nearest", aspect="auto")
    axes.add_patch(Rectangle((left, bottom), side, side, fill=False, ec=edge, lw=1.2, zorder=2))


def arrow(axes: Axes, start: Point, end: Point) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=INK, lw=1.3, shrinkA=0, shrinkB=0)
    )


def titles(axes: Axes, x: float, above: str, below: str) -> None:
    low, high = axes.get_ylim()
    axes.text(x, high - 0.22, above, fontsize=12, fontweight="bold", color=INK, ha="center", va="center")
    axes.text(x, low + 0.22, below, fontsize=10, color=SOFT, ha="center", va="center")


def write_png(figure: Figure, path: Path) -> None:
    """Writes the figure with a palette of 256 colors, which makes the file much smaller without visible loss.

    Raises UserError if the file cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    image = Image.open(buffer).convert("RGB").quantize(256)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, format="PNG", optimize=True)
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    entry.run(main)
