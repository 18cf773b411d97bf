"""From TOML files and ``--set key=value`` to a `RunConfig`; every mistake becomes one clear message.

Precedence: defaults < train file (and the data file it names) < ``--set key=value``.
Neither torch nor DALI is imported here.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli
from pydantic import BaseModel, ValidationError

from bandsplit.errors import UserError
from bandsplit.schema import Branch, RunConfig

Table = dict[str, Any]


def load(path: str | Path, overrides: Sequence[str] = (), data: str | Path | None = None) -> RunConfig:
    """Reads a train config and the data config it names (relative to itself), or the file `data` instead.

    `overrides` are ``a.b=value`` with a TOML value (a bare word counts as a string).
    Raises UserError: file, key, what was given, what is allowed, the nearest valid key.
    """
    path = Path(path)
    sources = _Sources(path)
    table = _read_extended(path, sources)
    table["name"] = table.get("name", path.stem)
    if data is None and isinstance(table.get("data"), str):
        data = table["data"]
    if data is not None:
        table["data"] = {"name": Path(data).stem, **_read(Path(data))}
        sources.add(("data",), str(data))
    for override in overrides:
        keys, value = _parse_override(override)
        _assign(table, keys, value, override)
        sources.add(keys, f"--set {override}")
    try:
        return RunConfig.model_validate(table)
    except ValidationError as error:
        raise UserError("\n".join(_explain(item, sources, table) for item in error.errors())) from None


def _read_extended(path: Path, sources: _Sources, below: tuple[Path, ...] = ()) -> Table:
    """A train config over the one that it names with `extends` (relative to itself), and so on.

    Tables are merged key by key; one that names another `type` takes the place of the whole table.
    """
    if path.resolve() in below:
        raise UserError(f"{path}: extends itself, by way of {' and '.join(p.name for p in below)}")
    table = _read(path)
    if isinstance(table.get("data"), str):
        table["data"] = os.path.normpath(path.parent / table["data"])
    base = table.pop("extends", None)
    if base is None:
        return table
    if not isinstance(base, str):
        raise UserError(f"{path}: extends: {base!r} given; expected the name of a config file")
    extended = Path(os.path.normpath(path.parent / base))
    sources.extends(table, str(path), str(extended))
    return _merged(_read_extended(extended, sources, (*below, path.resolve())), table)


def _merged(base: Table, over: Table) -> Table:
    merged = {**base, **over}
    for key in base.keys() & over.keys():
        a, b = base[key], over[key]
        if isinstance(a, dict) and isinstance(b, dict) and b.get("type", a.get("type")) == a.get("type"):
            merged[key] = _merged(a, b)
    return merged


def _read(path: Path) -> Table:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"{path}: no such config file{hint}")
    try:
        return tomli.loads(path.read_text(encoding="utf-8"))
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def _parse_override(override: str) -> tuple[tuple[str, ...], object]:
    key, separator, text = override.partition("=")
    keys = tuple(key.strip().split("."))
    if not separator or not all(keys):
        raise UserError(f"--set {override}: expected key=value, for example --set optim.lr=0.02")
    try:
        return keys, tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        return keys, text.strip()


def _assign(table: Table, keys: tuple[str, ...], value: object, override: str) -> None:
    for depth, key in enumerate(keys[:-1], start=1):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {override}: {'.'.join(keys[:depth])} is a value, not a table")
    table[keys[-1]] = value


def _leaves(table: Table, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in table.items():
        yield from _leaves(value, (*above, key)) if isinstance(value, dict) else [(*above, key)]


class _Sources:
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


def _explain(error: Mapping[str, Any], sources: _Sources, table: Table) -> str:
    """One line for one of pydantic's errors."""
    kind, given = error["type"], error["input"]
    error = {**error, "loc": _without_tags(error["loc"])}
    loc = tuple(str(part) for part in error["loc"])
    if kind == "cross_check":
        context = error["ctx"]
        loc, given, allowed = tuple(context["key"].split(".")), context["given"], context["allowed"]
        return f"{sources.of(loc)}: {'.'.join(loc)}: {given!r} given; allowed: {allowed}"
    if loc[:1] == ("branch",):
        return f"{sources.of(loc)}: {'.'.join(loc)}: {_wrong_branch(error)}"
    places = [depth for depth, part in enumerate(error["loc"]) if isinstance(part, int)]
    if places or kind in ("too_long", "tuple_type"):
        # a list of numbers: too short, too long or with something else in it
        loc = loc[: places[0]] if places else loc
        expected = f"expected {_length(loc, table)} numbers"
        return f"{sources.of(loc)}: {'.'.join(loc)}: {_value_at(table, loc)!r} given; {expected}"
    key, source = ".".join(loc), sources.of(loc)
    if kind == "missing":
        return f"{source}: {key}: missing; expected: {_field_type(loc, table)}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{source}: {key}: {given!r} given; expected a table [{key}]"
    if kind == "union_tag_invalid":
        types = [table.model_fields["type"].default for table in _tables_at(loc)]
        near = difflib.get_close_matches(str(given.get("type")), types, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        key = f"{key}.type"
        return f"{source}: {key}: {given.get('type')!r} given; allowed: {', '.join(map(repr, types))}{hint}"
    if kind == "extra_forbidden":
        known = list(_table_at(loc[:-1], table).model_fields)
        near = difflib.get_close_matches(loc[-1], known, n=1) or [
            k for k in _all_keys() if k.endswith("." + loc[-1]) and k != key
        ]
        hint = f"did you mean {'.'.join((*loc[:-1], near[0])) if near[0] in known else near[0]}?" if near else ""
        where = f"[{'.'.join(loc[:-1])}]" if loc[:-1] else "the top level"
        return f"{source}: {key}: unknown key; {hint or f'allowed in {where}: ' + ', '.join(known)}"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{source}: {key}: {given!r} given; {message.replace('input should', 'it should')}"


def _wrong_branch(error: Mapping[str, Any]) -> str:
    """What is wrong in a list of tables [[branch]], or with the list."""
    loc, kind, known = error["loc"], error["type"], list(Branch.model_fields)
    if kind == "missing":
        return "missing; expected: band numbers, such as [0, 1]"
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(loc[-1], known, n=1)
        return f"unknown key; {f'did you mean {near[0]}?' if near else 'allowed in [[branch]]: ' + ', '.join(known)}"
    if len(loc) < 3:
        return f"{error['input']!r} given; expected tables [[branch]]"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{error['input']!r} given; {message.replace('input should', 'it should')}"


def _value_at(table: Table, loc: tuple[str, ...]) -> object:
    for key in loc[:-1]:
        table = table[key]
    return table[loc[-1]]


def _length(loc: tuple[str, ...], table: Table) -> int:
    """Number of entries of a key that takes a list of numbers."""
    return len(_arguments(_table_at(loc[:-1], table).model_fields[loc[-1]].annotation))


def _arguments(annotation: Any) -> tuple[Any, ...]:
    """What a generic type holds; of a union with None, what the rest of it holds."""
    arguments = getattr(annotation, "__args__", ())
    inner = [option for option in arguments if getattr(option, "__args__", ())]
    return _arguments(inner[0]) if inner and type(None) in arguments else arguments


def _without_tags(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The path of a key without the names of types that pydantic puts into it."""
    plain: list[str | int] = []
    tables: list[type[BaseModel]] = [RunConfig]
    for part in loc:
        if len(tables) > 1 and part in [table.model_fields["type"].default for table in tables]:
            tables = [table for table in tables if table.model_fields["type"].default == part]
            continue
        plain.append(part)
        tables = _tables_of(tables[0], part) if tables else []
    return tuple(plain)


def _tables_of(table: type[BaseModel], key: str | int) -> list[type[BaseModel]]:
    """The tables that a key of a table may hold: one, or one for each of its types."""
    field = table.model_fields.get(str(key))
    if field is None:
        return []
    options = [field.annotation, *getattr(field.annotation, "__args__", ())]
    options += [inner for option in options for inner in getattr(option, "__args__", ())]
    return [option for option in dict.fromkeys(options) if isinstance(option, type) and issubclass(option, BaseModel)]


def _tables_at(loc: tuple[str, ...]) -> list[type[BaseModel]]:
    tables: list[type[BaseModel]] = [RunConfig]
    for key in loc:
        tables = _tables_of(tables[0], key) if tables else []
    return tables


def _table_at(loc: tuple[str, ...], given: Table) -> type[BaseModel]:
    """The table at a path; of several types the one that was given."""
    value: Any = given
    for key in loc:
        value = value.get(key) if isinstance(value, dict) else None
    tables = _tables_at(loc)
    chosen = value.get("type") if isinstance(value, dict) else None
    return next(
        (table for table in tables if chosen == getattr(table.model_fields.get("type"), "default", None)), tables[0]
    )


def _field_type(loc: tuple[str, ...], table: Table) -> str:
    annotation = _table_at(loc[:-1], table).model_fields[loc[-1]].annotation
    if isinstance(annotation, type):
        return f"a table [{'.'.join(loc)}]" if issubclass(annotation, BaseModel) else annotation.__name__
    if _tables_at(loc):
        return f"a table [{'.'.join(loc)}]"
    options = getattr(annotation, "__args__", ())
    return " or ".join(repr(option) for option in options if not isinstance(option, type)) or str(annotation)


def _all_keys(table: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a train config; of tables of several types those of the first."""
    for name in table.model_fields:
        below = _tables_of(table, name)
        if below:
            yield from _all_keys(below[0], f"{prefix}{name}.")
        else:
            yield prefix + name
