"""The summary of what has been prepared, with the command to continue with."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from bandsplit.commands import launch
from bandsplit.data.prepare.destination import Counts


def lines(root: Path, images: Counts, next_command: str, *more: str) -> str:
    """The summary.

    Args:
        root: the destination.
        images: what is in it; the part "" lies in the destination itself.
        next_command: a command in which {train}, {evaluate} and {classes} are filled in, and the destination: {root},
            or {name} in {parent}.
        more: lines to add.
    """
    parts = {part: classes for part, classes in images.items() if part not in ("hidden", "left out")}
    names = {name for classes in parts.values() for name in classes}
    counts = [
        f"{sum(classes.values()):,} images in {part}/" if part else f"{sum(classes.values()):,} images"
        for part, classes in parts.items()
    ]
    text = [f"{root}: {len(names):,} classes, {', '.join(counts)}"]
    if hidden := sum(images.get("hidden", {}).values()):
        text.append(f"{hidden:,} hidden files of the archives are left out")
    text += more
    commands = {name: launch(name) for name in ("train", "evaluate")}
    places = {"root": str(root), "parent": str(root.parent), "name": root.name}
    quoted = {key: shlex.quote(place) for key, place in places.items()}
    text.append(f"next: {next_command.format(classes=len(names), **commands, **quoted)}")
    return "\n".join(text).encode(errors="backslashreplace").decode()  # a path may have bytes that are no UTF-8


def some(names: Sequence[str]) -> str:
    """The first of many names."""
    return ", ".join(names[:5]) + ", …" * (len(names) > 5)
