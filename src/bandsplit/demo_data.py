"""Pictures for a first run: a small JPEG classification data set, drawn rather than downloaded.

A class is a shape in a fine texture. Seen from afar, as the mean of every 2x2 block shows it, the textures vanish and
five of the ten classes look like the other five; seen from close, as the detail bands show it, the textures are plain
but the outlines, soft as they are, are hard to follow. Only the bands together tell all ten classes apart.

Lengths are shares of a picture's shorter side, so that a resized picture keeps its look. Colours are RGB in 0 to 255.
"""

import colorsys
import math
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from bandsplit.errors import UserError

Array = NDArray[np.float32]

SHAPES = ("disc", "heart", "ring", "star", "triangle")
TEXTURES = ("checkered", "striped")
CLASSES = tuple(f"{shape}_{texture}" for shape in SHAPES for texture in TEXTURES)
SPLITS = ("train", "val")

SIDE = (72, 144)
"""Shorter side of a picture, pixels."""
PERIOD = {"checkered": 2.7 / 72, "striped": 2.4 / 72}
"""Period of a texture along each axis it varies in: 2.4 to 2.7 pixels once the shorter side is resized to 72. That is
below the 4 pixels at which a 2x2 block stops to resolve it, and just above the 2 that no picture can resolve."""
EDGE_BLUR = 0.02
"""Standard deviation of the lens blur on outlines: one pixel once the shorter side is 72, too soft for a detail band."""
SPOT = (0.08, 0.15)
STRENGTH = (0.15, 0.36)
BASE = 0.05
GAP = (20, 60)
LIGHTS = (5, 11)
LIGHT = (0.03, 0.14)
CONTRAST = (0.4, 1)
SHADOW = (0, 0.2)
CHROMA = 0.5
FINE = (2.5, 6.5)
COARSE = (0.5, 1.5)
OVERSAMPLING = 4
"""Outlines are drawn this many times larger and averaged down: smooth edges."""

# ------------------------------------------------------------------------------------------------------------ data set


@dataclass(frozen=True)
class Picture:
    """One picture still to draw; (seed, split, label, index) determine it completely."""

    seed: int
    split: int
    label: int
    index: int

    @property
    def path(self) -> Path:
        """Where it belongs below the data set's folder."""
        return Path(SPLITS[self.split], CLASSES[self.label], f"{self.index:05d}.jpg")


def generate(
    root: Path, *, seed: int = 0, train_per_class: int = 200, val_per_class: int = 50, workers: int | None = None
) -> None:
    """Write `root`/{train,val}/CLASS/INDEX.jpg with `workers` processes (default: one for each core we may use).

    The files depend on `seed` alone, not on `workers`. `root` appears only once it is complete.
    """
    root = root.absolute()
    if root.exists():
        raise _exists(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    pictures = [
        Picture(seed, split, label, index)
        for split, count in enumerate((train_per_class, val_per_class))
        for label in range(len(CLASSES))
        for index in range(count)
    ]
    with tempfile.TemporaryDirectory(prefix=f".{root.name}.", suffix=".partial", dir=root.parent) as temporary:
        # A folder inside the temporary one, whose permissions (0700) would otherwise become those of the data set.
        unfinished = Path(temporary, root.name)
        for folder in {picture.path.parent for picture in pictures}:
            (unfinished / folder).mkdir(parents=True)
        _write_all(unfinished, pictures, workers or len(os.sched_getaffinity(0)))
        try:
            unfinished.rename(root)
        except OSError:
            if root.exists():  # somebody else made it in the meantime
                raise _exists(root) from None
            raise


def _exists(root: Path) -> UserError:
    return UserError(
        f"{root}: exists already; the demo pictures need a folder that does not (delete it to make them anew)"
    )


def _write_all(root: Path, pictures: list[Picture], workers: int) -> None:
    def follow(done: Iterator[None]) -> None:
        for _ in tqdm(done, desc="drawing demo pictures", total=len(pictures), unit="img", leave=False):
            pass

    write = partial(_write, root)
    if workers == 1:
        follow(map(write, pictures))
        return
    # Spawned, not forked: the caller may already run threads (torch, DALI), and forking those can deadlock.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        follow(pool.map(write, pictures, chunksize=16))


def _write(root: Path, picture: Picture) -> None:
    rng = np.random.default_rng([picture.seed, picture.split, picture.label, picture.index])
    shape, texture = CLASSES[picture.label].split("_")
    image = Image.fromarray(draw(rng, shape, texture))
    if rng.random() < 0.04:
        image = image.convert("L")
    quality = int(rng.integers(75, 96))
    subsampling = str(rng.choice(["4:4:4", "4:2:2", "4:2:0"]))
    image.save(root / picture.path, quality=quality, subsampling=subsampling)


# -------------------------------------------------------------------------------------------------------- one picture


def draw(rng: np.random.Generator, shape: str, texture: str) -> NDArray[np.uint8]:
    """A textured shape that floats above a soft background: (height, width, 3)."""
    side = int(rng.integers(SIDE[0], SIDE[1] + 1))
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    width, height = round(side * max(1.0, aspect)), round(side * max(1.0, 1 / aspect))
    x, y = _axis(width, side)[None, :], _axis(height, side)[:, None]
    below, above = _colours(rng)

    mask = _blur(
        _mask(_outline(rng, shape, width / side, height / side), (width, height), side, shape), EDGE_BLUR * side
    )
    shadow = _blur(np.roll(mask, (round(0.04 * side), round(0.02 * side)), (0, 1)), 0.05 * side)
    surface = above * (1 + 0.15 * _ramp(rng, x, y) + _relief(rng, texture, x, y, mask, side))[..., None]
    picture = _background(rng, below, x, y) * (1 - rng.uniform(*SHADOW) * shadow)[..., None]
    picture += mask[..., None] * (surface - picture)
    picture *= (1 - 0.25 * (x**2 + y**2))[..., None]  # the fall of light towards a lens's corners
    picture += _grain(rng, (width, height), side)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def _axis(pixels: int, side: int) -> Array:
    """Pixel centres, from the middle of the picture, in units of its shorter side."""
    return ((np.arange(pixels, dtype=np.float32) + 0.5) - pixels / 2) / side


def _colours(rng: np.random.Generator) -> tuple[Array, Array]:
    """Background and shape: the shape is the darker and the more colourful of the two."""
    hue = rng.random()
    apart = rng.uniform(0.06, 0.5) * rng.choice([-1, 1])
    brightness = rng.uniform(135, 185)
    below = _colour(hue, rng.uniform(0.05, 0.25), brightness)
    above = _colour(hue + apart, rng.uniform(0.45, 0.7), brightness - rng.uniform(*GAP))
    return below, below + rng.uniform(*CONTRAST) * (above - below)


def _colour(hue: float, saturation: float, brightness: float) -> Array:
    """RGB (3,) of a given luma, both 0 to 255; a hue too dark for it (blue) is paled with white."""
    colour = 220 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, 1), np.float32)
    luma = float(colour @ np.array([0.299, 0.587, 0.114], np.float32))
    white = max(0.0, (brightness - luma) / (220 - luma))
    return colour * min(1.0, brightness / luma) * (1 - white) + 220 * white


def _outline(rng: np.random.Generator, shape: str, width: float, height: float) -> Array:
    """A closed polygon (points, 2) of x, y from the picture's upper left corner."""
    turn = 2 * np.pi * np.arange(120, dtype=np.float32) / 120
    match shape:
        case "disc" | "ring":
            points = np.stack([np.cos(turn), np.sin(turn)], 1)
        case "heart":
            lobes = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
            points = np.stack([16 * np.sin(turn) ** 3, -lobes - 2.5], 1) / 15
        case "star":
            radius = np.where(np.arange(10) % 2, 0.52, 1.15)
            points = np.stack([radius * np.sin(turn[::12]), -radius * np.cos(turn[::12])], 1)
        case "triangle":
            points = 1.2 * np.stack([np.sin(turn[::40]), -np.cos(turn[::40])], 1) + [0, 0.2]
        case _:
            raise AssertionError(f"unknown shape {shape!r}")
    angle = math.radians(rng.uniform(-22, 22))
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    centre = np.array([width, height]) / 2 + rng.uniform(-0.12, 0.12, 2)
    return (points @ rotation * rng.uniform(0.21, 0.35) + centre).astype(np.float32)


def _mask(outline: Array, size: tuple[int, int], side: int, shape: str) -> Array:
    """Coverage of every pixel (height, width), 0 to 1."""
    canvas = Image.new("L", (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING))
    pen = ImageDraw.Draw(canvas)
    pen.polygon([(float(x), float(y)) for x, y in outline * side * OVERSAMPLING], fill=255)
    if shape == "ring":
        inner = outline.mean(0) + 0.5 * (outline - outline.mean(0))
        pen.polygon([(float(x), float(y)) for x, y in inner * side * OVERSAMPLING], fill=0)
    return np.asarray(canvas.reduce(OVERSAMPLING), np.float32) / 255


def _blur(mask: Array, radius: float) -> Array:
    image = Image.fromarray((255 * mask + 0.5).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(image, np.float32) / 255


def _ramp(rng: np.random.Generator, x: Array, y: Array) -> Array:
    """Light from one side: about -1 to 1 across the picture."""
    angle = rng.uniform(0, 2 * np.pi)
    return (2 * (x * math.cos(angle) + y * math.sin(angle))).astype(np.float32)


def _background(rng: np.random.Generator, colour: Array, x: Array, y: Array) -> Array:
    """A gradient with lights far out of focus, each a pale disc (a lens's aperture): (height, width, 3)."""
    light = 1 + 0.1 * _ramp(rng, x, y)
    for _ in range(rng.integers(*LIGHTS)):
        a, b = rng.uniform(-0.65, 0.65, 2)
        distance = np.sqrt((x - a) ** 2 + (y - b) ** 2)
        disc = np.clip((rng.uniform(0.06, 0.22) - distance) / (3 * EDGE_BLUR) + 0.5, 0, 1)
        light = light + rng.uniform(*LIGHT) * disc
    tint = 1 + 0.08 * _ramp(rng, x, y)[..., None] * rng.uniform(-1, 1, 3).astype(np.float32)
    return (light[..., None] * tint * colour).astype(np.float32)


def _relief(rng: np.random.Generator, texture: str, x: Array, y: Array, mask: Array, side: int) -> Array:
    """The texture as relative brightness, of mean 0 so that it leaves no trace in a blurred picture: (height, width).

    It is strong where the light falls and fades elsewhere, so that its own outline says little about the shape's.
    """
    angle = math.radians(rng.uniform(-8, 8))
    across, along = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    frequency = 2 * np.pi / (PERIOD[texture] * rng.uniform(0.94, 1.06))
    phase = rng.uniform(0, 2 * np.pi, 2)
    wave = np.cos(frequency * along + phase[0])
    if texture == "checkered":
        wave = wave * np.cos(frequency * across + phase[1])
    # The light falls on a random point well inside the shape (a ring's middle would be outside).
    soft = _blur(mask, 0.03 * side)
    row, column = rng.choice(np.argwhere(soft > 0.8 * soft.max()))
    distance = (x - x[0, column]) ** 2 + (y - y[row, 0]) ** 2
    light = np.exp(-distance / (2 * rng.uniform(*SPOT) ** 2))
    strength = rng.uniform(*STRENGTH) * (1.2 if texture == "checkered" else 1)
    return (strength * (BASE + (1 - BASE) * light) * soft * wave).astype(np.float32)


def _grain(rng: np.random.Generator, size: tuple[int, int], side: int) -> Array:
    """Film grain, a fine and a coarse one (a 72nd and a 30th of the picture), partly coloured: (height, width, 3)."""
    grain = rng.normal(0, 1, (*size[::-1], 3)).astype(np.float32)
    for cells, low, high in ((72, *FINE), (30, *COARSE)):
        cells_wh = [max(2, round(cells * pixels / side)) for pixels in size]
        grey, *colours = rng.normal(0, rng.uniform(low, high), (4, *cells_wh[::-1]))
        for channel, colour in enumerate(colours):
            noise = Image.fromarray((grey + CHROMA * colour).astype(np.float32))
            grain[..., channel] += np.asarray(noise.resize(size, Image.Resampling.BICUBIC))
    return grain
