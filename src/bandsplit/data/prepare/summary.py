"""What has been prepared, in a few lines, and the command to go on with."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from bandsplit.data.prepare.destination import Counts


def lines(root: Path, images: Counts, next_command: str, *more: str) -> str:
    """The summary.

    Args:
        root: the destination.
        images: what is in it; the part "" lies in the destination itself.
        next_command: a command in which {root} and {classes} are filled in.
        more: lines to add.
    """
    parts = {part: classes for part, classes in images.items() if part not in ("hidden", "left out")}
    classes = {name for part in parts.values() for name in part}
    told = ", ".join(f"{sum(part.values()):,} images" + f" in {name}/" * bool(name) for name, part in parts.items())
    hidden = sum(images.get("hidden", {}).values())
    told_hidden = [f"{hidden:,} hidden files of the archives are left out"] * bool(hidden)
    command = next_command.format(root=shlex.quote(str(root)), classes=len(classes))
    text = "\n".join([f"{root}: {len(classes):,} classes, {told}", *told_hidden, *more, f"next: {command}"])
    return text.encode(errors="backslashreplace").decode()  # a path may have bytes that are no UTF-8


def some(names: Sequence[str]) -> str:
    """The first of many names."""
    return ", ".join(names[:5]) + ", …" * (len(names) > 5)
