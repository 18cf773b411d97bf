"""Atomic writes, files set aside instead of deleted, and disk errors as messages."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

from bandsplit.paths import reading_from, writing_to

SET_ASIDE = "set_aside"
"""Name of the folder for files that are no longer used."""


@contextmanager
def replace_bytes(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which takes its name at the end. Raises UserError if it cannot be written."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing_to(path):
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Writes a file atomically. Raises UserError if it cannot be written."""
    with replace_bytes(path) as file:
        file.write(text.encode("utf-8", errors="surrogateescape"))


def read_text(path: Path) -> str | None:
    """Text of a file; None if it does not exist. Bytes that are not UTF-8 are kept by a later `replace_text`.

    Raises UserError if it cannot be read.
    """
    with reading(path):
        try:
            return path.read_text(encoding="utf-8", errors="surrogateescape")
        except FileNotFoundError:
            return None


def make_folder(path: Path) -> None:
    """Creates a folder and its parents if missing. Raises UserError if it cannot."""
    with writing_to(path):
        path.mkdir(parents=True, exist_ok=True)


def set_aside(path: Path) -> Path:
    """Moves a file or folder into the folder `set_aside` next to it, under an unused name; returns the new path."""
    with writing_to(path):
        folder = path.parent / SET_ASIDE
        folder.mkdir(exist_ok=True)
        name, number = path.name.lstrip("."), 1
        while os.path.lexists(folder / name):
            number += 1
            name = f"{path.name.lstrip('.')}.{number}"
        path.rename(folder / name)
        return folder / name


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable, if the file system supports it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # CIFS and some FUSE file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def reading(path: Path) -> AbstractContextManager[None]:
    """`reading_from` with the advice to retry, for errors that may be temporary."""
    return reading_from(path, ". Nothing was changed; once it can be read, run the same command again")
