"""One line for each of pydantic's errors: file, key, what was given, what is allowed, the nearest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from bandsplit.config.schema import Branch, RunConfig
from bandsplit.config.sources import Sources, Table

RENAMED = {
    "data.random_area": "data.scale",
    "data.random_aspect": "data.ratio",
    "data.mirror": "data.hflip",
    "augment.erasing.area": "augment.erasing.scale",
    "augment.erasing.aspect": "augment.erasing.ratio",
    "model.norm_batch": "model.bn_batch_size",
    "train.accumulation": "train.grad_accum_steps",
}
"""Former names of keys."""


def explain(error: Mapping[str, Any], sources: Sources, table: Table) -> str:
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
        source = sources.of((*loc, "type"))
        return f"{source}: {key}.type: {given.get('type')!r} given; allowed: {', '.join(map(repr, types))}{hint}"
    if kind == "extra_forbidden":
        return f"{source}: {key}: unknown key; {_instead_of(loc, table)}"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{source}: {key}: {given!r} given; {message.replace('input should', 'it should')}"


def _instead_of(loc: tuple[str, ...], table: Table) -> str:
    """What to write in place of an unknown key: its new name, the nearest key, or all that its table knows."""
    key = ".".join(loc)
    if key in RENAMED:
        return f"renamed to {RENAMED[key]}"
    known = list(_table_at(loc[:-1], table).model_fields)
    near = difflib.get_close_matches(loc[-1], known, n=1)
    if near:
        return f"did you mean {'.'.join((*loc[:-1], near[0]))}?"
    elsewhere = [other for other in _all_keys() if other.endswith("." + loc[-1]) and other != key]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    where = f"[{'.'.join(loc[:-1])}]" if loc[:-1] else "the top level"
    return f"allowed in {where}: {', '.join(known)}"


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
