"""The format of packed data: its manifest, the names of its files, and what a training opens of it.

A band store:

    manifest.json                     what is in it, below as `BandManifest`
    labels/train.npy                  class index of every image, int32
    names/train.json                  name of every image, as its index has it
    band_00/train/shard_00000.npy     (images, h, w, 3), float16 or uint8: coefficient 0 of every block
    band_00/sha256.txt                checksums of this folder, as `sha256sum -c` reads them
    sha256.txt                        checksums of labels and names

A node needs the manifest, the labels and the folders of the bands that its branches read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from bandsplit.config.schema import Data, RunConfig, Split
from bandsplit.data.images import ImageFiles
from bandsplit.errors import UserError
from bandsplit.paths import expanded, reading_from
from bandsplit.spectral import transforms

FORMAT = 1
MANIFEST = "manifest.json"
CHECKSUMS = "sha256.txt"
PLAN = "plan.json"
"""What is to be packed; a folder with a plan and no manifest is unfinished."""

M = TypeVar("M", bound=BaseModel)


class _Model(BaseModel):
    """Names of files may have bytes that are not UTF-8, as os.fsdecode has them; pydantic's own JSON refuses these."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def as_json(self) -> str:
        """One field a line, in ASCII."""
        return json.dumps(self.model_dump(mode="json"), indent=1)


class LeftOut(_Model):
    """An image that could not be packed."""

    name: str
    reason: str


class Band(_Model):
    """How the values of a band are stored, and how exactly; numbers a color, in units of the normalized image."""

    scale: tuple[float, float, float]
    offset: tuple[float, float, float]
    """value = stored · scale + offset."""
    rmse: tuple[float, float, float]
    """Root mean squared error of the stored values, over all images of the store."""
    deviation: tuple[float, float, float]
    """Standard deviation of the band."""
    psnr: float
    """dB: 20 log10(range / RMSE) of the color that is worst, the range being all that pixels of 0 to 255 can give."""
    snr: float
    """dB: 20 log10(deviation / RMSE), of the color that is worst."""
    clipped: float
    """Fraction of the values that lie outside of what 8 bits cover."""


class BandPart(_Model):
    """The training or the validation images of a band store."""

    images: int
    side: int
    """Side in pixels of the square that was stored of each image: bands have side / block."""
    shards: tuple[int, ...]
    """Number of images of each shard."""
    source_images: int
    source_digest: str
    """`Index.digest` of the images that were to be packed."""
    left_out: tuple[LeftOut, ...]

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """Index of the first image of each shard, and of the end: (shards + 1,)."""
        return np.concatenate([[0], np.cumsum(self.shards, dtype=np.int64)])


class BandManifest(_Model):
    """What a band store holds; without dates and folders, so that equal stores have equal manifests."""

    format: int
    kind: Literal["bands"]
    code_version: str
    data: str
    """Name of the data set."""
    transform: Literal["dct2d", "dct1d", "hadamard", "identity", "random"]
    norm: Literal["ortho", "none"]
    block: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize_size: int
    interpolation: Literal["bilinear", "bicubic"]
    dtype: Literal["float16", "uint8"]
    classes: tuple[str, ...]
    parts: dict[str, BandPart]
    bands: dict[int, Band]

    def shape(self, part: str) -> tuple[int, int, int]:
        """Of one image of one band: (h, w, 3)."""
        side = self.parts[part].side // self.block
        return side, side, 3

    def image_bytes(self, part: str) -> int:
        """Bytes of one image of one band."""
        return int(np.prod(self.shape(part))) * np.dtype(self.dtype).itemsize


class ImagePart(_Model):
    images: int
    bytes: int
    """Of their files."""
    source_images: int
    source_digest: str
    left_out: tuple[LeftOut, ...]


class ImageManifest(_Model):
    """What a folder of packed images holds."""

    format: int
    kind: Literal["images"]
    code_version: str
    data: str
    side: int
    """Longest shorter side in pixels."""
    quality: int
    interpolation: Literal["bilinear", "bicubic"]
    classes: tuple[str, ...]
    parts: dict[str, ImagePart]


Manifest = BandManifest | ImageManifest


def read_manifest(root: Path) -> Manifest:
    """The manifest of packed data.  Raises UserError if there is none, or not one of this format."""
    path = root / MANIFEST
    with reading_from(path):
        if not path.is_file():
            unfinished = "; an unfinished pack: run the same `pack` again" if (root / PLAN).exists() else ""
            raise UserError(f"{root}: holds no packed data: there is no {MANIFEST} in it{unfinished}")
        text = path.read_text(encoding="utf-8")
    kinds: tuple[type[Manifest], ...] = (BandManifest, ImageManifest)
    for kind in kinds:
        if f'"kind": "{kind.model_fields["kind"].annotation.__args__[0]}"' in text:  # type: ignore[union-attr]
            manifest = _parsed(kind, text, path)
            if manifest.format != FORMAT:
                raise UserError(f"{path}: format {manifest.format}; this version reads format {FORMAT}: pack it again")
            return manifest
    raise UserError(f"{path}: not the manifest of packed data")


def _parsed(kind: type[M], text: str, path: Path) -> M:
    try:
        return kind.model_validate(json.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except ValueError as error:
        why = str(error)
    raise UserError(f"{path}: damaged or of another version: {why}")


def band_folder(band: int) -> str:
    return f"band_{band:02d}"


def shard_name(number: int) -> str:
    return f"shard_{number:05d}.npy"


@dataclass(frozen=True, eq=False)
class StoredImages:
    """The images of one part of a band store, as a training counts and labels them."""

    root: Path
    part: str
    """"train" or "val"."""
    manifest: BandManifest
    class_names: tuple[str, ...]
    """Labels are indices into these."""
    rows: npt.NDArray[np.int64] | None = None
    """Which of the stored images; None: all."""

    def __len__(self) -> int:
        return self.about.images if self.rows is None else len(self.rows)

    @property
    def about(self) -> BandPart:
        return self.manifest.parts[self.part]

    @property
    def classes(self) -> list[str]:
        return list(self.class_names)

    @property
    def passed_over(self) -> tuple[str, ...]:
        left_out = self.about.left_out
        return (f"{len(left_out)} that could not be packed, such as {left_out[0].name!r}",) if left_out else ()

    @property
    def digest(self) -> str:
        """The same for the same stored images, wherever the store lies."""
        about = json.dumps(self.about.model_dump(mode="json"), ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(os.fsencode(f"{self.manifest.dtype} {about}")).hexdigest()

    @cached_property
    def labels(self) -> npt.NDArray[np.int32]:
        """(images,), indices into `classes`."""
        path = self.root / "labels" / f"{self.part}.npy"
        with reading_from(path):
            try:
                labels: npt.NDArray[np.int32] = np.load(path)
            except ValueError as error:
                raise UserError(f"{path}: damaged: {error}") from None
        if labels.shape != (self.about.images,):
            raise UserError(f"{path}: {len(labels)} labels for {self.about.images} images; copy this file again")
        labels = labels if self.rows is None else labels[self.rows]
        stored = ImageFiles([], labels, list(self.manifest.classes))
        return np.asarray(stored.renumbered(self.class_names, "this run", str(self.root)).labels, dtype=np.int32)

    def renumbered(self, classes: Sequence[str], by: str, where: str) -> StoredImages:
        """As `ImageFiles.renumbered`."""
        ImageFiles([], np.zeros(0, dtype=np.int32), self.classes).renumbered(classes, by, where)
        return replace(self, class_names=tuple(classes))

    def taken(self, rows: npt.NDArray[np.int64]) -> StoredImages:
        """Some of the images, by their places."""
        return replace(self, rows=rows if self.rows is None else self.rows[rows])

    def stored(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Places of images in the store."""
        return indices if self.rows is None else self.rows[indices]

    @cached_property
    def _names(self) -> list[str]:
        path = self.root / "names" / f"{self.part}.json"
        with reading_from(path):
            names: list[str] = json.loads(path.read_text(encoding="utf-8"))
        return names

    def name(self, i: int) -> str:
        """As `ImageFiles.name`, of the image that was packed."""
        return self._names[i if self.rows is None else int(self.rows[i])]

    def shards(self, band: int) -> list[Path]:
        """Files of a band."""
        folder = self.root / band_folder(band) / self.part
        return [folder / shard_name(number) for number in range(len(self.about.shards))]

    def require(self, bands: Sequence[int], why: str = "") -> None:
        """Raises UserError if a band is not in the store, or a file of it is missing or has another size."""
        for band in bands:
            if band not in self.manifest.bands:
                held = ", ".join(map(str, sorted(self.manifest.bands)))
                raise UserError(f"data.root: {self.root}: band {band}{why} was not packed; the store has {held}")
            for path, images in zip(self.shards(band), self.about.shards, strict=True):
                self._require_file(path, images * self.manifest.image_bytes(self.part), band, why)

    def _require_file(self, path: Path, content: int, band: int, why: str) -> None:
        with reading_from(path):
            if not path.is_file():
                raise UserError(f"data.root: {path}: missing, but band {band}{why} is read; copy {band_folder(band)}/")
            size = path.stat().st_size
            with path.open("rb") as file:
                header = header_bytes(file.read(10))
        if size != header + content:
            raise UserError(f"data.root: {path}: {size} bytes instead of {header + content}; copy this file again")


def header_bytes(start: bytes) -> int:
    """Length of the header of an .npy file of version 1, from its first ten bytes; 0: it is none."""
    return 10 + int.from_bytes(start[8:10], "little") if start[:8] == b"\x93NUMPY\x01\x00" else 0


def open_store(data: Data, parts: Sequence[str]) -> dict[str, StoredImages]:
    """Parts ("train", "val") of the band store that a data config names.

    Raises UserError if there is none, or what is in it was not cut as the config says.
    """
    root = expanded(data.root, "data.root")
    manifest = read_manifest(root)
    if not isinstance(manifest, BandManifest):
        raise UserError(f"data.kind: 'bands' given, but {root} holds images; data.kind = 'images' reads it")
    if data.classes is not None and len(manifest.classes) != data.classes:
        raise UserError(f"data.classes: {data.classes} given, but {root} has {len(manifest.classes)} classes")
    for key in ("resize_size", "interpolation"):
        _require_equal(f"data.{key}", getattr(data, key), getattr(manifest, key), root)
    return {part: StoredImages(root, part, manifest, manifest.classes) for part in parts}


def require_view(
    stored: StoredImages, split: Split, mean: Sequence[float], std: Sequence[float], hflip: float = 0.0, of: str = ""
) -> None:
    """Raises UserError if the store's bands are not those of a split and normalization, or some are not there."""
    manifest = stored.manifest
    for key, given in (("split.transform", split.transform), ("split.block", split.block), ("split.norm", split.norm)):
        _require_equal(f"{of}{key}", given, getattr(manifest, key.removeprefix("split.")), stored.root)
    for key, color in (("data.mean", mean), ("data.std", std)):
        _require_equal(f"{of}{key}", list(color), list(getattr(manifest, key.removeprefix("data."))), stored.root)
    own = bands_of(split)
    stored.require(own)
    if hflip:
        others = sorted(set(bands_to_read(split, hflip)) - set(own))
        stored.require(others, f", which horizontal flips with split.transform = {split.transform!r} need too,")


def require_side(config: RunConfig, part: str, stored: StoredImages) -> None:
    """Raises UserError if images of the config's size cannot be cut out of the stored ones of "train" or "val"."""
    side, data = stored.about.side, config.data
    if part == "val":
        key = "data.image_size" if data.val_image_size is None else "data.val_image_size"
        _require_equal(key, data.val_size, side, stored.root)
    elif data.image_size > side:
        raise UserError(
            f"data.image_size: {data.image_size} given, but {stored.root} has training images of {side} x {side}"
        )
    elif data.holdout is not None:
        _require_center(config, stored)


def _require_center(config: RunConfig, stored: StoredImages) -> None:
    """Raises UserError if held-out images cannot be prepared as validation images are."""
    side, val, block = stored.about.side, config.data.val_size, config.split.block
    if val > side or (side - val) % (2 * block):
        raise UserError(
            f"data.holdout: {config.data.holdout} given, but the training images in {stored.root}, of {side} x {side}, "
            f"have no center of {val} x {val} in whole blocks, as which held-out images are read; pack again without "
            f"--size, or with --size {val} plus a multiple of {2 * block}"
        )


def _require_equal(key: str, given: object, stored: object, root: Path) -> None:
    if given != stored:
        raise UserError(f"{key}: {given!r} given, but the band store {root} was packed with {stored!r}")


def bands_of(split: Split) -> list[int]:
    """The bands that the branches of a run read."""
    return sorted({band for group in split.groups for band in group})


def bands_to_read(split: Split, hflip: float) -> list[int]:
    """The same with those that horizontal flips need: see `transforms.flip_matrix`."""
    own = bands_of(split)
    if not hflip:
        return own
    flip = transforms.flip_matrix(transforms.transform_matrix(split.transform, split.block, split.norm))
    return sorted({*own, *np.flatnonzero(flip[own].any(axis=0)).tolist()})
