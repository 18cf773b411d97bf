"""The scan of the class folders: file order, class index and counts are ours, not the reader's."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from bandsplit.config.schema import Data
from bandsplit.data import demo
from bandsplit.errors import UserError
from bandsplit.paths import expanded, reading_from, writing_to

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm")
"""What DALI decodes, in upper and lower case."""

NO_DATA = {"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
"""What operating systems and NAS devices leave in folders, beside entries that begin with a dot."""


@dataclass(frozen=True)
class ImageFiles:
    """Files of one part of a data set with their class index; the classes in alphabetical order."""

    paths: list[str]
    """Absolute; bytes of a name that are not UTF-8 as os.fsdecode has them."""
    labels: list[int]
    classes: list[str]
    passed_over: tuple[str, ...] = ()
    """What was found and is not used, one phrase per reason with the number of files and an example."""

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
    """Lists the images in ``folder/<class>``, at any depth and in sorted order, as torchvision's ImageFolder does.

    Hidden entries are no data: `NO_DATA` and what begins with a dot.  Links are followed.  Raises UserError where the
    folder is missing, has no class folders, a class folder has no images, or one of them cannot be read.
    """
    with reading_from(folder):
        return _scan(folder.absolute())


def _scan(folder: Path) -> ImageFiles:
    expected = f"images ({' '.join(SUFFIXES)})"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one folder per class with {expected}")
    with os.scandir(folder) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir() and not _is_hidden(entry.name))
    if not classes:
        raise UserError(f"{folder}: no class folders in it; expected one folder per class")
    walk = _Walk()
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(walk.images(str(folder / name)))
        if not found:
            raise UserError(f"{folder / name}: no images in this class folder; expected {expected}")
        paths += found
        labels += [label] * len(found)
    return ImageFiles(paths, labels, classes, walk.passed_over(folder))


class _Walk:
    """Finds images, and remembers what it passes over: the number and the first of each kind."""

    def __init__(self) -> None:
        self._others: dict[str, list[Any]] = {}

    def images(self, folder: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
        """Paths of the images in a folder and in all folders below it, in any order."""
        about = Path(folder).stat()
        here = above | {(about.st_dev, about.st_ino)}
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is_hidden(entry.name):
                    self._pass_over("hidden", entry.path)
                elif entry.is_dir():
                    below = entry.stat()
                    if (below.st_dev, below.st_ino) in here:
                        self._pass_over("links to a folder above", entry.path)
                    else:
                        yield from self.images(entry.path, here)
                elif not entry.name.lower().endswith(SUFFIXES):
                    self._pass_over("of another type", entry.path)
                elif not entry.is_file():
                    self._pass_over("broken links or special files", entry.path)
                else:
                    yield entry.path

    def _pass_over(self, reason: str, path: str) -> None:
        count_and_example = self._others.setdefault(reason, [0, path])
        count_and_example[0] += 1

    def passed_over(self, folder: Path) -> tuple[str, ...]:
        return tuple(
            f"{count} {reason}, such as {os.path.relpath(example, folder)!r}"
            for reason, (count, example) in sorted(self._others.items())
        )


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in NO_DATA


def open_data(data: Data, generate: bool = True) -> tuple[ImageFiles, ImageFiles]:
    """Training and validation images of a data config; generates them first where the config says how.

    Raises UserError where folders are missing, empty or cannot be read, or their classes differ from the config or from
    each other.
    """
    root = _root(data, generate)
    train, val = scan(root / data.train), scan(root / data.val)
    if val.classes != train.classes:
        odd = sorted(set(val.classes) ^ set(train.classes))
        raise UserError(f"{root}: {data.train} and {data.val} differ in the class folders {', '.join(odd[:5])}")
    _require_classes(data, root / data.train, train)
    return train, val


def open_validation(data: Data) -> ImageFiles:
    """Validation images alone, for which there need be no training images.  Raises as `open_data` does."""
    root = _root(data, generate=True)
    val = scan(root / data.val)
    _require_classes(data, root / data.val, val)
    return val


def _require_classes(data: Data, folder: Path, found: ImageFiles) -> None:
    if len(found.classes) != data.classes:
        names = ", ".join(found.classes[:20]) + ", …" * (len(found.classes) > 20)
        raise UserError(f"data.classes: {data.classes} given, but {folder} has {len(found.classes)} classes: {names}")


def _root(data: Data, generate: bool) -> Path:
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
    return root


def _generate_once(data: Data, root: Path) -> None:
    """The first process makes the images, the others wait for it."""
    assert data.generate is not None
    with writing_to(root):
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root.with_name(f".{root.name}.lock")):
            if not root.exists():
                demo.generate(root, **data.generate.model_dump())
