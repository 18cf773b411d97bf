"""The scan of the class folders: file order, class index and counts are ours, not the reader's."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from bandsplit.config.schema import Data
from bandsplit.data import demo
from bandsplit.errors import UserError
from bandsplit.paths import expanded, reading_from, writing_to

SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class ImageFiles:
    """Files of one part of a data set with their class index; the classes in alphabetical order."""

    paths: list[str]
    labels: list[int]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def digest(self) -> int:
        """CRC-32 of the names of all files and their classes, wherever they lie."""
        value = zlib.crc32(np.array(self.labels, dtype=np.int64).tobytes())
        for path in self.paths:
            value = zlib.crc32(path.rpartition("/")[2].encode(errors="surrogateescape"), value)
        return value


def scan(folder: Path) -> ImageFiles:
    """Lists ``folder/<class>/<image>`` in sorted order.

    Raises UserError where the folder is missing, has no class folders, a class folder has no images, or one of them
    cannot be read.
    """
    with reading_from(folder):
        return _scan(folder)


def _scan(folder: Path) -> ImageFiles:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one folder per class with {', '.join(SUFFIXES)} files")
    with os.scandir(folder) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise UserError(f"{folder}: no class folders in it; expected one folder per class")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        with os.scandir(folder / name) as entries:
            found = sorted(entry.path for entry in entries if entry.name.lower().endswith(SUFFIXES))
        if not found:
            raise UserError(f"{folder / name}: no images in this class folder; expected {', '.join(SUFFIXES)} files")
        paths += found
        labels += [label] * len(found)
    return ImageFiles(paths, labels, classes)


def open_data(data: Data, generate: bool = True) -> tuple[ImageFiles, ImageFiles]:
    """Training and validation images of a data config; makes them first where the config says how and it is wanted.

    Raises UserError where folders are missing, empty or cannot be read, or their classes differ from the config or from
    each other.
    """
    root = expanded(data.root, "data.root")
    if data.generate is not None and generate:
        _generate_once(data, root)
    with reading_from(root):
        found = root.is_dir()
    if not found:
        where = "" if root.is_absolute() else f" ({data.root!r} is relative to the working directory)"
        raise UserError(
            f"data.root: {root.absolute()}: no such folder{where}; point to the data set with --set data.root=…"
        )
    train, val = scan(root / data.train), scan(root / data.val)
    if len(train.classes) != data.classes:
        raise UserError(f"data.classes: {data.classes} given, but {root / data.train} has {len(train.classes)} classes")
    if val.classes != train.classes:
        odd = sorted(set(val.classes) ^ set(train.classes))
        raise UserError(f"{root}: {data.train} and {data.val} differ in the class folders {', '.join(odd[:5])}")
    return train, val


def _generate_once(data: Data, root: Path) -> None:
    """The first process makes the images, the others wait for it."""
    assert data.generate is not None
    with writing_to(root):
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root.with_name(f".{root.name}.lock")):
            if not root.exists():
                demo.generate(root, **data.generate.model_dump())
