"""Tiny ImageNet (200 classes, 64 x 64 pixels) from its own layout: a zip file, or the folder that was unpacked from it.

In it are wnids.txt (the classes), train/CLASS/images/NAME, val/images/NAME and val/val_annotations.txt (name, class and
a box a line).  The images in test/ have no labels.
"""

from __future__ import annotations

import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from bandsplit.data.prepare import summary
from bandsplit.data.prepare.archives import AGAIN, is_hidden, require_safe, unpack_images
from bandsplit.data.prepare.checksums import require_published
from bandsplit.data.prepare.destination import Counts, Destination, Job, opened
from bandsplit.data.prepare.progress import Progress
from bandsplit.data.prepare.summary import some
from bandsplit.errors import UserError
from bandsplit.paths import reading_from, writing_to

NAME = "tiny-imagenet-200"
CLASSES, ANNOTATIONS = "wnids.txt", "val/val_annotations.txt"
NEXT = (
    "{train} resnet34_baseline --set data.root={root} --set data.classes={classes} "
    "--set data.image_size=64 --set data.resize_size=64"
)


class Source(Protocol):
    """The files of the data set."""

    path: Path
    sizes: dict[str, int]
    """Name below the data set's folder, and bytes."""

    def open(self, name: str) -> IO[bytes]: ...


class _Zip:
    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path = path
        self._archive = archive
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in archive.infolist():
            require_safe(member.filename, str(path))
            if stat.S_ISLNK(member.external_attr >> 16):
                raise UserError(f"{path}: {member.filename!r} in it is refused: a link, not a file")
            if not member.is_dir():
                self._members[member.filename.removeprefix(f"{NAME}/")] = member
        self.sizes = {name: member.file_size for name, member in self._members.items()}

    def open(self, name: str) -> IO[bytes]:
        return self._archive.open(self._members[name])


class _Folder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.sizes = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}

    def open(self, name: str) -> IO[bytes]:
        return (self.path / name).open("rb")


def prepare(source: Path, to: Path, checksum: bool) -> str:
    """Writes `to`/train/CLASS and `to`/val/CLASS; returns a summary.

    Args:
        source: the zip file, a folder that holds it, or the unpacked folder.
        checksum: whether the zip file is compared with the published one.
    """
    path = _found(source)
    with opened(to, Job("tiny-imagenet"), beside=[path]) as target:
        if target.result is None:
            with _source(path) as files:
                target.require_space(sum(files.sizes.values()))
                if checksum and path.is_file():
                    require_published(path, f"{NAME}.zip", target)
                _prepare(files, target)
        images = target.result
        assert images is not None
    return summary.lines(target.root, images, NEXT, "the images in its test/ are left out: they have no labels")


def _found(source: Path) -> Path:
    with reading_from(source):
        if source.is_file() or (source / CLASSES).is_file():
            return source
        for path in (source / f"{NAME}.zip", source / NAME):
            if path.exists():
                return path
    raise UserError(f"--archives: {source}: neither {NAME}.zip nor the unpacked {NAME} in it")


@contextmanager
def _source(path: Path) -> Iterator[Source]:
    with reading_from(path):
        if path.is_dir():
            yield _Folder(path)
            return
        try:
            with zipfile.ZipFile(path) as archive:
                yield _Zip(path, archive)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise UserError(
                f"{path}: damaged, truncated or not a zip file ({path.stat().st_size:,} bytes): {error}; {AGAIN}"
            ) from error


def _prepare(files: Source, target: Destination) -> None:
    classes = _lines(files, CLASSES)
    labels = _annotations(files)
    train, val = _images(files, classes, labels)
    total = sum(files.sizes[name] for names in (*train.values(), val) for name in names)
    with Progress(f"unpacking {files.path.name}", total, target.finished_bytes) as progress:
        for label, names in train.items():
            if not target.is_finished(label):
                folder = target.work(label)
                unpack_images(_contents(files, names), str(files.path), folder.joinpath, progress)
                size = sum(files.sizes[name] for name in names)
                target.commit(label, {f"train/{label}": folder}, {"train": {label: len(names)}}, size)
        if not target.is_finished("val"):
            folder = target.work("val")
            with writing_to(folder):
                for label in classes:
                    (folder / label).mkdir(exist_ok=True)
            unpack_images(_contents(files, val), str(files.path), lambda name: folder / labels[name] / name, progress)
            counts: Counts = {"val": dict(Counter(labels.values()))}
            target.commit("val", {"val": folder}, counts, sum(files.sizes[name] for name in val))
    target.finish()


def _images(files: Source, classes: list[str], labels: dict[str, str]) -> tuple[dict[str, list[str]], list[str]]:
    """Names of the training images of each class, and of the validation images, all of which have to have a label."""
    train: dict[str, list[str]] = {label: [] for label in classes}
    val: list[str] = []
    for name in sorted(files.sizes):
        match PurePosixPath(name).parts:
            case _ if is_hidden(name):
                pass
            case ["train", label, "images", _]:
                if label not in train:
                    raise UserError(f"{files.path}: {name!r} in it is of a class that is not in {CLASSES}")
                train[label].append(name)
            case ["val", "images", _]:
                val.append(name)
    for label, names in train.items():
        if not names:
            raise UserError(f"{files.path}: no images of class {label} in it, which {CLASSES} names")
    odd = sorted({PurePosixPath(name).name for name in val} ^ labels.keys())
    if odd:
        raise UserError(f"{files.path}: {some(odd)} in it have no label in {ANNOTATIONS}, or a label and no image")
    strangers = sorted(set(labels.values()) ^ set(classes))
    if strangers:
        raise UserError(f"{files.path}: {CLASSES} and {ANNOTATIONS} in it differ in the classes {some(strangers)}")
    return train, val


def _annotations(files: Source) -> dict[str, str]:
    """The class of each validation image."""
    labels: dict[str, str] = {}
    for number, line in enumerate(_lines(files, ANNOTATIONS), 1):
        match line.split("\t"):
            case [name, label, *_]:
                labels[name] = label
            case _:
                raise UserError(
                    f"{files.path}: {ANNOTATIONS} in it, line {number}: {line!r}, expected name, class, box"
                )
    return labels


def _lines(files: Source, name: str) -> list[str]:
    if name not in files.sizes:
        raise UserError(f"{files.path}: no {name} in it; expected {NAME}.zip or the folder that is in it")
    with files.open(name) as content:
        return [line for line in content.read().decode(errors="replace").splitlines() if line.strip()]


def _contents(files: Source, names: list[str]) -> Iterator[tuple[str, int, IO[bytes]]]:
    for name in names:
        with files.open(name) as content:
            yield name, files.sizes[name], content
