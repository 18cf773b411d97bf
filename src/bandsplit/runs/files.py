"""Files that are written whole or not at all, set aside instead of deleted; errors of the disk become messages."""

from __future__ import annotations

import errno
import os
from contextlib import AbstractContextManager
from pathlib import Path

from bandsplit.paths import reading_from, writing_to

SET_ASIDE = "set_aside"
"""Folder of what is no longer used but was not deleted."""


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing_to(path):
        with temporary.open("w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)


def read_text(path: Path) -> str | None:
    """Text of a file, in which bytes that are not UTF-8 survive a `replace_text`; None: there is no such file.

    Raises UserError where it cannot be read.
    """
    with reading(path):
        try:
            return path.read_text(encoding="utf-8", errors="surrogateescape")
        except FileNotFoundError:
            return None


def make_folder(path: Path) -> None:
    """With those above it, where it is not there."""
    with writing_to(path):
        path.mkdir(parents=True, exist_ok=True)


def set_aside(path: Path) -> Path:
    """Moves a file or folder into the folder `set_aside` beside it, under a name that is free; returns where it is."""
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
    """Makes renames in a folder durable, on file systems that can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # folders cannot be synced: CIFS, some of FUSE
            raise
    finally:
        os.close(descriptor)


def reading(path: Path) -> AbstractContextManager[None]:
    """`reading_from`, for what a second try may find readable."""
    return reading_from(path, ". Nothing was changed; once it can be read, run the same command again")
