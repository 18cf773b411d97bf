"""One line for each of pydantic's errors: file, key, what was given, what is allowed, the nearest valid key."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bandsplit.config.keys import all_keys, entry_types, field_at, table_at, tables_at, tables_of
from bandsplit.config.schema import Branch, RunConfig
from bandsplit.config.schema.base import takes_none
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

REMOVED = {"data.decoder.read_ahead": "files are read with the batches that data.prefetch counts"}
"""Former keys, and why they are gone."""


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
        loc = loc[: places[0]] if places else loc
        return f"{sources.of(loc)}: {'.'.join(loc)}: {_value_at(table, loc)!r} given; {_wrong_list(loc, error, table)}"
    key, source = ".".join(loc), sources.of(loc)
    if kind == "missing":
        return f"{source}: {key}: missing; expected: {_field_type(loc, table)}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{source}: {key}: {given!r} given; expected a table [{key}]"
    if kind == "union_tag_invalid":
        types = [table.model_fields["type"].default for table in tables_at(loc)]
        near = difflib.get_close_matches(str(given.get("type")), types, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        source = sources.of((*loc, "type"))
        return f"{source}: {key}.type: {given.get('type')!r} given; allowed: {', '.join(map(repr, types))}{hint}"
    if kind == "extra_forbidden":
        return f"{source}: {key}: unknown key; {_instead_of(loc, table)}"
    return f"{source}: {key}: {_wrong_value(error, field_at(loc, table))}"


def _instead_of(loc: tuple[str, ...], table: Table) -> str:
    """What to suggest for an unknown key: its new name, the nearest key, or all keys of its table."""
    key = ".".join(loc)
    if key in RENAMED:
        return f"renamed to {RENAMED[key]}"
    if key in REMOVED:
        return f"removed: {REMOVED[key]}"
    known = list(table_at(loc[:-1], table).model_fields)
    near = difflib.get_close_matches(loc[-1], known, n=1)
    if near:
        return f"did you mean {'.'.join((*loc[:-1], near[0]))}?"
    elsewhere = [other for other in all_keys() if other.endswith("." + loc[-1]) and other != key]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    where = f"[{'.'.join(loc[:-1])}]" if loc[:-1] else "the top level"
    return f"allowed in {where}: {', '.join(known)}"


def _wrong_branch(error: Mapping[str, Any]) -> str:
    """What is wrong with the list of [[branch]] tables, or in one of them."""
    loc, kind, known = error["loc"], error["type"], list(Branch.model_fields)
    if kind == "missing":
        return "missing; expected: band numbers, such as [0, 1]"
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(loc[-1], known, n=1)
        return f"unknown key; {f'did you mean {near[0]}?' if near else 'allowed in [[branch]]: ' + ', '.join(known)}"
    if len(loc) < 3:
        return f"{error['input']!r} given; expected tables [[branch]]"
    return _wrong_value(error, Branch.model_fields[loc[2]])


def _value_at(table: Table, loc: tuple[str, ...]) -> object:
    for key in loc[:-1]:
        table = table[key]
    return table[loc[-1]]


def _wrong_list(loc: tuple[str, ...], error: Mapping[str, Any], table: Table) -> str:
    """What is wrong with a list: its length, an entry that is no number, one out of bounds, or none of the words."""
    field = field_at(loc, table)
    assert field is not None
    if type(error["input"]) in (int, float) and error["type"] not in ("missing", "too_long", "tuple_type"):
        return f"{error['input']!r} {error['msg'].removeprefix('Input ')}"
    types = entry_types(field)
    if types and get_origin(types[0]) is Literal:
        words = get_args(types[0])
        return f"expected a list with any of {', '.join(map(repr, words))}, such as {list(words[:1])}"
    count = "a list of" if Ellipsis in types else str(len(types))
    return f"expected {count} numbers, such as {list(field.default or (30, 60, 80))}{_or_none(field)}"


def _wrong_value(error: Mapping[str, Any], field: FieldInfo | None) -> str:
    """What is wrong with a single value, and how to write the intended one."""
    kind, given = error["type"], error["input"]
    if kind in ("bool_type", "bool_parsing"):
        expected = "expected true or false" + _or_none(field)
        if str(given).lower() in ("true", "false"):
            expected += ", in lower case and without quotes"
    else:
        expected = (error["msg"][0].lower() + error["msg"][1:]).replace("input should", "it should") + _or_none(field)
        if kind in ("float_type", "int_type") and (number := _number(given)) is not None:
            expected += f"; write {number}"
    return f"{given!r} given; {expected}"


def _or_none(field: FieldInfo | None) -> str:
    return ' or "none"' if field and takes_none(field) else ""


def _number(given: object) -> str | None:
    """The TOML spelling of a number that was given as a string, such as .1 or "64"; None if it is not a number."""
    try:
        number = float(given) if isinstance(given, str) else math.nan
    except ValueError:
        return None
    return repr(number).removesuffix(".0") if math.isfinite(number) else None


def _without_tags(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The path of a key without the union tags that pydantic inserts."""
    plain: list[str | int] = []
    tables: list[type[BaseModel]] = [RunConfig]
    for part in loc:
        if len(tables) > 1 and part in [table.model_fields["type"].default for table in tables]:
            tables = [table for table in tables if table.model_fields["type"].default == part]
            continue
        plain.append(part)
        tables = tables_of(tables[0], part) if tables else []
    return tuple(plain)


def _field_type(loc: tuple[str, ...], table: Table) -> str:
    annotation = table_at(loc[:-1], table).model_fields[loc[-1]].annotation
    if isinstance(annotation, type):
        return f"a table [{'.'.join(loc)}]" if issubclass(annotation, BaseModel) else annotation.__name__
    if tables_at(loc):
        return f"a table [{'.'.join(loc)}]"
    options = getattr(annotation, "__args__", ())
    return " or ".join(repr(option) for option in options if not isinstance(option, type)) or str(annotation)
