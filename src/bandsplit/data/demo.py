"""Images for a first run: a small JPEG classification data set that is drawn, not downloaded.

A class is a shape with a fine texture. The mean of every 2x2 block shows the shape but not the texture, so five of the
ten classes look like the other five. The detail bands show the texture, but little of the shape: outlines are soft, and
the texture is strong in one spot only. All bands together distinguish all ten classes.

Lengths are in units of an image's shorter side, so that resizing does not change them; x points right and y down from
the image center. Colors are RGB, 0 to 255.
"""

import colorsys
import io
import math
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from bandsplit.cpus import available_cpus
from bandsplit.errors import UserError
from bandsplit.paths import writing_to
from bandsplit.progress import followed

Array = NDArray[np.float64]

SHAPES = ("disc", "heart", "ring", "star", "triangle")
PERIOD = {"checkered": 2.7, "striped": 2.4}
"""Period of each texture, along both axes or the one it varies in, in pixels of an image whose shorter side was resized
to SIDE. It is above 2 pixels, the limit of the full resolution, and far enough below 4 pixels, the limit of half the
resolution, that the mean of 2x2 blocks keeps at most a tenth of the texture's energy."""
CLASSES = tuple(f"{shape}_{texture}" for shape in SHAPES for texture in PERIOD)
SPLITS = ("train", "val")

SIDE = 72
"""Shorter side of the smallest images, pixels; that of the largest is twice as long."""
GRAY = 0.04
"""Fraction of images saved as grayscale JPEG files."""
EDGE_BLUR = 0.02
"""Standard deviation of the blur on outlines: soft enough to be faint in the detail bands."""
OVERSAMPLING = 4
"""Outlines are drawn this many times larger and averaged down."""
BRIGHTEST = 220.0
"""Largest channel value of a plain color: leaves room for lights and texture."""

# ------------------------------------------------------------------------------------------------------------ data set


@dataclass(frozen=True)
class ImageSpec:
    """One image to draw; these five numbers determine every byte of its file."""

    seed: int
    split: int
    label: int
    index: int
    side: int

    @property
    def path(self) -> Path:
        """Path of the file, relative to the data set's folder."""
        return Path(SPLITS[self.split], CLASSES[self.label], f"{self.index:05d}.jpg")


def generate(
    root: Path,
    *,
    seed: int = 0,
    train_per_class: int = 200,
    val_per_class: int = 50,
    side: int = SIDE,
    workers: int | None = None,
) -> None:
    """Writes `root`/{train,val}/CLASS/INDEX.jpg with `workers` processes (default: one for each available CPU).

    Args:
        side: pixels of the shorter side of the smallest images, at which the textures are as described at PERIOD.

    The files depend on `seed` and `side` alone, not on `workers`. `root` appears only when it is complete.

    Raises UserError if `root` exists or cannot be written, or if a worker is killed; nothing is left behind.
    """
    root = root.absolute()
    images = [
        ImageSpec(seed, split, label, index, side)
        for split, count in enumerate((train_per_class, val_per_class))
        for label in range(len(CLASSES))
        for index in range(count)
    ]
    with writing_to(root):
        if root.exists():
            raise _exists(root)
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}.", suffix=".partial", dir=root.parent) as temporary:
            # In a subfolder: the data set must not get the temporary folder's permissions (0700).
            unfinished = Path(temporary, root.name)
            for split in SPLITS:
                for name in CLASSES:
                    (unfinished / split / name).mkdir(parents=True)
            _write_all(unfinished, images, workers or available_cpus())
            try:
                unfinished.rename(root)
            except OSError:
                if root.exists():  # another process was faster
                    raise _exists(root) from None
                raise


def _exists(root: Path) -> UserError:
    return UserError(f"{root}: exists already; demo images are only written to a new folder (delete this one first)")


def _write_all(root: Path, images: list[ImageSpec], workers: int) -> None:
    def follow(written: Iterator[None]) -> None:
        for _ in followed(written, "drawing demo images", len(images)):
            pass

    write = partial(_write, root)
    if workers == 1:
        follow(map(write, images))
        return
    # Spawned, not forked: the caller may already run threads (torch, DALI), and forking those can deadlock.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            follow(pool.map(write, images, chunksize=16))
        except BrokenProcessPool as error:
            raise UserError(
                f"{root.name}: one of the {workers} processes that draw these images was killed, perhaps out of "
                "memory; try again"
            ) from error


def _write(root: Path, spec: ImageSpec) -> None:
    rng = np.random.default_rng([spec.seed, spec.split, spec.label, spec.index])
    shape, texture = CLASSES[spec.label].split("_")
    image = Image.fromarray(draw(rng, shape, texture, spec.side))
    if rng.random() < GRAY:
        image = image.convert("L")
    subsampling = str(rng.choice(["4:4:4", "4:2:2", "4:2:0"]))
    encoded = io.BytesIO()  # Pillow does not notice when a full disk takes only a part
    image.save(encoded, "JPEG", quality=int(rng.integers(75, 96)), subsampling=subsampling)
    (root / spec.path).write_bytes(encoded.getbuffer())


# ---------------------------------------------------------------------------------------------------------- an image


def draw(rng: Generator, shape: str, texture: str, smallest: int = SIDE) -> NDArray[np.uint8]:
    """A textured shape in front of an out-of-focus background: (height, width, 3).

    The same `rng` gives the same scene with every texture.
    """
    side = int(rng.integers(smallest, 2 * smallest + 1))
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    width, height = round(side * max(1.0, aspect)), round(side * max(1.0, 1 / aspect))
    x, y = _axis(width, side)[None, :], _axis(height, side)[:, None]
    back, front = _colors(rng)

    outline = _outline(rng, shape)
    mask = _blur(_mask(shape, outline, x, y, side), EDGE_BLUR * side)
    shadow = rng.uniform(0, 0.2) * _blur(_mask(shape, outline + np.array([0.02, 0.04]), x, y, side), 0.05 * side)
    light = 1 + 0.15 * _ramp(rng, x, y)
    relief = _relief(rng, texture, PERIOD[texture] / smallest, x, y, mask, side)
    surface = front * (light + relief)[..., None]
    image = _background(rng, back, x, y) * (1 - shadow)[..., None]
    image += mask[..., None] * (surface - image)
    image *= (1 - 0.25 * (x**2 + y**2))[..., None]  # vignetting
    image += _grain(rng, (height, width), side)
    return (image + 0.5).clip(0, 255).astype(np.uint8)


def _axis(pixels: int, side: int) -> Array:
    """Coordinates of pixel centers (pixels,)."""
    return (np.arange(pixels) + 0.5 - pixels / 2) / side


def _colors(rng: Generator) -> tuple[Array, Array]:
    """Colors of background and shape, (3,) each: the shape is darker and more saturated, sometimes only slightly."""
    hue = rng.random()
    apart = rng.uniform(0.06, 0.5) * rng.choice([-1, 1])
    luma = rng.uniform(135, 185)
    back = _color(hue, rng.uniform(0.05, 0.25), luma)
    front = _color(hue + apart, rng.uniform(0.45, 0.7), luma - rng.uniform(20, 60))
    return back, back + rng.uniform(0.4, 1) * (front - back)


def _color(hue: float, saturation: float, luma: float) -> Array:
    """RGB (3,) of a given luma; a hue too dark for it (blue) is mixed with white."""
    color = BRIGHTEST * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, 1))
    pure = float(color @ (0.299, 0.587, 0.114))  # ITU-R BT.601, as in JPEG
    white = max(0.0, (luma - pure) / (BRIGHTEST - pure))
    return color * min(1.0, luma / pure) * (1 - white) + BRIGHTEST * white


def _outline(rng: Generator, shape: str) -> Array:
    """A closed polygon of x, y: (points, 2)."""
    turn = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    match shape:
        case "disc" | "ring":
            points = np.stack([np.sin(turn), np.cos(turn)], 1)
        case "heart":
            height = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
            points = np.stack([16 * np.sin(turn) ** 3, -height - 2.5], 1) / 15
        case "star":
            corners = turn[::12]
            points = np.stack([np.sin(corners), -np.cos(corners)], 1) * np.tile([1.15, 0.52], 5)[:, None]
        case "triangle":
            corners = turn[::40]
            points = 1.2 * np.stack([np.sin(corners), -np.cos(corners)], 1) + (0, 0.2)
        case _:
            raise AssertionError(f"unknown shape {shape!r}")
    angle = math.radians(rng.uniform(-22, 22))
    rotation = [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
    return points @ rotation * rng.uniform(0.21, 0.35) + rng.uniform(-0.12, 0.12, 2)


def _mask(shape: str, outline: Array, x: Array, y: Array, side: int) -> Array:
    """Fraction of every pixel that the shape covers: (height, width)."""
    width, height = x.size * OVERSAMPLING, y.size * OVERSAMPLING
    canvas = Image.new("L", (width, height))
    pen = ImageDraw.Draw(canvas)
    points = outline * (side * OVERSAMPLING) + (width / 2, height / 2)
    pen.polygon(points.flatten().tolist(), fill=255)
    if shape == "ring":
        pen.polygon(((points + points.mean(0)) / 2).flatten().tolist(), fill=0)
    return np.asarray(canvas.reduce(OVERSAMPLING)) / 255


def _blur(mask: Array, radius: float) -> Array:
    """Gaussian blur of values 0 to 1; standard deviation in pixels."""
    image = Image.fromarray((255 * mask + 0.5).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(image) / 255


def _ramp(rng: Generator, x: Array, y: Array) -> Array:
    """Light from one side, about -1 to 1 across the image: (height, width)."""
    angle = rng.uniform(0, 2 * np.pi)
    return 2 * (x * math.cos(angle) + y * math.sin(angle))


def _distance(x: Array, y: Array, a: float, b: float) -> Array:
    """From every pixel to the point (a, b): (height, width)."""
    return np.sqrt((x - a) ** 2 + (y - b) ** 2)


def _background(rng: Generator, color: Array, x: Array, y: Array) -> Array:
    """A gradient with out-of-focus lights, each a pale disc (bokeh): (height, width, 3)."""
    light = 1 + 0.1 * _ramp(rng, x, y)
    for _ in range(rng.integers(5, 11)):
        a, b, radius, power = rng.uniform((-0.65, -0.65, 0.06, 0.03), (0.65, 0.65, 0.22, 0.14))
        light += power * np.clip((radius - _distance(x, y, a, b)) / (3 * EDGE_BLUR) + 0.5, 0, 1)
    tint = 1 + 0.08 * _ramp(rng, x, y)[..., None] * rng.uniform(-1, 1, 3)
    return light[..., None] * tint * color


def _relief(rng: Generator, texture: str, period: float, x: Array, y: Array, mask: Array, side: int) -> Array:
    """The texture as relative brightness, with mean 0 so that it vanishes in a blurred image: (height, width).

    It is strong in one spot and fades elsewhere, so that it does not trace the outline.
    """
    frequency = 2 * np.pi / (period * rng.uniform(0.94, 1.06))
    tilt = math.radians(rng.uniform(-8, 8))
    phase, other_phase = rng.uniform(0, 2 * np.pi, 2)
    wave: Array = np.cos(frequency * (y * math.cos(tilt) - x * math.sin(tilt)) + phase)
    if texture == "checkered":
        wave *= np.cos(frequency * (x * math.cos(tilt) + y * math.sin(tilt)) + other_phase)
    inside = _blur(mask, 0.03 * side)
    row, column = rng.choice(np.argwhere(inside > 0.8 * inside.max()))
    spot = np.exp(-((_distance(x, y, x[0, column], y[row, 0]) / rng.uniform(0.08, 0.15)) ** 2) / 2)
    return wave * inside * (0.05 + 0.95 * spot) * rng.uniform(0.2, 0.42)


def _grain(rng: Generator, size: tuple[int, int], side: int) -> Array:
    """Film grain, partly colored, of three sizes: one pixel, 1/72 and 1/30 of the side: (height, width, 3)."""
    grain = rng.normal(0, 1, (*size, 3))
    for grains, strength in ((72, rng.uniform(2.5, 6.5)), (30, rng.uniform(0.5, 1.5))):
        rows, columns = (round(grains * pixels / side) for pixels in size)
        gray, *colors = rng.normal(0, strength, (4, rows, columns)).astype(np.float32)  # PIL resizes no float64
        for channel, color in enumerate(colors):
            noise = Image.fromarray(gray + color / 2).resize(size[::-1], Image.Resampling.BICUBIC)
            grain[..., channel] += np.asarray(noise)
    return grain
