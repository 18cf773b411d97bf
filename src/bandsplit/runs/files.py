"""Atomic writes, files set aside instead of deleted, and disk errors as messages."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path

from bandsplit.paths import reading_from, replace_bytes, writing_to

SET_ASIDE = "set_aside"
"""Name of the folder for files that are no longer used."""


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


def reading(path: Path) -> AbstractContextManager[None]:
    """`reading_from` with the advice to retry, for errors that may be temporary."""
    return reading_from(path, ". Nothing was changed; once it can be read, run the same command again")
