"""Shards mapped into memory: the page cache holds them once for all ranks of a node."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from loguru import logger

from bandsplit.data.store.manifest import header_bytes
from bandsplit.errors import UserError
from bandsplit.paths import reading_from
from bandsplit.progress import followed

_POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14, which Python does not name."""

Array = npt.NDArray[Any]


class MappedBand:
    """The shards of one band, (images, h, w, 3) each, read-only."""

    def __init__(self, paths: Sequence[Path], counts: Sequence[int], shape: tuple[int, int, int], dtype: str) -> None:
        self.shards: list[Array] = []
        self._maps: list[mmap.mmap] = []
        self._bytes: list[memoryview] = []
        self._starts: list[int] = []
        """Of the values in each file, in bytes."""
        self._image_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        for path, count in zip(paths, counts, strict=True):
            with reading_from(path), path.open("rb") as file:
                start = header_bytes(file.read(10))
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            mapped.madvise(mmap.MADV_RANDOM)  # what is read is asked for by `will_need`, to the byte
            self._maps.append(mapped)
            self._bytes.append(memoryview(mapped))
            self._starts.append(start)
            self.shards.append(np.frombuffer(mapped, dtype, count * int(np.prod(shape)), start).reshape(count, *shape))

    def will_need(self, places: Sequence[tuple[int, int]]) -> None:
        """Starts to read images, (shard, row) each, from the disk, all at once."""
        for shard, row in places:
            start = self._starts[shard] + row * self._image_bytes
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._maps[shard].madvise(mmap.MADV_WILLNEED, first, start + self._image_bytes - first)

    def take(self, places: Sequence[tuple[int, int]], corners: Sequence[tuple[int, int]] | None, out: Array) -> None:
        """Copies images, (shard, row) each, into `out` (B, h, w, 3), cut from their corners (top, left)."""
        if corners is None:
            # as bytes, with which Python spends half as long on an image as with arrays
            size, starts, files = self._image_bytes, self._starts, self._bytes
            into, end = out.view(np.uint8).reshape(-1).data, 0
            for shard, row in places:
                begin, start = end, starts[shard] + row * size
                end += size
                into[begin:end] = files[shard][start : start + size]
            return
        _, height, width, _ = out.shape
        for n, ((shard, row), (top, left)) in enumerate(zip(places, corners, strict=True)):
            out[n] = self.shards[shard][row, top : top + height, left : left + width]

    def hold(self) -> bool:
        """Reads all into memory, and keeps it there where the system allows that; returns whether it does."""
        kept = True
        for mapped, shard in zip(self._maps, self.shards, strict=True):
            try:
                mapped.madvise(_POPULATE_READ)
            except OSError:
                shard.reshape(-1).view(np.uint8)[:: mmap.PAGESIZE].sum()
            kept = kept and _lock(shard)
        return kept


def _lock(array: Array) -> bool:
    """mlock(2): the pages stay in memory as long as they are mapped."""
    address = array.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    length = array.ctypes.data + array.nbytes - address
    failed: int = ctypes.CDLL(None).mlock(ctypes.c_void_p(address), ctypes.c_size_t(length))
    return not failed


def hold(bands: Sequence[MappedBand]) -> None:
    """Reads bands into memory."""
    kept = [band.hold() for band in followed(bands, "reading bands into memory", len(bands), "bands")]
    if not all(kept):
        logger.info("bands are in memory, but not locked there (ulimit -l): they may be read again if it gets scarce")


def require_memory(needed: int, root: Path = Path("/")) -> None:
    """Raises UserError if `needed` bytes do not fit into the memory that is left."""
    available = available_bytes(root)
    if needed > available:
        raise UserError(
            f"data.in_memory: true given, but the bands that are read take {needed / 1e9:,.1f} GB and this node, "
            f"container or job has {available / 1e9:,.1f} GB left; with false they are read as they are needed"
        )


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that this process can still have: the machine's, or less by the limit of a container or a Slurm job.

    Page cache counts as free, since the kernel gives it back.
    """
    found = []
    with suppress(OSError, ValueError, StopIteration):
        lines = (root / "proc/meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    for folder, limit, usage in _control_groups(root):
        with suppress(OSError, ValueError):  # not there, or "max"
            found.append(max(0, int((folder / limit).read_text()) - _in_use(folder, usage)))
    return min(found) if found else 2**63


def _control_groups(root: Path) -> Iterator[tuple[Path, str, str]]:
    """Folders of the cgroups that this process is in, each with the names of the files of its limit and its use."""
    lines: list[str] = []
    with suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        parts = Path(path).parts[1:]
        for depth in range(len(parts) + 1):
            yield top.joinpath(*parts[:depth]), *names


def _in_use(folder: Path, usage: str) -> int:
    """Bytes in use by a cgroup and those below it, without the page cache; 0 where the kernel does not tell."""
    with suppress(OSError, ValueError, KeyError):
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        total = "total_" if "total_inactive_file" in counts else ""  # cgroups v1
        cache = sum(int(counts[f"{total}{kind}_file"]) for kind in ("inactive", "active"))
        return int((folder / usage).read_text()) - cache
    return 0
