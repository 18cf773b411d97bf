"""Values that all keys of a kind accept or reject: "none" for optional keys, and no infinity or NaN anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import tomli
import tomli_w
from pydantic import BaseModel, ValidationError

from bandsplit.config import loading, schema
from bandsplit.config.keys import entry_types, tables_of
from bandsplit.config.schema.base import Table, takes_none
from bandsplit.runs.directory import resolved

TABLES = sorted(
    {table for name, table in vars(schema).items() if isinstance(table, type) and issubclass(table, Table)},
    key=lambda table: table.__name__,
)
REQUIRED: dict[str, dict[str, Any]] = {
    "Branch": {"bands": [0]},
    "Data": {"name": "d", "root": "r", "classes": 2},
    "Distillation": {"teacher": "t"},
    "Model": {"arch": "resnet18"},
    "Progressive": {"min_size": 8, "ramp_end": 2},
    "RunConfig": {
        "name": "n",
        "data": {"name": "d", "root": "r", "classes": 2},
        "model": {"arch": "resnet18"},
        "optim": {"lr": 0.1},
        "train": {"epochs": 1, "batch_size": 1},
    },
    "Step": {"milestones": [1.0]},
    "Train": {"epochs": 1, "batch_size": 1},
} | {name: {"lr": 0.1} for name in ("SGD", "Adam", "AdamW", "RMSprop", "Lamb")}
"""Required keys of each table, with valid values."""

OPTIONAL = [(table, key) for table in TABLES for key, field in table.model_fields.items() if takes_none(field)]


@pytest.mark.parametrize(("table", "key"), OPTIONAL, ids=lambda part: getattr(part, "__name__", part))
def test_none_is_accepted_wherever_a_key_may_be_unset(table: type[Table], key: str) -> None:
    """Also after a round trip through TOML: a key must not get its default back."""
    given = {**REQUIRED.get(table.__name__, {}), key: "none"}
    read = table.model_validate(given)
    assert getattr(read, key) is None
    written = tomli_w.dumps(read.model_dump(mode="json", exclude_none=True))
    assert table.model_validate(tomli.loads(written)) == read


def test_none_is_a_word_elsewhere() -> None:
    assert schema.Split(norm="none").norm == "none"
    for table in TABLES:
        for key, field in table.model_fields.items():
            if not takes_none(field) and (table, key) != (schema.Split, "norm") and field.annotation is not str:
                with pytest.raises(ValidationError):
                    table.model_validate({**REQUIRED.get(table.__name__, {}), key: "none"})


def unset_keys() -> Iterator[tuple[str, list[str]]]:
    """Dotted optional keys of RunConfig, each with the overrides that it needs."""

    def below(table: type[BaseModel], prefix: str, needs: list[str]) -> Iterator[tuple[str, list[str]]]:
        for key, field in table.model_fields.items():
            if takes_none(field):
                yield prefix + key, needs
            options = tables_of(table, key)
            if takes_none(field) or key == "branch":
                continue  # tables that are unset by default and have no optional keys
            for option in options:
                chosen = [f"{prefix}{key}.type={option.model_fields['type'].default}"] if len(options) > 1 else []
                yield from below(option, f"{prefix}{key}.", [*needs, *chosen])

    for key, needs in below(schema.RunConfig, "", []):
        yield key, [*needs, "schedule.milestones=1,2"] if key == "schedule.every_epochs" else needs


UNSET = dict(unset_keys())


@pytest.mark.parametrize("word", ["none", '"none"', "null", "None"])
@pytest.mark.parametrize("key", UNSET)
def test_a_run_keeps_what_was_switched_off(config_file: Path, tmp_path: Path, key: str, word: str) -> None:
    """From --set to config.toml and back, including the form that resuming compares."""
    config = loading.load(config_file, [*UNSET[key], f"{key}={word}"])
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    assert value is None
    written = tmp_path / "config.toml"
    written.write_text(tomli_w.dumps(resolved(config)))
    assert loading.load(written) == config
    assert resolved(loading.load(written)) == resolved(config)


def test_the_keys_that_are_set_by_default_can_be_switched_off() -> None:
    """The keys that the test above is mainly for: without "none", reading config.toml would set them again."""
    defaults = {(table.__name__, key): table.model_fields[key].default for table, key in OPTIONAL}
    assert {place for place, default in defaults.items() if default is not None} == {
        ("Checkpoint", "every_minutes"),
        ("OneCycle", "momentum"),
    }


def test_none_removes_a_table_of_the_extended_file(config_file: Path, tmp_path: Path) -> None:
    child, grandchild = tmp_path / "child.toml", tmp_path / "grandchild.toml"
    config_file.write_text(config_file.read_text() + "[augment.erasing]\nprobability = 0.25\n")
    child.write_text(f'extends = "{config_file}"\n[augment]\nerasing = "none"\n')
    grandchild.write_text('extends = "child.toml"\n[augment.erasing]\nprobability = 0.5\n')
    assert loading.load(child).augment.erasing is None
    assert loading.load(grandchild).augment.erasing == schema.Erasing(probability=0.5)


# Numbers -------------------------------------------------------------------------------------------------------------


def holds_float(annotation: Any) -> bool:
    return annotation is float or any(map(holds_float, get_args(annotation)))


FLOATS = [
    (table, key) for table in TABLES for key, field in table.model_fields.items() if holds_float(field.annotation)
]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(("table", "key"), FLOATS, ids=lambda part: getattr(part, "__name__", part))
def test_no_key_takes_infinity_or_nan(table: type[Table], key: str, bad: float) -> None:
    types = entry_types(table.model_fields[key])
    count = 1 if Ellipsis in types else len(types)
    lists = [[bad if i == k else 0.5 for i in range(count)] for k in range(count)]  # bad in one place
    for value in lists or [bad]:
        with pytest.raises(ValidationError) as raised:
            table.model_validate({**REQUIRED.get(table.__name__, {}), key: value})
        kind = "cross_check" if (table, key) == (schema.Data, "holdout") else "finite_number"  # its own message
        assert all(error["loc"][0] == key and error["type"] == kind for error in raised.value.errors())


def test_every_float_of_the_schema_is_tried() -> None:
    assert len(FLOATS) > 40
    assert {key for _, key in FLOATS} > {"lr", "betas", "milestones", "momentum", "scale", "mean", "mixup", "ema_decay"}
