"""Which file or ``--set`` each key of a config came from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

Table = dict[str, Any]


def _leaves(table: Table, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in table.items():
        yield from _leaves(value, (*above, key)) if isinstance(value, dict) else [(*above, key)]


class Sources:
    """Remembers which file or --set a key came from."""

    def __init__(self, path: Path) -> None:
        self._sources: dict[tuple[str, ...], str] = {(): str(path)}

    def add(self, keys: tuple[str, ...], source: str) -> None:
        self._sources[keys] = source

    def extends(self, table: Table, path: str, base: str) -> None:
        """What `table` says comes from `path`, everything else from `base`."""
        self._sources[()] = base
        for keys in _leaves(table):
            self._sources.setdefault(keys, path)

    def of(self, keys: tuple[str, ...]) -> str:
        """Where `keys` or something below it was set, or else its nearest neighbours, in a file if possible."""
        for depth in range(len(keys), 0, -1):
            found = [source for known, source in self._sources.items() if known[:depth] == keys[:depth]]
            if depth < len(keys):
                found = [source for source in found if not source.startswith("--set ")] or found
            if found:
                return found[0]
        return self._sources[()]
