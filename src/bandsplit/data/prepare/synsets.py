"""Archives of archives: a tar file that holds one tar file of images a class, named by its WordNet id."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath
from typing import IO

from bandsplit.data.prepare.archives import (
    Unpacked,
    files,
    index,
    is_gzip,
    is_hidden,
    member_of,
    opened,
    reporting_damage,
    unpack_images,
)
from bandsplit.data.prepare.destination import Destination
from bandsplit.data.prepare.progress import Progress, Stopped
from bandsplit.data.prepare.summary import some
from bandsplit.errors import UserError
from bandsplit.paths import reading_from, writing_to

Finish = Callable[[str, Path, Unpacked, int], None]
"""Commits a class: its name, the folder with its images, what is in it, and the bytes of its archive."""


class Synsets:
    """An archive of the archives of classes.

    The inner archives are read where they lie, without a copy.  Of a file that is not compressed several are read at a
    time, by threads: reading and writing release the GIL.  A compressed one can only be read from front to back.
    """

    def __init__(self, path: Path, known: Collection[str] | None = None) -> None:
        """Reads the index of the archive, unless it is compressed.

        Args:
            known: names of the classes that have to be there, all of them and no others; None: whatever there is.
        """
        self.path = path
        self._known = known
        self._members = None if is_gzip(path) else [member for member in index(path) if not is_hidden(member.name)]
        if self._members is not None:
            self._require_classes([self._class_of(member) for member in self._members])

    def unpack(self, target: Destination, finish: Finish, threads: int) -> None:
        """Unpacks every class that `target` has not finished; the unit of a class is its name."""
        what = f"unpacking {self.path.name}"
        with reading_from(self.path):
            if self._members is None:
                with Progress(what, self.path.stat().st_size) as progress:
                    self._in_order(target, finish, progress)
                return
            todo = [member for member in self._members if not target.is_finished(self._class_of(member))]
            total = sum(member.size for member in self._members)
            with Progress(what, total, total - sum(member.size for member in todo)) as progress:
                self._in_threads(todo, target, finish, threads, progress)

    def _in_threads(
        self, todo: list[tarfile.TarInfo], target: Destination, finish: Finish, threads: int, progress: Progress
    ) -> None:
        def one(member: tarfile.TarInfo) -> None:
            with member_of(self.path, member) as inner:
                self._unpack(member, inner, target, finish, progress)

        with ThreadPoolExecutor(threads) as pool:
            try:
                for done in as_completed([pool.submit(one, member) for member in todo]):
                    if not isinstance(done.exception(), Stopped):
                        done.result()
            except BaseException:
                progress.stop()
                pool.shutdown(cancel_futures=True)
                raise

    def _in_order(self, target: Destination, finish: Finish, progress: Progress) -> None:
        names: list[str] = []
        with reporting_damage(self.path), opened(self.path) as (source, position):
            progress.position = position
            for member, inner in files(source, self.path):
                if is_hidden(member.name):
                    continue
                names.append(self._class_of(member))
                if not target.is_finished(names[-1]):
                    self._unpack(member, inner, target, finish, progress)
                progress.advance(0)
        self._require_classes(names)

    def _unpack(
        self, member: tarfile.TarInfo, inner: IO[bytes], target: Destination, finish: Finish, progress: Progress
    ) -> None:
        name = self._class_of(member)
        folder = target.work(f"classes/{name}")
        with reporting_damage(self.path, member.name):
            contents = ((image.name, image.size, content) for image, content in files(inner, self.path, member.name))
            unpacked = unpack_images(contents, f"{self.path}: {member.name}", folder.joinpath, progress)
        names = set(unpacked.names)
        with writing_to(folder):
            for path in folder.iterdir():
                if path.name not in names:  # left over from an archive that has been replaced since
                    path.unlink()
        finish(name, folder, unpacked, member.size)

    def _require_classes(self, names: list[str]) -> None:
        if not names:
            raise UserError(f"{self.path}: no archives of classes in it")
        there = set(names)
        if len(there) < len(names):
            raise UserError(f"{self.path}: {next(n for n in names if names.count(n) > 1)}.tar is in it twice")
        if self._known is None or there == set(self._known):
            return
        lacking, unknown = sorted(set(self._known) - there), sorted(there - set(self._known))
        odd = [f"{how} {some(names)}" for how, names in (("without", lacking), ("with the unknown", unknown)) if names]
        raise UserError(
            f"{self.path}: {len(names)} classes, {' and '.join(odd)}; the devkit lists {len(self._known)} classes"
        )

    def _class_of(self, member: tarfile.TarInfo) -> str:
        name = PurePosixPath(member.name).name
        if not re.fullmatch(r"n\d{8}\.tar", name):
            raise UserError(
                f"{self.path}: {member.name!r} in it is not the archive of a class (n01440764.tar, …); is this the "
                "right file?"
            )
        return name.removesuffix(".tar")
