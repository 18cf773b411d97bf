"""Paths given by the user, and file system errors as UserError."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bandsplit.errors import UserError


def expanded(path: str, key: str) -> Path:
    """Expands `~` and `$VARIABLES` in the path given by the config key `key`.

    Raises UserError if a variable is not set or a home folder is unknown.
    """
    text = os.path.expandvars(path)
    if "$" in text:
        raise UserError(f"{key}: {path!r} given, but the variable is not set; set it or use --set {key}=…")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        user = Path(text).parts[0]
        raise UserError(f"{key}: {path!r} given, but {user} has no home folder here; use --set {key}=…") from None


@contextmanager
def reading_from(path: Path, advice: str = "") -> Iterator[None]:
    """Turns an OSError (no permission, stale handle, disk error) into a UserError that names the file or folder.

    Use it around I/O only: an OSError does not mean that the content is invalid. `advice` is appended to the message.
    """
    try:
        yield
    except OSError as error:
        told = UserError(f"{error.filename or path}: cannot be read: {error.strerror or error}{advice}")
        told.one_rank = True
        raise told from error


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turns an OSError (disk full, read-only, gone) into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        told = UserError(f"{path}: cannot be written: {error}")
        told.one_rank = True
        raise told from error
