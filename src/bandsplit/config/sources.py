"""Which file or ``--set`` each key of a config came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Table = dict[str, Any]


class Sources:
    """Remembers which file or --set a key came from; what is added later overrides what was there."""

    def __init__(self, path: Path) -> None:
        self._sources: dict[tuple[str, ...], str] = {}
        self._path = str(path)

    def add(self, keys: tuple[str, ...], source: str) -> None:
        """A key, with all that is below it, came from `source`."""
        self._forget(keys)
        self._sources[keys] = source

    def add_file(self, table: Table, path: Path, above: tuple[str, ...] = ()) -> None:
        """All keys of `table` came from a file; one with a `type` takes the place of the whole table before it."""
        for key, value in table.items():
            keys = (*above, key)
            if not isinstance(value, dict):
                self.add(keys, str(path))
                continue
            if "type" in value:
                self._forget(keys)
            self.add_file(value, path, keys)

    def of(self, keys: tuple[str, ...]) -> str:
        """Where `keys` or something below it was set, or else its nearest neighbors, in a file if possible.

        Of several sources the one that was added last; the config itself where none is near.
        """
        for depth in range(len(keys), 0, -1):
            found = [source for known, source in self._sources.items() if known[:depth] == keys[:depth]]
            if depth < len(keys):
                found = [source for source in found if not source.startswith("--set ")] or found
            if found:
                return found[-1]
        return self._path

    def _forget(self, keys: tuple[str, ...]) -> None:
        self._sources = {known: source for known, source in self._sources.items() if known[: len(keys)] != keys}
