"""What all tables of the schema share."""

from __future__ import annotations

from typing import Annotated, Any, TypeGuard

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
)
from pydantic_core import PydanticCustomError

Fraction = Annotated[float, Field(ge=0, le=1)]

Channels3 = Annotated[tuple[float, float, float], Field(strict=False)]

Range = Annotated[tuple[float, float], Field(strict=False)]


def mistake(key: str, given: object, allowed: str) -> PydanticCustomError:
    """A mistake that concerns several keys; `key` is the one to change first."""
    return PydanticCustomError("cross_check", "{allowed}", {"key": key, "given": given, "allowed": allowed})


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


def count_or(key: str, *words: str) -> BeforeValidator:
    """Accepts a positive whole number or one of some words, with one message for everything else."""

    def check(value: object) -> object:
        if value in words or (type(value) is int and value >= 1):
            return value
        raise mistake(key, value, f"{', '.join(map(repr, words))} or a number from 1")

    return BeforeValidator(check)


def is_list(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(value, list | tuple)


def default_type(name: str) -> BeforeValidator:
    """A table without `type` is of this one."""
    return BeforeValidator(lambda table: {"type": name, **table} if isinstance(table, dict) else table)
