"""Paths given by the user, and file system errors as UserError."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

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


def cache_folder() -> Path:
    """Where files are kept that can be made again: $BANDSPLIT_CACHE, else bandsplit in $XDG_CACHE_HOME or ~/.cache.

    Without a home folder, a folder for this user among the temporary files.  Raises OSError if that is impossible or
    others may write to it, since whoever can write there can run code as this user.
    """
    if folder := os.environ.get("BANDSPLIT_CACHE"):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bandsplit"
    except RuntimeError:  # a container's user without an entry in /etc/passwd
        return _temporary_cache()


def _temporary_cache() -> Path:
    advice = "set BANDSPLIT_CACHE to a writable folder"
    folder = Path(tempfile.gettempdir(), f"bandsplit-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise OSError(f"cannot create a cache folder ({error}): {advice}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise OSError(f"{folder} is not a folder that only this user can write to: {advice}")
    return folder


@contextmanager
def reading_from(path: Path, advice: str = "") -> Iterator[None]:
    """Turns an OSError (no permission, stale handle, disk error) into a UserError that names the file or folder.

    Use it around I/O only: an OSError does not mean that the content is invalid. `advice` is appended to the message.
    """
    try:
        yield
    except OSError as error:
        told = UserError(f"{os.fsdecode(error.filename or path)}: cannot be read: {error.strerror or error}{advice}")
        told.one_rank = True
        raise told from error


def require_file(option: str, path: Path) -> None:
    """Raises UserError if a file of this name, which the option gives, cannot be written."""
    try:
        has_folder, is_folder = path.parent.is_dir(), path.is_dir()
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}") from error
    if not has_folder:
        raise UserError(f"{option} {path}: there is no folder {path.parent}")
    if is_folder:
        raise UserError(f"{option} {path}: this is a folder; name a file")


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turns an OSError (disk full, read-only, gone) into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        told = UserError(f"{path}: cannot be written: {error}")
        told.one_rank = True
        raise told from error


def temporary(path: Path) -> Path:
    """What a file is called until it is whole: beside it, hidden, and short, since its name may be of any length."""
    return path.with_name(f".{hashlib.blake2b(os.fsencode(path.name), digest_size=8).hexdigest()}.tmp")


@contextmanager
def replace_bytes(path: Path, durable: bool = True) -> Iterator[IO[bytes]]:
    """A file to write to, which takes its name at the end. Raises UserError if it cannot be written.

    If it is not `durable`, a machine that loses power may leave it empty.
    """
    unfinished = temporary(path)
    with writing_to(path):
        with unfinished.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        unfinished.replace(path)
        if durable:
            sync_folder(path.parent)


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
