"""Files that are written whole or not at all; what the file system refuses becomes a message."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bandsplit.errors import UserError


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing_to(path):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turns what the file system refuses (full, read-only, gone) into a message for the user."""
    try:
        yield
    except OSError as error:
        told = UserError(f"{path}: cannot be written: {error}")
        told.one_rank = True
        raise told from error
