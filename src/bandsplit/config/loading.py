"""Loads TOML files and ``--set key=value`` into a `RunConfig`; every mistake becomes one clear message.

Precedence: defaults < train file (and the data file it names) < ``--set key=value``.
Neither torch nor DALI is imported here.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import tomli
from pydantic import ValidationError

from bandsplit.commands import command
from bandsplit.config import shipped
from bandsplit.config.keys import entry_types, field_at, table_at, tables_at
from bandsplit.config.messages import explain
from bandsplit.config.schema import RunConfig
from bandsplit.config.sources import Sources, Table
from bandsplit.errors import UserError
from bandsplit.paths import reading_from

OF_THE_RUN = (
    "holdout", "image_size", "val_image_size", "resize_size", "interpolation", "mean", "std", "threads", "prefetch",
    "decoder",
)  # fmt: skip
"""Keys of [data] that say how an image is prepared, or what a run was trained on; not which images there are."""


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    data: str | Path | None = None,
    images: str | Path | None = None,
) -> RunConfig:
    """Reads a train config and its data config: the one it names, relative to itself, or the file `data`.

    For a config that comes with the package, its name is enough, such as `resnet34_sub16`, or `demo` for `data`.
    `images` is a data config whose images take the place of those of the run, but are prepared as these were: its keys
    of OF_THE_RUN are not used.
    `overrides` are ``a.b=value`` with a TOML value, a bare word for a string, or ``30,60,80`` for a list.
    Raises UserError with file, key, the value given, what is allowed and the nearest valid key.
    """
    path = shipped.file_of(path, "train")
    sources = Sources(path)
    table: Table = {}
    for file, layer in _layers(path):
        table = _merged(table, layer)
        sources.add_file(layer, file)
    table["name"] = table.get("name", path.stem)
    if data is not None:
        data = shipped.file_of(data, "data")
    elif isinstance(table.get("data"), str):
        data = Path(table["data"])
    if data is not None:
        table["data"] = {"name": data.stem, **_read(data)}
        sources.add(("data",), str(data))
    if images is not None:
        images = shipped.file_of(images, "data")
        own, other = table["data"], _read(images)
        kept = {key: own[key] for key in OF_THE_RUN if key in own}
        which = {key: value for key, value in other.items() if key not in OF_THE_RUN}
        counted = {"classes": own["classes"]} if "classes" in own else {}
        table["data"] = {"name": images.stem, **counted, **which, **kept}
        sources.add(("data",), str(images))
    _apply(overrides, table, sources)
    try:
        return RunConfig.model_validate(table)
    except ValidationError as error:
        raise UserError("\n".join(explain(item, sources, table) for item in error.errors())) from None


def _layers(path: Path, below: tuple[Path, ...] = ()) -> list[tuple[Path, Table]]:
    """A config and the configs that it `extends`, each with its own keys only, in merge order.

    `extends` is a config file, relative to the file that contains the key, or a list of them.  Later ones override
    earlier ones, and a config overrides all that it extends.  `below`: the configs that extend this one.
    """
    if path.resolve() in below:
        raise UserError(f"{path}: extends itself via {' and '.join(p.name for p in below)}")
    table = _read(path)
    if isinstance(table.get("data"), str):
        table["data"] = os.path.normpath(path.parent / table["data"])
    extends = table.pop("extends", [])
    names = [extends] if isinstance(extends, str) else extends
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: extends: {extends!r} given; expected the name of a config file, or a list of names")
    files = [Path(os.path.normpath(path.parent / name)) for name in names]
    extended = [layer for file in files for layer in _layers(file, (*below, path.resolve()))]
    return [*extended, (path, table)]


def _merged(base: Table, over: Table) -> Table:
    """Merges tables key by key; a table that sets `type` replaces the whole table."""
    merged = {**base, **over}
    for key in base.keys() & over.keys():
        a, b = base[key], over[key]
        if isinstance(a, dict) and isinstance(b, dict) and "type" not in b:
            merged[key] = _merged(a, b)
    return merged


def _read(path: Path) -> Table:
    try:
        with reading_from(path):
            if not path.is_file():
                raise UserError(f"{path}: no such config file{_instead_of(path)}")
            return tomli.loads(path.read_text(encoding="utf-8-sig"))  # with or without a byte order mark
    except tomli.TOMLDecodeError as error:
        lines = error.doc.splitlines()[error.lineno - 1 : error.lineno]
        raise UserError(f"{path}: not valid TOML: {error}{''.join(f': {line.strip()}' for line in lines)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from None


def _instead_of(path: Path) -> str:
    """A hint at the config that may have been meant: a file beside `path`, or one that comes with the package."""
    known = {file.name: file for file in path.parent.glob("*.toml")}
    if not path.suffix:
        known |= {file.stem: Path(file.stem) for kind in get_args(shipped.Kind) for file in shipped.files(kind)}
    near = difflib.get_close_matches(path.name, known, n=1)
    if near:
        return f"; did you mean {known[near[0]]}?"
    return "" if path.suffix else f"; `{command('config')} list` shows those that have a name"


def _apply(overrides: Sequence[str], table: Table, sources: Sources) -> None:
    """Writes ``--set a.b=value`` into `table`; ``a.type=value`` removes keys of [a] that only the old type has.

    Keys set by --set are never removed, so that a mistake in them is reported.
    """
    assigned: set[tuple[str, ...]] = set()
    for override in overrides:
        keys, value = _parse_override(override, table)
        above = keys[:-1]
        before = table_at(above, table) if keys[-1] == "type" and tables_at(above) else None
        _assign(table, keys, value, override)
        sources.add(keys, f"--set {override}")
        assigned.add(keys)
        if before is not None:
            for key in before.model_fields.keys() - table_at(above, table).model_fields.keys():
                if (*above, key) not in assigned:
                    _table(table, above).pop(key, None)


def _table(table: Table, keys: tuple[str, ...]) -> Table:
    for key in keys:
        table = table[key]
    return table


def _parse_override(override: str, table: Table) -> tuple[tuple[str, ...], object]:
    key, separator, text = override.partition("=")
    keys = tuple(key.strip().split("."))
    if not separator or not all(keys):
        raise UserError(f"--set {override}: expected key=value, for example --set optim.lr=0.02")
    return keys, _value(text.strip(), takes_list=bool(entry_types(field_at(keys, table))))


def _value(text: str, takes_list: bool = False) -> object:
    """Parses a TOML value or one of the short forms of --set."""
    if text.lower() in ("none", "null"):
        return "none"
    value = _toml(text)
    if value is None and takes_list and "," in text:
        value = _toml(f"[{text}]") or [_value(word.strip()) for word in text.split(",")]
    return text if value is None else value


def _toml(text: str) -> object:
    """Parses a TOML value; None if the text is not valid TOML."""
    try:
        return tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        return None


def _assign(table: Table, keys: tuple[str, ...], value: object, override: str) -> None:
    for depth, key in enumerate(keys[:-1], start=1):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {override}: {'.'.join(keys[:depth])} is a value, not a table")
    table[keys[-1]] = value
