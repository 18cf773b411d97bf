"""The index of a data set: what is known of every file, kept on disk so that each is examined once.

An index is an Arrow IPC file of one row per image, in the order of the data set.  It is mapped into memory, so that the
ranks of a node share it.  `pyarrow.feather.read_table`, pandas and polars read it too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock, Timeout
from loguru import logger
from numpy.typing import NDArray

from bandsplit import paths
from bandsplit.cpus import available_cpus
from bandsplit.data import check, folders
from bandsplit.data.folders import MISSING, OWN_FOLDER, Found
from bandsplit.progress import Progress

VERSION = 2

LEVELS = ("off", "headers", "decode")
"""How far a file was examined; the values of `data.check`."""

_TEXT = pa.dictionary(pa.int32(), pa.string())

_EXAMINED: dict[str, pa.DataType] = {
    "checked": pa.int8(),
    "width": pa.int32(),
    "height": pa.int32(),
    "format": _TEXT,
    "color": _TEXT,
    "orientation": pa.int8(),
    "checksum": pa.uint64(),
    "reason": _TEXT,
    "note": _TEXT,
}
"""Columns that an examination fills: how far it went, an index into `LEVELS`, and the fields of `check.Verdict`."""

SCHEMA = pa.schema(
    {
        "name": pa.large_binary(),
        "label": pa.int32(),
        "bytes": pa.int64(),
        "mtime_ns": pa.int64(),
        **_EXAMINED,
    }
)
"""`name` is relative to the folder of the data set, or of its part where that has class folders."""

_MANY = 2_000_000
"""Up to this number of files, size and modification time of each are compared at every start, which takes seconds."""

_BYTES_PER_IMAGE = 200
"""Upper bound of the size of an index, for names of ordinary length."""

_READABLE = 50
"""Characters of a name that an index or its folder begins with; the hash of the whole name follows."""

_PER_PROCESS = 128
"""Files per worker process, below which another process does not pay off."""

_SECONDS_BETWEEN_WRITES = 120
"""A scan that is killed loses at most this much."""


@dataclass(frozen=True, eq=False)
class Index:
    """The images of one part of a data set (training, validation) with all that is known of them."""

    table: pa.Table
    """Of `SCHEMA`."""
    classes: list[str]
    passed_over: tuple[str, ...] = ()
    folders: dict[str, int] = field(default_factory=dict)
    """As `Found.folders`."""
    digest: str = ""
    """Of names, classes, sizes in bytes, and what is left out, wherever the files lie: 32 hex digits."""

    def __len__(self) -> int:
        return len(self.table)

    def column(self, name: str) -> NDArray[Any]:
        """A column of numbers."""
        return np.asarray(self._array(name).to_numpy(zero_copy_only=False))

    @cached_property
    def names(self) -> pa.LargeBinaryArray:
        return self._array("name")

    def _array(self, name: str) -> Any:
        column = self.table.column(name)
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies

    @cached_property
    def good(self) -> NDArray[np.bool_]:
        """(N,), whether a file has no reason to be left out."""
        reasons = self._array("reason")
        fine = np.array([text == "" for text in reasons.dictionary.to_pylist()], dtype=bool)
        return np.asarray(fine[reasons.indices.to_numpy()], dtype=bool)

    def texts(self, name: str) -> NDArray[np.object_]:
        """A column of texts."""
        column = self._array(name)
        values: NDArray[np.object_] = np.array(column.dictionary.to_pylist(), dtype=object)
        return np.asarray(values[column.indices.to_numpy()], dtype=object)

    def named(self, i: int) -> str:
        return os.fsdecode(self.names[i].as_py())

    def bad(self) -> list[tuple[str, str]]:
        """Name and reason of every file that is left out."""
        return self._named_with("reason")

    def notes(self) -> list[tuple[str, str]]:
        """Name and note of every file that is used, but decoded differently by Pillow or on a GPU."""
        return self._named_with("note")

    def _named_with(self, column: str) -> list[tuple[str, str]]:
        texts = self._array(column)
        rows = pc.indices_nonzero(pc.not_equal(texts, "")).to_pylist()
        return [(self.named(i), texts[i].as_py()) for i in rows]


# Files ----------------------------------------------------------------------------------------------------------------


def write(index: Index, path: Path, compressed: bool = False) -> None:
    """Writes the file whole or not at all. Raises UserError if it cannot be written."""
    metadata = {
        "version": VERSION,
        "classes": index.classes,
        "passed_over": index.passed_over,
        "folders": index.folders,
        "digest": index.digest,
    }
    table = index.table.replace_schema_metadata({"bandsplit": json.dumps(metadata)})
    options = pa.ipc.IpcWriteOptions(compression="zstd" if compressed else None)
    with paths.replace_bytes(path) as file, pa.ipc.new_file(file, table.schema, options=options) as writer:
        writer.write_table(table.combine_chunks())


def read(path: Path) -> Index | None:
    """The index in a file; None if there is none, or if it is damaged or of another version."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        metadata = json.loads((table.schema.metadata or {})[b"bandsplit"])
        if metadata["version"] != VERSION or table.schema.remove_metadata() != SCHEMA:
            return None
        passed_over = tuple(metadata["passed_over"])
        return Index(table, metadata["classes"], passed_over, metadata["folders"], metadata["digest"])
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowInvalid, KeyError, ValueError) as error:
        logger.warning("{}: this index cannot be read and is not used: {}", path, error)
        return None


def place(root: Path, part: str, images: int = 0) -> Path:
    """Where the index of a part of the data set in `root` is kept: beside the data, else in the cache folder.

    Raises UserError if neither can be written.
    """
    beside = _beside(root, part)
    with suppress(OSError):
        beside.parent.mkdir(exist_ok=True)
        free = shutil.disk_usage(beside.parent).free
        if os.access(beside.parent, os.W_OK | os.X_OK) and free > _BYTES_PER_IMAGE * images:
            return beside
    with paths.writing_to(beside):
        elsewhere = _in_cache(root, part)
        elsewhere.parent.mkdir(parents=True, exist_ok=True)
    return elsewhere


def places(root: Path, part: str) -> Iterator[Path]:
    """Where the index of a part may be found, beside the data first."""
    yield _beside(root, part)
    with suppress(OSError):
        yield _in_cache(root, part)


def _beside(root: Path, part: str) -> Path:
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", part)[:_READABLE]
    if name != part:
        name += f"-{_hashed(part)}"
    return root / OWN_FOLDER / f"{name}.arrow"


def _in_cache(root: Path, part: str) -> Path:
    """Raises OSError if there is no cache folder."""
    folder = f"{root.name[:_READABLE]}-{_hashed(root.absolute())}"
    return paths.cache_folder() / "index" / folder / _beside(root, part).name


def _hashed(name: str | Path) -> str:
    return hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()


# Refreshing -----------------------------------------------------------------------------------------------------------


def refresh(
    found: Found, path: Path, level: str, title: str, others: Iterable[Path] = ()
) -> Generator[None, None, Index]:
    """Brings the index of the files that were found up to date: examines what is new, changed or was examined less.

    The index is written to `path`, also from time to time during the scan, so that an interrupted scan continues.

    Args:
        level: one of `LEVELS`.
        title: what the progress bar says.
        others: where the index was kept if it is not at `path`, which may depend on the user and the free space.

    Returns:
        A generator that yields after every file, so that the caller can keep other ranks waiting. Its return value is
        the index.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    yield from _acquired(lock, path)
    try:
        known, wanted = read(path), LEVELS.index(level)
        if known is not None and _is_current(known, found, wanted):
            return known
        facts = _Facts(found, known or next(filter(None, (read(other) for other in others if other != path)), None))
        unwritten = time.monotonic()
        try:
            for _ in facts.examine(wanted, title):
                if time.monotonic() - unwritten > _SECONDS_BETWEEN_WRITES:
                    write(facts.index(), path)
                    unwritten = time.monotonic()
                yield
        finally:
            write(facts.index(), path)
        return read(path) or facts.index()
    finally:
        lock.release()


def _acquired(lock: FileLock, path: Path) -> Generator[None, None, None]:
    """Acquires the lock; yields while another process examines the same files."""
    waited = False
    while True:
        with paths.writing_to(path), suppress(Timeout):
            lock.acquire(timeout=1)
            return
        if not waited:
            logger.info("waiting for another process, which checks the same images ({})", path)
        waited = True
        yield


def unchanged(folder: Path, root: Path, part: str, level: str) -> tuple[Path, Index] | None:
    """The index of more than `_MANY` images, and its file, if no folder has changed since; otherwise None.

    It takes minutes to look at that many files if their directory entries are not in the cache.
    """
    for path in places(root, part):
        known = read(path)
        if (
            known is not None
            and len(known) > _MANY
            and (known.column("checked") >= LEVELS.index(level)).all()
            and folders.are_unchanged(folder, known.folders)
        ):
            return path, known
    return None


def _is_current(known: Index, found: Found, wanted: int) -> bool:
    return (
        known.classes == found.classes
        and known.passed_over == found.passed_over
        and known.folders == found.folders
        and known.names.equals(found.names)
        and np.array_equal(known.column("label"), found.labels)
        and np.array_equal(known.column("bytes"), found.sizes)
        and np.array_equal(known.column("mtime_ns"), found.mtimes)
        and bool((known.column("checked") >= wanted).all())
    )


class _Facts:
    """Columns of an index under construction."""

    def __init__(self, found: Found, known: Index | None) -> None:
        """Keeps what `known` has about files of the same name, size and modification time."""
        self._found = found
        count = len(found.names)
        self._columns: dict[str, NDArray[Any]] = {
            name: np.zeros(count, np.int32 if kind == _TEXT else kind.to_pandas_dtype())
            for name, kind in _EXAMINED.items()
        }
        self._texts: dict[str, dict[str, int]] = {name: {"": 0} for name, kind in _EXAMINED.items() if kind == _TEXT}
        if known is not None and len(known):
            self._take_over(known)
        missing = np.flatnonzero(found.sizes == MISSING)
        self._columns["reason"][missing] = self._code("reason", "no such file")
        self._columns["checked"][missing] = len(LEVELS)

    def _take_over(self, known: Index) -> None:
        found = self._found
        if known.names.equals(found.names):
            theirs = np.arange(len(known))
        else:
            theirs = pc.fill_null(pc.index_in(found.names, value_set=known.names), -1).to_numpy()
        same = (
            (theirs >= 0)
            & (known.column("bytes")[theirs] == found.sizes)
            & (known.column("mtime_ns")[theirs] == found.mtimes)
            & (known.column("checked")[theirs] < len(LEVELS))
        )
        theirs = theirs[same]
        for name in _EXAMINED:
            if name in self._texts:
                values = known._array(name)
                codes = np.array([self._code(name, text) for text in values.dictionary.to_pylist()], dtype=np.int32)
                self._columns[name][same] = codes[values.indices.to_numpy()[theirs]]
            else:
                self._columns[name][same] = known.column(name)[theirs]

    def _code(self, column: str, text: str) -> int:
        return self._texts[column].setdefault(text, len(self._texts[column]))

    def examine(self, wanted: int, title: str) -> Iterator[None]:
        rows = np.flatnonzero(self._columns["checked"] < wanted)
        if not len(rows):
            return
        root, names = str(self._found.folder), self._found.names
        files = (os.path.join(root, os.fsdecode(names[i].as_py())) for i in rows.tolist())  # noqa: PTH118
        processes = min(available_cpus(), -(-len(rows) // _PER_PROCESS))
        verdicts = check.examine(files, processes, decode=LEVELS[wanted] == "decode")
        bad = 0
        with Progress(title, len(rows)) as progress:
            for i, verdict in zip(rows.tolist(), verdicts, strict=True):
                for name, value in asdict(verdict).items():
                    self._columns[name][i] = self._code(name, value) if name in self._texts else value
                self._columns["checked"][i] = 0 if verdict.unread else wanted  # an error of the disk may pass
                progress.advance()
                if verdict.reason:
                    bad += 1
                    progress.note(f"{bad} bad")
                yield

    def index(self) -> Index:
        columns: dict[str, Any] = {
            "name": self._found.names,
            "label": self._found.labels,
            "bytes": self._found.sizes,
            "mtime_ns": self._found.mtimes,
            **self._columns,
        }
        for name, codes in self._texts.items():
            columns[name] = pa.DictionaryArray.from_arrays(columns[name], pa.array(list(codes), pa.string()))
        table = pa.table([pa.array(columns[name]) for name in SCHEMA.names], schema=SCHEMA)
        digest = _digest(self._found, self._columns["reason"] == 0)
        return Index(table, self._found.classes, self._found.passed_over, self._found.folders, digest)


def _digest(found: Found, good: NDArray[np.bool_]) -> str:
    """BLAKE2b of class names, and of name, class, size and `good` of every image."""
    digest = hashlib.blake2b(json.dumps(found.classes).encode(), digest_size=16)
    lengths = pc.binary_length(found.names).to_numpy()
    for column in (lengths, found.labels, found.sizes, good):
        digest.update(np.ascontiguousarray(column, dtype="<i8").data)
    for first in range(0, len(found.names), 2**16):
        digest.update(b"".join(found.names[first : first + 2**16].to_pylist()))
    return digest.hexdigest()
