"""Archives, read from front to back: names that cannot climb out, and no image that is lost silently."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Literal, cast

from bandsplit.data import folders
from bandsplit.data.folders import SUFFIXES
from bandsplit.data.prepare.progress import Progress
from bandsplit.errors import UserError
from bandsplit.paths import reading_from, writing_to

CHUNK = 1 << 20
BUFFER = 1 << 16

AGAIN = "download it again and repeat the command; finished classes are kept"

# -------------------------------------------------------------------------------------------------- reading an archive


ENDS_EARLY = "unexpected end of data"  # tarfile's own words


class NotATar(tarfile.ReadError):
    """Not even the first header makes sense."""


class _Header(tarfile.TarInfo):
    """A member's header, read strictly.

    tarfile takes a damaged or missing header for the end of the archive: all that follows would be lost silently.
    """

    end_may_be_missing = False

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        if not buf and cls.end_may_be_missing:
            buf = bytes(tarfile.BLOCKSIZE)
        if len(buf) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError(ENDS_EARLY)
        if not any(buf):  # zeros: the end of the archive
            return super().frombuf(buf, encoding, errors)
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


class _InnerHeader(_Header):
    """In an archive within an archive, whose length is known: some writers leave the end marker out."""

    end_may_be_missing = True


@contextmanager
def _tar(source: IO[bytes], mode: Literal["r|", "r:"], header: type[_Header]) -> Iterator[tarfile.TarFile]:
    try:
        tar = tarfile.open(fileobj=source, mode=mode, bufsize=BUFFER, tarinfo=header)  # noqa: SIM115
    except tarfile.ReadError as error:  # in the first header, which is read here
        if header is _InnerHeader and str(error) == ENDS_EARLY:
            raise
        raise NotATar(str(error)) from None
    with tar:
        yield tar


def is_gzip(path: Path) -> bool:
    with reading_from(path), path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


@contextmanager
def opened(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """An archive to read from front to back, decompressed where it is gzip, and a function: bytes read of the file.

    Reads gzip to its end, where its checksum is.
    """
    with reading_from(path), path.open("rb") as raw:
        if not is_gzip(path):
            yield raw, raw.tell
            return
        with gzip.GzipFile(fileobj=raw) as unzipped:
            yield cast(IO[bytes], unzipped), raw.tell
            with reporting_damage(path):
                while unzipped.read(CHUNK):
                    pass


@contextmanager
def reporting_damage(path: Path, inside: str = "") -> Iterator[None]:
    """Turns the errors of tarfile, gzip and zlib for damaged archives into a UserError.

    Args:
        path: the archive.
        inside: the archive within it that is being read, if any.
    """
    within = f"{inside!r} in it" if inside else ""
    try:
        yield
    except NotATar:
        with path.open("rb") as file:
            start = "" if inside else f"; it begins with {file.read(12)!r}"
        raise UserError(f"{path}: {within + ' is ' if inside else ''}not a tar archive{start}") from None
    except EOFError:
        raise UserError(_cut(path, inside)) from None
    except (gzip.BadGzipFile, zlib.error) as error:  # gzip's checksum is at its end: the damage is anywhere
        advice = "download it again and prepare it into another folder: any image unpacked from it may be wrong"
        raise UserError(f"{path}: damaged: {error}; {advice}") from error
    except tarfile.TarError as error:
        if str(error) != ENDS_EARLY:
            raise UserError(f"{path}: {within + ' is ' if inside else ''}damaged: {error}; {AGAIN}") from error
        raise UserError(f"{path}: {within} is truncated; {AGAIN}" if inside else _cut(path, "")) from None


def _cut(path: Path, inside: str) -> str:
    where = f" inside {inside!r}" if inside else ""
    return f"{path}: truncated: its {path.stat().st_size:,} bytes end{where} before the end of the archive; {AGAIN}"


def files(source: IO[bytes], path: Path, inside: str = "") -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """The files of a tar archive in its order, each with its content, which must be read before the next one.

    Call it within `reporting_damage`.

    Args:
        source: where the archive is read from.
        path: the archive's file, for messages.
        inside: its name within that file, if it is an archive in an archive.
    """
    header = _InnerHeader if inside else _Header
    with _tar(source, "r|", header) as tar:
        for member in tar:
            if is_file(member, path, inside):
                content = tar.extractfile(member)
                assert content is not None
                yield member, content


def index(path: Path) -> list[tarfile.TarInfo]:
    """Headers of all files of an archive, which must be complete.

    Seeks from header to header; a gzip file is read to its end.  Raises UserError as `reporting_damage`.
    """
    with reporting_damage(path), reading_from(path):
        if is_gzip(path):
            with opened(path) as (source, _):
                return [member for member, _ in files(source, path)]
        members: list[tarfile.TarInfo] = []
        last = ""
        with path.open("rb") as file, _tar(file, "r:", _Header) as tar:
            try:
                for member in tar:
                    last = member.name
                    if is_file(member, path):
                        members.append(member)
            except tarfile.ReadError as error:
                if str(error) == ENDS_EARLY:
                    raise UserError(_cut(path, last)) from None
                raise
        return members


@contextmanager
def member_of(path: Path, member: tarfile.TarInfo) -> Iterator[IO[bytes]]:
    """The content of a member that `index` has found in an archive that is not compressed."""
    with tarfile.open(path, "r:") as tar:
        content = tar.extractfile(member)
        assert content is not None
        yield content


# --------------------------------------------------------------------------------------------------------------- names


def is_file(member: tarfile.TarInfo, path: Path, inside: str = "") -> bool:
    """Whether a member is a file, not a folder.

    Raises UserError if its name climbs out of the folder, or it is a link or a device.
    """
    archive = f"{path}: {inside}" if inside else str(path)
    require_safe(member.name, archive)
    try:
        tarfile.data_filter(member, "/nowhere")  # nothing is written there: the filter compares names
    except tarfile.FilterError as error:
        raise UserError(f"{archive}: {member.name!r} in it is refused: {error}") from None
    if member.isdir():
        return False
    if not member.isfile():
        raise UserError(f"{archive}: {member.name!r} in it is refused: a link or a device, not a file")
    return True


def require_safe(name: str, archive: str) -> None:
    """Raises UserError if the name of a file in an archive or list points outside of the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise UserError(f"{archive}: {name!r} in it is refused: it points outside of the folder")


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def is_hidden(name: str) -> bool:
    """Whether it is no data, as in the folders of a data set: macOS adds such files to archives."""
    return any(folders.is_hidden(part) for part in PurePosixPath(name).parts)


def image_name(name: str, archive: str) -> str:
    """The last part of an image's name.  Raises UserError if it is no image."""
    if not is_image(name):
        raise UserError(f"{archive}: {name!r} in it is refused: not an image ({' '.join(SUFFIXES)})")
    return PurePosixPath(name).name


# ------------------------------------------------------------------------------------------------------------- writing


@dataclass
class Unpacked:
    """What was in an archive of images."""

    names: list[str] = field(default_factory=list)
    hidden: int = 0
    """Number of hidden files, which were left out."""


def unpack_images(
    contents: Iterable[tuple[str, int, IO[bytes]]], archive: str, place: Callable[[str], Path], progress: Progress
) -> Unpacked:
    """Writes the images of an archive.

    An image that is there with the right size was written by an earlier run, and is left alone.

    Args:
        contents: name, bytes and content of each file.
        archive: for messages.
        place: where the image of this name belongs, in a folder that is there.
    """
    images: dict[str, None] = {}
    unpacked = Unpacked()
    for full_name, size, content in contents:
        if is_hidden(full_name):
            unpacked.hidden += 1
            continue
        name = image_name(full_name, archive)
        if name in images:
            raise UserError(f"{archive}: {name!r} is in it twice")
        images[name] = None
        write(content, size, place(name))
        progress.advance(size, images=1)
    unpacked.names = list(images)
    return unpacked


def write(content: IO[bytes], size: int, path: Path) -> None:
    """Writes a file of an archive, unless it is there with this size."""
    with writing_to(path):
        if path.exists() and path.stat().st_size == size:
            return
        file = path.open("wb")
    try:  # what goes wrong with the archive while it is read is not the fault of `path`
        while chunk := content.read(CHUNK):
            with writing_to(path):
                file.write(chunk)
    finally:
        with writing_to(path):
            file.close()
