"""What packing has in common, of bands and of images: resumable work in chunks on all cores, and checksums.

A chunk is a run of images that one worker packs by itself.  Its record, a small JSON file, is written last and at once:
what has a record is finished, everything else is made again.  The manifest is written when all chunks have one, so a
folder with a manifest is complete.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from bandsplit.data.images import ImageFiles, Paths
from bandsplit.data.store.manifest import CHECKSUMS, MANIFEST, PLAN, LeftOut, Manifest
from bandsplit.errors import UserError
from bandsplit.paths import reading_from, replace_bytes, temporary, writing_to
from bandsplit.progress import Progress

WORK = ".packing"
"""Folder of the records of a pack that is not finished."""

CHUNKS, SMALLEST_CHUNK = 256, 1024
"""Chunks of a large part, so that the number of files stays small; images of a chunk in a small one."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """Images first .. first + len(paths) - 1 of a part."""

    part: str
    number: int
    first: int
    paths: list[str]
    labels: list[int]

    @property
    def name(self) -> str:
        return f"{self.part}_{self.number:05d}"


class Source:
    """The images that are to be packed.

    Args:
        parts: the images of "train" and "val".
        root: folder of the data set, to which names are relative.
    """

    def __init__(self, parts: Mapping[str, ImageFiles], root: Path) -> None:
        self.parts, self.root = parts, root
        self.classes = tuple(parts["train"].classes)
        self.names = {part: names_of(files.paths, root) for part, files in parts.items()}
        self.digests = {part: files.digest for part, files in parts.items()}

    def chunks(self, images: int | None = None) -> list[Chunk]:
        """All parts in chunks of this number of images; None: a suitable number."""
        chunks = []
        for part, files in self.parts.items():
            count = images or max(SMALLEST_CHUNK, -(-len(files) // CHUNKS))
            for number, first in enumerate(range(0, len(files), count)):
                some = slice(first, first + count)
                chunks.append(Chunk(part, number, first, list(files.paths[some]), list(files.labels[some])))
        return chunks

    def plan(self) -> dict[str, str]:
        return {f"images of {part}": digest for part, digest in self.digests.items()}

    def left_out(self, part: str, records: Iterable[Record]) -> tuple[LeftOut, ...]:
        """Images that the index of a part has found bad, and those that could not be packed."""
        files = self.parts[part]
        known = files.index.bad() if files.index else []
        above = files.paths.folder if isinstance(files.paths, Paths) else self.root
        names = names_of((str(above / name) for name, _ in known), self.root)
        return (
            *(LeftOut(name=name, reason=reason) for name, (_, reason) in zip(names, known, strict=True)),
            *(LeftOut(**each) for record in records for each in record["left_out"]),
        )


def names_of(paths: Iterable[str], root: Path) -> list[str]:
    """Paths below the root of the data set."""
    start = str(root.absolute())
    return [os.path.relpath(path, start) for path in paths]


class Folder:
    """The folder that something is packed into, from the first file to the manifest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._work = path / WORK

    @contextmanager
    def begun(self, plan: Mapping[str, Any]) -> Iterator[bool]:
        """Inside, no other process packs into it.  Yields whether it is complete already.

        Raises UserError if it holds something else: what was to be packed there differed, or it is no pack.
        """
        with writing_to(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            there = self.path.exists()
            if there and not self.path.is_dir():
                raise UserError(f"--to {self.path}: this is a file, not a folder")
            plan_file, lock_file = self.path / PLAN, self.path / ".lock"
            own = {lock_file, temporary(plan_file)}  # of a pack that ended before its plan was written
            if there and not plan_file.exists() and not own.issuperset(self.path.iterdir()):
                raise UserError(f"--to {self.path}: this folder holds other files; name a new or an empty one")
            self.path.mkdir(exist_ok=True)
            lock = FileLock(lock_file, blocking=False)
            try:
                lock.acquire()
            except Timeout:
                raise UserError(f"--to {self.path}: another process packs into it; wait for it to end") from None
            try:
                yield self._is_complete(plan)
            finally:
                lock.release()

    def _is_complete(self, plan: Mapping[str, Any]) -> bool:
        wanted = json.loads(json.dumps(plan))  # as it is read from a file: lists instead of tuples
        path = self.path / PLAN
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = [
                f"{key} was {_short(before.get(key))}, now {_short(wanted.get(key))}"
                for key in sorted({*before, *wanted})
                if before.get(key) != wanted.get(key)
            ]
            if changed:
                raise UserError(f"--to {self.path}: something else was packed there: {'; '.join(changed)}")
        else:
            replace(path, json.dumps(wanted, indent=1).encode() + b"\n")
        return (self.path / MANIFEST).exists()

    def require_space(self, needed: int) -> None:
        """Raises UserError if the disk has less free than `needed` bytes with what is there already."""
        free = shutil.disk_usage(self.path).free
        there = sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        if needed > free + there:
            raise UserError(
                f"--to {self.path}: about {needed / 1e9:,.1f} GB are needed, {(free + there) / 1e9:,.1f} GB are free"
            )

    def packed(self, pack: Callable[[Chunk], Record], chunks: Sequence[Chunk], workers: int) -> list[Record]:
        """The record of every chunk, in order; chunks without a record are packed, in worker processes."""
        records: dict[str, Record] = {}
        for chunk in chunks:
            path = self._record(chunk)
            if path.exists():
                records[chunk.name] = json.loads(path.read_text(encoding="utf-8"))
        left = [chunk for chunk in chunks if chunk.name not in records]
        total, missing = (sum(len(chunk.paths) for chunk in some) for some in (chunks, left))
        with Progress(f"packing into {self.path}", total, done=total - missing) as progress:
            for chunk, record in worked(pack, left, workers):
                replace(self._record(chunk), json.dumps(record).encode())
                records[chunk.name] = record
                progress.advance(len(chunk.paths))
        return [records[chunk.name] for chunk in chunks]

    def _record(self, chunk: Chunk) -> Path:
        return self._work / f"{chunk.name}.json"

    def finish(self, manifest: Manifest) -> None:
        """Writes the manifest, which makes the folder complete."""
        with writing_to(self.path):
            replace(self.path / MANIFEST, manifest.as_json().encode() + b"\n")
            shutil.rmtree(self._work, ignore_errors=True)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def worked(work: Callable[[Chunk], Record], chunks: Sequence[Chunk], workers: int) -> Iterator[tuple[Chunk, Record]]:
    """Results of chunks as they are finished by the worker processes; without workers, in this process.

    Raises the UserError of a worker, and one where a worker is killed.
    """
    if not workers or not chunks:
        for chunk in chunks:
            yield chunk, work(chunk)
        return
    spawn = multiprocessing.get_context("spawn")  # DALI and torch have threads, which a fork would lose
    with ProcessPoolExecutor(min(workers, len(chunks)), spawn, _start_worker, (os.getpid(),)) as pool:
        futures: dict[Future[Record], Chunk] = {pool.submit(work, chunk): chunk for chunk in chunks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker was killed, by the system for memory or by a file that crashes the decoder; the same command "
                "goes on from here, with fewer --workers in less memory"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(parent: int) -> None:
    """Ctrl-C is the parent's; a worker whose parent was killed ends too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def replace(path: Path, content: bytes, durable: bool = True) -> str:
    """Writes a file whole or not at all, with the folders above it; returns its SHA-256.

    Where it is not `durable`, a machine that loses power may leave it empty: `verify` finds that.
    """
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replace_bytes(path, durable) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()


def npy(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


class ArrayFile:
    """An .npy file (rows, *shape) written piece by piece; it has its name when it is whole.

    Written like any file, so that a full disk is an error: into a memory map it would end the process.
    """

    def __init__(self, path: Path, rows: int, shape: Sequence[int], dtype: npt.DTypeLike) -> None:
        self._path, self._temporary = path, temporary(path)
        self._shape, self._dtype, self._planned, self._rows = tuple(shape), np.dtype(dtype), rows, 0
        self._hash = hashlib.sha256()
        with writing_to(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = self._temporary.open("wb")
        self._write(self._header(rows))

    def _header(self, rows: int) -> bytes:
        """Of the same length for any number of rows."""
        header = io.BytesIO()
        about = {
            "descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (rows, *self._shape)
        }  # fmt: skip
        np.lib.format.write_array_header_1_0(header, about)
        return header.getvalue()

    def append(self, rows: npt.NDArray[Any]) -> None:
        self._write(np.ascontiguousarray(rows).data)
        self._rows += len(rows)

    def _write(self, content: bytes | memoryview) -> None:
        with writing_to(self._path):
            self._file.write(content)
        self._hash.update(content)

    def abandon(self) -> None:
        """Closes a file that is not whole; what was written of it has another name."""
        self._file.close()

    def close(self) -> str:
        """Gives the file its name, also with fewer rows than planned; returns its SHA-256."""
        with writing_to(self._path):
            if self._rows != self._planned:
                self._file.seek(0)
                self._file.write(self._header(self._rows))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            value = self._hash.hexdigest() if self._rows == self._planned else file_sha256(self._temporary)
            self._temporary.replace(self._path)
        return value


def checksum_lines(sums: Mapping[str, str]) -> bytes:
    """As `sha256sum` writes them: names relative to the folder of the file, in which odd ones are escaped."""
    return b"".join(_checksum_line(name, value) for name, value in sorted(sums.items()))


def _checksum_line(name: str, value: str) -> bytes:
    raw = os.fsencode(name)
    escaped = raw.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    return (b"\\" if escaped != raw else b"") + value.encode() + b"  " + escaped + b"\n"


def read_checksums(path: Path) -> dict[str, str]:
    """Name -> SHA-256.  Raises UserError if the file cannot be read or understood."""
    sums = {}
    with reading_from(path):
        lines = path.read_bytes().splitlines()
    for line in lines:
        escaped, line = line[:1] == b"\\", line.removeprefix(b"\\")
        value, separator, name = line.partition(b"  ")
        if not separator or len(value) != 64:
            raise UserError(f"{path}: damaged: {line[:80]!r} is no checksum")
        if escaped:
            name = name.replace(b"\\\\", b"\0").replace(b"\\n", b"\n").replace(b"\\r", b"\r").replace(b"\0", b"\\")
        sums[os.fsdecode(name)] = value.decode("ascii", "replace")
    return sums


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path, sums: Mapping[str, str]) -> None:
    replace(folder / CHECKSUMS, checksum_lines(sums))
