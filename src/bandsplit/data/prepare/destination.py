"""The folder that a data set is prepared in: unit by unit, so that a run that was killed continues where it stopped.

What is unfinished lies in a hidden folder of the destination, and is moved to its place with one rename.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bandsplit.errors import UserError
from bandsplit.paths import reading_from, writing_to

STATE = ".prepare"
RESULT = "prepare.json"

SLACK = 1.02
"""Space on the disk to bytes of an archive of images: file systems round up to whole blocks."""

Counts = dict[str, dict[str, int]]
"""Images of each class, of each part of the data set ("train", "val", "left out")."""


@dataclass
class Job:
    """What is prepared; a destination that was begun with another job is refused."""

    what: str
    """Name of the command."""
    options: dict[str, Any] = field(default_factory=dict)
    """Everything that the result depends on, beside the content of the archives."""

    def __str__(self) -> str:
        return " ".join([self.what, *(f"{key}={value}" for key, value in self.options.items())])


class Destination:
    """A destination that this process has to itself; see `opened`."""

    def __init__(self, root: Path, job: Job) -> None:
        self.root = root
        self.job = job
        self._state = root / STATE

    @property
    def result(self) -> Counts | None:
        """Images of each class, once everything is finished."""
        found = _read(self.root / RESULT)
        return None if found is None else found["images"]

    def work(self, name: str) -> Path:
        """A folder for what is unfinished; what an interrupted run has left in it is still there."""
        folder = self._state / "work" / name
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def emptied(self, name: str) -> Path:
        """The same, empty."""
        folder = self._state / "work" / name
        with writing_to(folder):
            if folder.exists():
                shutil.rmtree(folder)
        return self.work(name)

    # Units ------------------------------------------------------------------------------------------------------------

    def is_finished(self, unit: str) -> bool:
        """Whether a unit has been committed."""
        record = self._record(unit)
        return record is not None and all((self.root / place).exists() for place in record["places"])

    def commit(self, unit: str, moves: dict[str, Path], counts: Counts, size: int = 0) -> None:
        """Moves what is finished to its places.  A process that is killed in between does the unit again.

        Args:
            unit: name of the unit, such as "n01440764".
            moves: place, relative to the destination, of each finished file or folder.
            counts: images of the unit.
            size: bytes of the unit in the archive.
        """
        record = self._state / "units" / unit
        with writing_to(self.root):
            record.parent.mkdir(exist_ok=True)
            record.write_text(json.dumps({"places": list(moves), "counts": counts, "size": size}))
            for place, source in moves.items():
                target = self.root / place
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.is_dir():  # of a process that was killed in the middle of this
                    shutil.rmtree(target)
                source.rename(target)

    @property
    def finished_bytes(self) -> int:
        """Bytes in the archive of all finished units."""
        return sum(int(record["size"]) for record in self._records())

    def finish(self) -> None:
        """Adds up the units, writes the result, and removes the hidden folder."""
        images: Counts = {}
        for record in self._records():
            for part, classes in record["counts"].items():
                images.setdefault(part, {}).update(classes)
        images = {part: dict(sorted(classes.items())) for part, classes in sorted(images.items())}
        about = {"prepared": self.job.what, "options": self.job.options, "images": images}
        with writing_to(self.root):
            _write(self._state / RESULT, about)
            (self._state / RESULT).rename(self.root / RESULT)
        self.close()

    def close(self) -> None:
        with writing_to(self.root):
            shutil.rmtree(self._state, ignore_errors=True)

    def note(self, name: str, about: dict[str, Any]) -> None:
        """Remembers something for a run that resumes."""
        _write(self._state / f"{name}.json", about)

    def noted(self, name: str) -> dict[str, Any] | None:
        return _read(self._state / f"{name}.json")

    def _record(self, unit: str) -> dict[str, Any] | None:
        return _read(self._state / "units" / unit)

    def _records(self) -> Iterator[dict[str, Any]]:
        """Of all finished units."""
        for path in sorted((self._state / "units").glob("*")):
            record = self._record(path.name)
            if record is not None and self.is_finished(path.name):
                yield record

    # Space ------------------------------------------------------------------------------------------------------------

    def require_space(self, archives: int) -> None:
        """Raises UserError if the disk has less space than the unfinished part of `archives` bytes needs."""
        with reading_from(self.root):
            unfinished = sum(path.lstat().st_size for path in (self._state / "work").rglob("*"))
            free = shutil.disk_usage(self.root).free
        needed = SLACK * (archives - self.finished_bytes - unfinished)
        if needed > free:
            raise UserError(
                f"{self.root}: {format_bytes(needed)} needed, {format_bytes(free)} free on this disk; free some space "
                "or choose another --to"
            )


@contextmanager
def opened(root: Path, job: Job, beside: Collection[Path] = ()) -> Iterator[Destination]:
    """A new folder, or one that an interrupted run of the same job has left, or that is finished.

    Args:
        root: the destination.
        job: what is prepared.
        beside: files that may lie in the destination: the archives.

    Raises UserError if the folder holds anything else, or another process works in it; nothing is changed then.
    """
    root = root.absolute()
    destination = Destination(root, job)
    state = root / STATE
    with reading_from(root):
        _require_own(root, job, {path.absolute() for path in beside})
    new = not root.exists()
    lock = FileLock(state / "lock")
    with writing_to(root):
        state.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{root}: another process is preparing a data set in this folder") from None
    try:
        if destination.result is None and _read(state / "job.json") is None:
            _write(state / "job.json", {"prepared": job.what, "options": job.options})
        yield destination
    finally:
        if destination.result is not None or _is_untouched(state):
            destination.close()
            if new and not any(root.iterdir()):
                root.rmdir()
        lock.release()


def _require_own(root: Path, job: Job, beside: set[Path]) -> None:
    if not root.exists():
        return
    if not root.is_dir():
        raise UserError(f"{root}: not a folder; --to names the folder that the data set is prepared in")
    for file, how in ((root / RESULT, "was prepared"), (root / STATE / "job.json", "was begun")):
        about = _read(file)
        if about is not None:
            other = Job(about["prepared"], about["options"])
            if other != job:
                raise UserError(f"{root}: {how} with '{other}', not with '{job}'; choose another --to")
            return
    others = sorted(path.name for path in root.iterdir() if path.name != STATE and path not in beside)
    if others:
        some = ", ".join(others[:5]) + ", …" * (len(others) > 5)
        raise UserError(f"{root}: contains other files ({some}); --to needs a new or empty folder")


def _is_untouched(state: Path) -> bool:
    """Whether nothing has been done in it."""
    return state.is_dir() and {path.name for path in state.iterdir()} <= {"lock", "job.json"}


def _read(path: Path) -> dict[str, Any] | None:
    """None if there is none, or a process was killed while it wrote it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(path: Path, about: dict[str, Any]) -> None:
    with writing_to(path):
        path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def format_bytes(size: float) -> str:
    """In decimal units, as disks and `df -H` count them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
