"""Base class and helpers of all tables of the schema."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeGuard, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

Fraction = Annotated[float, Field(ge=0, le=1)]

Channels3 = Annotated[tuple[float, float, float], Field(strict=False)]

Range = Annotated[tuple[float, float], Field(strict=False)]


def mistake(key: str, given: object, allowed: str) -> PydanticCustomError:
    """Error of a check, often across several keys; `key` is the one to report."""
    return PydanticCustomError("cross_check", "{allowed}", {"key": key, "given": given, "allowed": allowed})


def takes_none(field: FieldInfo) -> bool:
    """Whether a key may be unset.  TOML has no null; "none" stands for it."""
    return type(None) in get_args(field.annotation)


class Table(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _read_none(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        unset = {key for key, field in cls.model_fields.items() if takes_none(field) and given.get(key) == "none"}
        return {key: None if key in unset else value for key, value in given.items()}

    @model_serializer(mode="wrap")
    def _write_none(self, serialize: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        """Writes "none" for an unset key whose default is a value; left out, it would get that default back."""
        table: dict[str, Any] = serialize(self)
        if info.mode == "json":
            for key, field in type(self).model_fields.items():
                if getattr(self, key) is None and field.default is not None:
                    table[key] = "none"
        return table


def count_or(key: str, *words: str) -> BeforeValidator:
    """Accepts a positive integer or one of `words`, with one message for everything else."""

    def check(value: object) -> object:
        if value in words or (type(value) is int and value >= 1):
            return value
        raise mistake(key, value, f"{', '.join(map(repr, words))} or an integer >= 1")

    return BeforeValidator(check, json_schema_input_type=Literal[words] | Annotated[int, Field(ge=1)])


def is_list(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(value, list | tuple)


def default_type(name: str) -> BeforeValidator:
    """Sets `type` to `name` in a table that gives none."""
    return BeforeValidator(lambda table: {"type": name, **table} if isinstance(table, dict) else table)
