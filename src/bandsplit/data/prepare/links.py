"""Links to images of an existing data set, or copies of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from bandsplit.paths import reading_from, writing_to

Link = Literal["hard", "symbolic", "copy"]

NAMES: dict[Link, str] = {"hard": "hard links", "symbolic": "symbolic links", "copy": "copies"}


def place(source: Path, target: Path, link: Link) -> Link:
    """Makes `target` the same image as `source`, which stays as it is; returns what it has become.

    A hard link becomes a symbolic one where the file system has none or forbids it, and from one disk to another.
    """
    source = source.resolve()
    with writing_to(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if link == "hard":
            try:
                os.link(source, target)
                return link
            except OSError:
                link = "symbolic"
        if link == "symbolic":
            target.symlink_to(source)
        else:
            shutil.copyfile(source, target)
        return link


def needed_bytes(sources: Iterable[Path], link: Link) -> int:
    """Bytes on the disk."""
    if link != "copy":
        return 0
    with reading_from(Path()):
        return sum(source.stat().st_size for source in sources)


def described(used: set[Link], asked: Link, source: Path) -> list[str]:
    """One line for the summary: what the images are; none where an earlier run has made them."""
    if not used:
        return []
    how = " and ".join(NAMES[link] for link in sorted(used))
    why = "" if used == {asked} else f"; {NAMES[asked]} are not possible from there to here"
    return [f"the images are {how} of {source}, which is unchanged{why}"]
