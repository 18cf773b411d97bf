"""The images of a data set that can be decoded, in a fixed order, with their classes."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, overload

import numpy as np
import pyarrow as pa
from filelock import FileLock
from loguru import logger
from numpy.typing import NDArray

from bandsplit.commands import command
from bandsplit.config.schema import Data
from bandsplit.data import demo, folders, index
from bandsplit.data.check import ON_GPU
from bandsplit.data.folders import Found
from bandsplit.data.index import Index
from bandsplit.errors import UserError
from bandsplit.paths import expanded, reading_from, writing_to


class LazyPaths(Sequence[str]):
    """Paths that are made when they are asked for."""

    @abstractmethod
    def at(self, i: int) -> str: ...

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        return [self.at(j) for j in range(*i.indices(len(self)))] if isinstance(i, slice) else self.at(i)


class Paths(LazyPaths):
    """Absolute paths of many files; 14 million of them take 0.6 GiB.

    Bytes of a name that are not UTF-8 are as os.fsdecode has them.
    """

    def __init__(self, folder: Path, names: pa.LargeBinaryArray, rows: NDArray[np.int32] | None = None) -> None:
        """`rows`: which of the names, which are relative to `folder`; None: all."""
        self.folder, self._names, self._rows = folder, names, rows

    def __len__(self) -> int:
        return len(self._names if self._rows is None else self._rows)

    def at(self, i: int) -> str:
        return os.path.join(self.folder, self.name(i))  # noqa: PTH118

    def taken(self, rows: NDArray[np.int64]) -> Paths:
        """Some of the paths, by their places."""
        chosen = rows if self._rows is None else self._rows[rows]
        return Paths(self.folder, self._names, chosen.astype(np.int32))

    def name(self, i: int) -> str:
        """A path relative to `folder`."""
        return os.fsdecode(self._names[i if self._rows is None else int(self._rows[i])].as_py())


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """The images of one part of a data set, with their classes."""

    paths: Sequence[str]
    """(N,), absolute."""
    labels: Sequence[int] | NDArray[np.int32]
    """(N,), indices into `classes`."""
    classes: list[str]
    index: Index | None = None
    """What is known of these images and of those that are left out."""
    answers: NDArray[np.bool_] | None = None
    """(labels, classes): which classes are right for a label, where that may be several; None: labels are classes."""

    @classmethod
    def of(cls, found: Index, folder: Path) -> ImageFiles:
        """The images of an index that can be decoded; `folder` is what its names are relative to."""
        if found.good.all():
            return cls(Paths(folder, found.names), found.column("label"), found.classes, found)
        rows = np.flatnonzero(found.good).astype(np.int32)
        return cls(Paths(folder, found.names, rows), found.column("label")[rows], found.classes, found)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def digest(self) -> str:
        return self.index.digest if self.index else ""

    def taken(self, rows: NDArray[np.int64]) -> ImageFiles:
        """Some of the images, by their places; the index stays that of all."""
        paths = self.paths.taken(rows) if isinstance(self.paths, Paths) else [self.paths[i] for i in rows.tolist()]
        return replace(self, paths=paths, labels=np.asarray(self.labels)[rows])

    def name(self, i: int) -> str:
        """The path of an image, relative to the folder of its part or, with lists, of the data set."""
        return self.paths.name(i) if isinstance(self.paths, Paths) else self.paths[i]

    def renumbered(self, classes: Sequence[str], by: str, where: str, numbers: bool = False) -> ImageFiles:
        """The same images, labeled with indices into the class names that the run `by` was trained on.

        The images may lack some of these classes. A label such as "a;b" stands for several classes, all of them right,
        and ";" or an empty one for none: such images are taken out.

        Args:
            numbers: whether labels that are no class names are numbers of classes, also with leading zeros.

        Raises UserError if the images, found in `where`, have other classes, or none has one.
        """
        if list(classes) == self.classes:
            return self
        number = {name: i for i, name in enumerate(classes)}
        named = [[label] if label in number else [x for x in label.split(";") if x] for label in self.classes]
        if numbers:
            counted = {x: int(x) for names in named for x in names if x.isdecimal()}
            number = {x: i for x, i in counted.items() if i < len(classes)} | number
        unknown = sorted({name for names in named for name in names} - number.keys())
        if unknown and not numbers and all(name.isdecimal() for name in unknown):
            raise UserError(
                f"{where}: the labels are numbers, such as {unknown[0]}, and no classes that {by} was trained on; if "
                'they count these from 0 in alphabetical order: data.labels = "numbers"'
            )
        if unknown:
            found = (classes[number[name]] if name in number else name for names in named for name in names)
            require_same_classes(classes, by, list(dict.fromkeys(found)), where)
        labels, right = np.asarray(self.labels), [[number[name] for name in names] for names in named]
        if all(len(each) == 1 for each in right):
            return replace(self, labels=np.array(right, dtype=np.int32)[:, 0][labels], classes=list(classes))
        answers = np.array([np.isin(np.arange(len(classes)), each) for each in right])
        labeled = np.asarray(answers.any(axis=1), dtype=np.bool_)[labels]
        if len(labels) and not labeled.any():
            raise UserError(f"{where}: none of the {len(labels):,} images has a label")
        return replace(self.taken(np.flatnonzero(labeled)), classes=list(classes), answers=answers)


def scan(data: Data) -> dict[str, Index]:
    """The indexes of training and validation images, brought up to date; contents are read whatever `data.check` is.

    One of the two parts may be missing. Raises UserError as `find` does.
    """
    if data.check == "off":
        data = data.model_copy(update={"check": "decode"})
    root = _root(data, generate=True)
    with reading_from(root):
        parts = [part for part in ("train", "val") if (root / getattr(data, part)).exists()]
    places = _examined(data, parts or ["train"])
    return {getattr(data, part): cast(Index, place.opened().index) for part, place in places.items()}


def open_here(data: Data) -> dict[str, ImageFiles]:
    """The training and validation images, for a process that is no rank.

    Raises UserError as `find` does, and where too many images cannot be decoded.
    """
    places = _examined(data, ("train", "val"))
    files = {part: place.opened() for part, place in places.items()}
    for part, each in files.items():
        log_left_out(getattr(data, part), each)
    require_few_bad(data, files)
    return files


def _examined(data: Data, parts: Sequence[str]) -> dict[str, Place]:
    work = examine(data, parts)
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return cast(dict[str, Place], stop.value)


@dataclass(frozen=True)
class Place:
    """Index of a part, which rank 0 has brought up to date for all ranks."""

    path: Path
    folder: Path
    """What its names are relative to."""
    digest: str
    images: int
    """Images that are not left out."""
    inode: int
    """Of the index, by which a copy of it is known."""

    def opened(self) -> ImageFiles:
        """The images, for the process that has brought the index up to date.

        Raises UserError if the index is not the same any more.
        """
        known = index.read(self.path)
        if known is None or known.digest != self.digest:
            told = UserError(
                f"{self.path}: this index of the images in {self.folder} cannot be read any more, or another process "
                "has changed it; start again"
            )
            told.one_rank = True
            raise told
        return ImageFiles.of(known, self.folder)


def find(data: Data, parts: Sequence[str], generate: bool = True) -> dict[str, Found]:
    """The image files of the parts ("train", "val"); generates them first if the config says how.

    Raises UserError if folders or lists are missing, empty or cannot be read, and if classes differ from the config or
    between the parts.
    """
    root = _root(data, generate)
    found: dict[str, Found] = {}
    for part in parts:
        found[part] = _found(data, root, part, found["train"].classes if "train" in found else None)
    _require_classes(data, root, {part: each.classes for part, each in found.items()})
    return found


def examine(data: Data, parts: Sequence[str]) -> Generator[None, None, dict[str, Place]]:
    """Finds the images of the parts and brings their indexes up to date; a generator like `index.refresh`.

    Raises UserError as `find` does, and if an index cannot be written.
    """
    root = _root(data, generate=True).absolute()
    found: dict[str, Found | Index] = {}
    kept: dict[str, Path] = {}
    for part in parts:
        name = getattr(data, part)
        known = index.unchanged(root / name, root, name, data.check) if data.layout == "folders" else None
        if known:
            kept[part], found[part] = known
        else:
            found[part] = _found(data, root, part, found["train"].classes if "train" in found else None)
    _require_classes(data, root, {part: each.classes for part, each in found.items()})
    places = {}
    for part, each in found.items():
        name = getattr(data, part)
        if not isinstance(each, Index):
            kept[part] = index.place(root, name, len(each.names))
            others = index.places(root, name)
            each = yield from index.refresh(each, kept[part], data.check, f"checking {name}", others)
        folder = root / name if data.layout == "folders" else root
        with reading_from(kept[part]):
            inode = kept[part].stat().st_ino
        places[part] = Place(kept[part], folder, each.digest, int(each.good.sum()), inode)
    return places


def _found(data: Data, root: Path, part: str, classes: Sequence[str] | None) -> Found:
    path = root / getattr(data, part)
    return folders.walk(path) if data.layout == "folders" else folders.listed(path, root, classes)


def read_part(data: Data, part: str, place: Place) -> ImageFiles | None:
    """The images of an index that rank 0 has brought up to date; None if this rank does not have the same file.

    That is the case on a node with its own copy of the data, of which a copy of the index says nothing. Raises
    UserError if `data.root` does not exist here.
    """
    root = _root(data, generate=False).absolute()
    folder = root / getattr(data, part) if data.layout == "folders" else root
    with suppress(OSError):
        if place.folder == folder and place.path.stat().st_ino == place.inode:
            known = index.read(place.path)
            return ImageFiles.of(known, folder) if known and known.digest == place.digest else None
    return None


def log_left_out(part: str, files: ImageFiles) -> None:
    """Logs which files of a part of the data set are not used, and which classes lose all of their images."""
    if files.index is None:
        return
    if files.index.passed_over:
        logger.info("{}: passed over {}", part, "; ".join(files.index.passed_over))
    bad = files.index.bad()
    if bad:
        named = "; ".join(f"{name!r} ({reason})" for name, reason in bad[:10]) + "; …" * (len(bad) > 10)
        logger.warning("{}: left out {} of {:,} images: {}", part, len(bad), len(files.index), named)
        lost = np.setdiff1d(files.index.column("label"), files.labels)
        if len(lost):
            classes = ", ".join(files.classes[label] for label in lost[:10]) + ", …" * (len(lost) > 10)
            logger.warning(
                "{}: no image is left of {} of {:,} classes: {}", part, len(lost), len(files.classes), classes
            )


def log_wrong_on_gpu(part: str, files: ImageFiles) -> None:
    """Warns of files that a GPU shows otherwise than a CPU does."""
    notes = [] if files.index is None else files.index.notes()
    wrong = [(name, note) for name, note in notes if note.startswith(ON_GPU)]
    if wrong:
        named = "; ".join(f"{name!r} ({note})" for name, note in wrong[:10]) + "; …" * (len(wrong) > 10)
        logger.warning(
            "{}: a GPU shows {} of {:,} images wrongly; convert them: {}", part, len(wrong), len(files), named
        )


def require_few_bad(data: Data, parts: Mapping[str, ImageFiles]) -> None:
    """Raises UserError if more than `data.max_bad` images are left out, or any if `data.on_bad` is "error".

    Also if a part has none left.
    """
    for part, files in parts.items():
        if files.index and not len(files):
            name, reason = files.index.bad()[0]
            raise UserError(
                f"data.root: {data.root}: none of the {len(files.index):,} images in {getattr(data, part)} can be read "
                f"or decoded, such as {name!r}: {reason}"
            )
    bad = [
        (f"{getattr(data, part)}/{name}" if data.layout == "folders" else name, reason)
        for part, files in parts.items()
        if files.index
        for name, reason in files.index.bad()
    ]
    if len(bad) > (data.max_bad if data.on_bad == "replace" else 0):
        count = len(bad) + sum(map(len, parts.values()))
        named = "".join(f"\n  {name!r}: {reason}" for name, reason in bad[:20]) + "\n  …" * (len(bad) > 20)
        given = f"data.max_bad = {data.max_bad}" if data.on_bad == "replace" else 'data.on_bad = "error"'
        raise UserError(
            f"data.root: {data.root}: {len(bad):,} of {count:,} images cannot be read or decoded, and {given}; repair "
            f"or remove them, or leave them out with --set data.max_bad={len(bad)}; "
            f"`{command('data')} scan` lists them all:{named}"
        )


def _require_classes(data: Data, root: Path, classes: Mapping[str, Sequence[str]]) -> None:
    if "train" not in classes:
        return
    train, val = classes["train"], classes.get("val", classes["train"])
    where = root / data.train
    if data.classes is not None and len(train) != data.classes:
        names = ", ".join(train[:20]) + ", …" * (len(train) > 20)
        raise UserError(f"data.classes: {data.classes} given, but {where} has {len(train)} classes: {names}")
    if len(train) < 2:
        raise UserError(f"{where}: one class only, {train[0]}; expected at least 2")
    if list(val) != list(train):
        odd = ", ".join(sorted(set(val) ^ set(train))[:5])
        raise UserError(f"{root}: {data.train} and {data.val} differ in the class folders {odd}")


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
    """Generates the images in the first process that gets here; the others wait."""
    assert data.generate is not None
    with writing_to(root):
        if root.exists():  # before anything is written beside it
            return
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root.with_name(f".{root.name}.lock")):
            if not root.exists():
                demo.generate(root, **data.generate.model_dump())


def require_same_classes(trained: Sequence[str], by: str, found: Sequence[str], where: str) -> None:
    """Raises UserError if the class names that run `by` was trained on differ from those found in `where`."""
    if list(trained) != list(found):
        missing, new = (sorted({*some} - {*others}) for some, others in ((trained, found), (found, trained)))
        told = [
            f"{what} {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
            for what, names in (("missing", missing), ("new", new))
            if names
        ]
        difference = "; ".join(told) or "the same in another order"
        raise UserError(f"{where}: the classes are not those that {by} was trained on: {difference}")
