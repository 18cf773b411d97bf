"""Which file or ``--set`` each key of a config came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Table = dict[str, Any]


class Sources:
    """Records which file or --set a key came from; later additions override earlier ones."""

    def __init__(self, path: Path) -> None:
        self._sources: dict[tuple[str, ...], str] = {}
        self._path = str(path)

    def add(self, keys: tuple[str, ...], source: str) -> None:
        """Records `source` for a key and all keys below it."""
        self._forget(keys)
        self._sources[keys] = source

    def add_file(self, table: Table, path: Path, above: tuple[str, ...] = ()) -> None:
        """Records `path` for all keys of `table`; a table with a `type` replaces all that was recorded for it."""
        for key, value in table.items():
            keys = (*above, key)
            if not isinstance(value, dict):
                self.add(keys, str(path))
                continue
            if "type" in value:
                self._forget(keys)
            self.add_file(value, path, keys)

    def of(self, keys: tuple[str, ...]) -> str:
        """The source of a key or of keys below it; otherwise that of its nearest neighbors, a file if possible.

        Of several sources, the one added last; if there is none, the config file itself.
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
