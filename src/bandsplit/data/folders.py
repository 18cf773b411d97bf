"""The image files of a data set as they are on disk: walked folders of classes, or a list of paths and labels."""

from __future__ import annotations

import csv
import errno
import io
import multiprocessing
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bandsplit.cpus import available_cpus
from bandsplit.errors import UserError
from bandsplit.paths import reading_from
from bandsplit.progress import followed

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm")
"""What DALI decodes, in upper and lower case."""

NO_DATA = {"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
"""What operating systems and NAS devices leave in folders, beside entries that begin with a dot."""

_SUFFIXES, _NO_DATA = tuple(map(str.encode, SUFFIXES)), set(map(str.encode, NO_DATA))

OWN_FOLDER = ".bandsplit"
"""Where the index of a data set is kept beside it."""

MISSING = -1
"""Size of a listed file that does not exist or cannot be looked at."""

_SETTLED = 2_000_000_000
"""Nanoseconds after which a further change of a folder has another modification time on any file system."""

_IN_THIS_PROCESS = 200_000
"""Files that are walked before worker processes are started for the remaining class folders."""


@dataclass(frozen=True)
class Found:
    """N image files below one folder, in order of their class and name, or in the order of a list."""

    folder: Path
    """Absolute; names are relative to it."""
    names: pa.LargeBinaryArray
    """(N,), as the file system has them: not necessarily UTF-8."""
    labels: NDArray[np.int32]
    """(N,), indices into `classes`."""
    sizes: NDArray[np.int64]
    """(N,) in bytes, or `MISSING`."""
    mtimes: NDArray[np.int64]
    """(N,), modification times in nanoseconds since the epoch."""
    classes: list[str]
    """Folders: in alphabetical order.  Lists: in alphabetical order, integers by value."""
    passed_over: tuple[str, ...] = ()
    """What was found and is not used, one phrase per reason with the number of files and an example."""
    folders: dict[str, int] = field(default_factory=dict)
    """Modification times, in nanoseconds, of the folder ("") and all folders below it; 0: still being changed.

    Empty for a list."""


_ABOVE, _BROKEN, _OTHER = "links to a folder above", "broken links or special files", "of another type"
"""Reasons to pass an entry over."""

Identity = tuple[int, int]
"""Device and inode of a folder."""


# Folders --------------------------------------------------------------------------------------------------------------


def walk(folder: Path) -> Found:
    """Finds the images in ``folder/<class>``, at any depth and in sorted order, as torchvision's ImageFolder does.

    Hidden entries are no data: `NO_DATA` and what begins with a dot.  Links are followed.  Raises UserError if the
    folder is missing, has no class folders, a class folder has no images, or one of them cannot be read.
    """
    folder = folder.absolute()
    with reading_from(folder):
        return _walk(folder)


def _walk(folder: Path) -> Found:
    expected = f"images ({' '.join(SUFFIXES)})"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one folder per class with {expected}")
    others = _PassedOver()
    classes = []
    began, top = time.time_ns(), folder.stat().st_mtime_ns
    above = frozenset(identity(each.stat()) for each in (folder, *folder.parents, *folder.resolve().parents))
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                if entry.name != OWN_FOLDER:
                    others.add("hidden", entry.name)
            elif _is(entry.is_dir):
                if identity(entry.stat()) in above:
                    others.add(_ABOVE, entry.name)
                else:
                    classes.append(entry.name)
            elif _is(entry.is_file):
                is_image = entry.name.lower().endswith(SUFFIXES)
                others.add("outside of the class folders" if is_image else _OTHER, entry.name)
            else:
                others.add(_BROKEN, entry.name)
    if not classes:
        raise UserError(f"{folder}: no class folders in it; expected one folder per class")
    classes.sort()
    walked = list(followed(_walk_classes(str(folder), classes, above), f"listing {folder}", len(classes), "classes"))
    for name, one in zip(classes, walked, strict=True):
        if not len(one.names):
            raise UserError(f"{folder / name}: no images in this class folder; expected {expected}")
        others.merge(one.others)
    times = {"": top, **{name: mtime for one in walked for name, mtime in one.folders.items()}}
    return Found(
        folder,
        pa.concat_arrays([one.names for one in walked]),
        np.repeat(np.arange(len(classes), dtype=np.int32), [len(one.names) for one in walked]),
        np.concatenate([one.sizes for one in walked]),
        np.concatenate([one.mtimes for one in walked]),
        classes,
        others.phrases(),
        {name: mtime if mtime < began - _SETTLED else 0 for name, mtime in times.items()},
    )


def are_unchanged(folder: Path, known: Mapping[str, int]) -> bool:
    """Whether no entry was added, removed or renamed in folders whose modification times are known.

    Files that were written in place do not show.
    """
    try:
        return bool(known) and all((folder / name).stat().st_mtime_ns == mtime for name, mtime in known.items())
    except OSError:
        return False


class _PassedOver(dict[str, tuple[int, str]]):
    """Reason -> number of entries that were passed over, and one of them, relative to the walked folder."""

    def add(self, reason: str, example: str, count: int = 1) -> None:
        known, first = self.get(reason, (0, example))
        self[reason] = (known + count, first)

    def merge(self, other: Mapping[str, tuple[int, str]]) -> None:
        for reason, (count, example) in other.items():
            self.add(reason, example, count)

    def phrases(self) -> tuple[str, ...]:
        return tuple(f"{count} {reason}, such as {example!r}" for reason, (count, example) in sorted(self.items()))


@dataclass(frozen=True)
class _Class:
    """The images of one class folder, sorted by name."""

    names: pa.LargeBinaryArray
    sizes: NDArray[np.int64]
    mtimes: NDArray[np.int64]
    folders: dict[str, int]
    others: _PassedOver


def _walk_classes(folder: str, classes: Sequence[str], above: frozenset[Identity]) -> Iterator[_Class]:
    """In worker processes once many files were found, since looking at a file takes the interpreter 2 µs."""
    files, remaining = 0, list(reversed(classes))
    while remaining and files < _IN_THIS_PROCESS:
        yield (one := _walk_class(folder, above, remaining.pop()))
        files += len(one.names)
    if remaining:
        with ProcessPoolExecutor(available_cpus(), multiprocessing.get_context("spawn")) as pool:
            yield from pool.map(partial(_walk_class, folder, above), reversed(remaining), chunksize=8)


def _walk_class(folder: str, above: frozenset[Identity], name: str) -> _Class:
    others = _PassedOver()
    files = _Files([], [], [], {})
    _collect(os.fsencode(folder), os.fsencode(name), above, files, others)
    order = sorted(range(len(files.names)), key=files.names.__getitem__)
    names = pa.array([files.names[i] for i in order], pa.large_binary())
    sizes, mtimes = (np.array(facts, dtype=np.int64)[order] for facts in (files.sizes, files.mtimes))
    return _Class(names, sizes, mtimes, files.folders, others)


class _Files(NamedTuple):
    """Files in any order."""

    names: list[bytes]
    sizes: list[int]
    mtimes: list[int]
    folders: dict[str, int]
    """Modification time of each folder that was walked."""


def _collect(root: bytes, folder: bytes, above: frozenset[Identity], files: _Files, others: _PassedOver) -> None:
    """Adds the images in a folder and in all folders below it."""
    here = os.stat(b"%b/%b" % (root, folder))  # noqa: PTH116  # a Path per entry would take longer than the walk
    within = above | {identity(here)}
    files.folders[os.fsdecode(folder)] = here.st_mtime_ns
    with os.scandir(b"%b/%b" % (root, folder)) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith(b".") or name in _NO_DATA:
                others.add("hidden", os.fsdecode(folder + b"/" + name))
            elif _is(entry.is_file):
                if name.lower().endswith(_SUFFIXES):
                    about = entry.stat()
                    files.names.append(folder + b"/" + name)
                    files.sizes.append(about.st_size)
                    files.mtimes.append(about.st_mtime_ns)
                else:
                    others.add(_OTHER, os.fsdecode(folder + b"/" + name))
            elif _is(entry.is_dir):
                if identity(entry.stat()) in within:
                    others.add(_ABOVE, os.fsdecode(folder + b"/" + name))
                else:
                    _collect(root, folder + b"/" + name, within, files, others)
            else:
                others.add(_BROKEN, os.fsdecode(folder + b"/" + name))


def _is(kind: Callable[[], bool]) -> bool:
    """What `is_file` or `is_dir` of an entry says; a link that leads in a circle or through a file is neither."""
    try:
        return kind()
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            return False
        raise


def identity(about: os.stat_result) -> Identity:
    """Of a folder, by which a link to it is known."""
    return about.st_dev, about.st_ino


def is_hidden(name: str) -> bool:
    """Whether an entry of a folder is no data."""
    return name.startswith(".") or name in NO_DATA


# Lists ----------------------------------------------------------------------------------------------------------------

_PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "img", "name", "id")
_LABEL_COLUMNS = ("label", "class", "target", "category", "y", "wnid", "synset")
_COLUMNS = (_PATH_COLUMNS, _LABEL_COLUMNS)


def listed(path: Path, root: Path, classes: Sequence[str] | None = None) -> Found:
    """The images that a list names, in its order: CSV (`.csv`) or text with one path and label per line.

    Paths are absolute, or relative to `root`.  In text, a tab separates path and label, and further columns are not
    read; in a line without one, the label is what follows the last blank.  A line that begins with # is a comment,
    unless an image has that name.  Labels are class names or indices.  A header names path and label as in
    `_PATH_COLUMNS` and `_LABEL_COLUMNS`, in CSV among further columns; others are understood too, if the second row
    names a file and no other row `is_labeled` alike.

    Args:
        classes: of the training images, so that labels of a validation list mean the same; None: what the list has.

    Raises UserError for a list that is missing, is empty or has a line that cannot be understood, with its number, and
    where it has a label that is not one of `classes`.  Files that do not exist have the size `MISSING`.
    """
    with reading_from(path):
        if not path.is_file():
            raise UserError(f"{path}: no such list; expected CSV or text with one path and label per line")
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    rows = list((_csv_rows if path.suffix.lower() == ".csv" else _text_rows)(path, text, root))
    if not rows:
        raise UserError(f"{path}: no images in this list")
    index = {name: i for i, name in enumerate(classes or _classes_of(label for _, _, label in rows))}
    for line, _, label in rows:
        if label not in index:
            known = ", ".join(list(index)[:5]) + ", …" * (len(index) > 5)
            raise UserError(f"{path}, line {line}: {label!r} given, which is no class of the training list: {known}")
    facts = np.array([_facts(root / name) for _, name, _ in rows], dtype=np.int64)
    return Found(
        root.absolute(),
        pa.array([os.fsencode(name) for _, name, _ in rows], pa.large_binary()),
        np.array([index[label] for *_, label in rows], dtype=np.int32),
        facts[:, 0].copy(),
        facts[:, 1].copy(),
        list(index),
    )


def _text_rows(path: Path, text: str, root: Path) -> Sequence[tuple[int, str, str]]:
    """(line number, name, label) of each line that is neither empty, nor a comment, nor a header before all others."""
    rows = []
    for number, line in enumerate(map(str.rstrip, text.split("\n")), 1):
        parts = [part for part in map(str.strip, line.split("\t")) if part] if "\t" in line else line.rsplit(None, 1)
        if not parts or (line.startswith("#") and not (len(parts) > 1 and _exists(root / parts[0]))):
            continue
        if len(parts) < 2:
            raise UserError(f"{path}, line {number}: {line!r} given; expected a path, a blank or tab, and a label")
        rows.append((number, parts[0], parts[1]))
    return rows[1:] if rows and _is_header(rows, root) else rows


def _is_header(rows: Sequence[tuple[int, str, str]], root: Path) -> bool:
    """Whether the first of these rows has the words of a header, or neither an image nor a label as the others do."""
    _, name, label = rows[0]
    if name.lower() in _PATH_COLUMNS and label.lower() in _LABEL_COLUMNS:
        return True
    if _is_image(name, root) or not (len(rows) > 1 and _exists(root / rows[1][1])):
        return False
    return not is_labeled(label, (other for *_, other in islice(rows, 1, None)))


def _csv_rows(path: Path, text: str, root: Path) -> Iterator[tuple[int, str, str]]:
    """(line number, path, label) of each row that is neither empty nor a header."""
    columns = _columns(path, text, root)
    for line, row in islice(_cells(path, text), 0 if columns is None else 1, None):
        image, label = columns or (0, 1)
        if len(row) <= max(image, label):
            raise UserError(f"{path}, line {line}: {','.join(row)!r} given; expected a path and a label")
        yield line, row[image], row[label].strip()


def _cells(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each row that is not empty."""
    reader, line = csv.reader(io.StringIO(text, newline="")), 1
    try:
        for row in reader:
            if reader.line_num > line:
                raise UserError(f"{path}, line {line}: a cell goes on in the next line; is a quote not closed?")
            if any(row):
                yield line, row
            line += 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: {error}; is a quote not closed?") from None


def _columns(path: Path, text: str, root: Path) -> tuple[int, int] | None:
    """Which columns are the path and the label, where the first row is a header; None: it is an image, or missing."""
    rows = _cells(path, text)
    (line, row), second = next(rows, (0, [])), next(rows, None)
    if not row:
        return None
    header = [cell.strip().lower() for cell in row]
    image, label = (next((header.index(name) for name in names if name in header), None) for names in _COLUMNS)
    if image is not None and label is not None:
        return image, label
    if len(row) != 2:
        raise UserError(
            f"{path}, line {line}: {len(row)} columns given; expected two, a path and a label, or a header that names "
            "the columns path and label"
        )
    if _is_image(row[0], root):
        return None
    if image is None and label is None and not (second and _exists(root / second[1][0])):
        raise UserError(
            f"{path}, line {line}: {','.join(row)!r} given, and {root / row[0]} is no file; expected a path and a "
            "label, or a header: path,label"
        )
    columns = (1, 0) if image == 1 or label == 0 else (0, 1)
    named = columns[1]
    others = (cells[named].strip() for _, cells in islice(_cells(path, text), 1, None) if len(cells) > named)
    return None if is_labeled(row[named].strip(), others) else columns


def is_labeled(label: str, others: Iterable[str]) -> bool:
    """Whether a label is one of the others, up to the numbers in it: that of an image, and not of a header."""
    alike = {re.sub(r"\d+", "0", each) for each in {*others}}
    return re.sub(r"\d+", "0", label) in alike


def _classes_of(labels: Iterable[str]) -> list[str]:
    """Class names in order; of indices all from 0 to the largest one, so that a class may have no image.

    Numbers with leading zeros, or of more than six digits, are names.
    """
    names = set(labels)
    if all(name.isascii() and name.isdigit() and len(name) < 7 and name == str(int(name)) for name in names):
        return [str(i) for i in range(max(map(int, names)) + 1)]
    return sorted(names)


def _is_image(name: str, root: Path) -> bool:
    """Whether the first row of a list names an image, which may be missing, and is no header."""
    return name.lower().endswith(SUFFIXES) or _exists(root / name)


def _exists(path: Path) -> bool:
    return _facts(path)[0] != MISSING


def _facts(path: Path) -> tuple[int, int]:
    try:
        about = path.stat()
    except (OSError, ValueError):
        return MISSING, 0
    return (about.st_size if stat.S_ISREG(about.st_mode) else MISSING), about.st_mtime_ns
