"""Looks up keys of the schema: the table a key is in, its field, its types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bandsplit.config.schema import RunConfig
from bandsplit.config.sources import Table


def tables_of(table: type[BaseModel], key: str | int) -> list[type[BaseModel]]:
    """Tables that `key` of `table` may hold: one, or one per `type` of a union; none for a plain value."""
    field = table.model_fields.get(str(key))
    if field is None:
        return []
    options = [field.annotation, *getattr(field.annotation, "__args__", ())]
    options += [inner for option in options for inner in getattr(option, "__args__", ())]
    return [option for option in dict.fromkeys(options) if isinstance(option, type) and issubclass(option, BaseModel)]


def tables_at(loc: tuple[str, ...]) -> list[type[BaseModel]]:
    tables: list[type[BaseModel]] = [RunConfig]
    for key in loc:
        tables = tables_of(tables[0], key) if tables else []
    return tables


def table_at(loc: tuple[str, ...], given: Table) -> type[BaseModel]:
    """The table at a path; for a union, the one whose `type` is given, else the first."""
    value: Any = given
    for key in loc:
        value = value.get(key) if isinstance(value, dict) else None
    tables = tables_at(loc)
    chosen = value.get("type") if isinstance(value, dict) else None
    return next(
        (table for table in tables if chosen == getattr(table.model_fields.get("type"), "default", None)), tables[0]
    )


def field_at(loc: tuple[str, ...], given: Table) -> FieldInfo | None:
    """The field of a key; None if there is no such key."""
    return table_at(loc[:-1], given).model_fields.get(loc[-1]) if tables_at(loc[:-1]) else None


def entry_types(field: FieldInfo | None) -> tuple[Any, ...]:
    """Entry types of a key that takes a list, (T, ...) for any length; () for a key that takes no list."""
    options = (field.annotation, *get_args(field.annotation)) if field else ()
    return next((get_args(option) for option in options if get_origin(option) is tuple), ())


def all_keys(table: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a train config; for a union of tables, those of its first type."""
    for name in table.model_fields:
        below = tables_of(table, name)
        if below:
            yield from all_keys(below[0], f"{prefix}{name}.")
        else:
            yield prefix + name
