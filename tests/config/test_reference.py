"""What is written from the schema: doc/keys.md and the JSON schemas of editors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w
from pydantic import BaseModel

from bandsplit.config import loading, reference, schema
from bandsplit.config.json_schema import FILES, json_schema
from bandsplit.config.keys import tables_of
from bandsplit.errors import UserError
from bandsplit.runs.directory import resolved
from tests.conftest import REPOSITORY

TAPLO = Path(sys.executable).parent / "taplo"


def fields(table: type[BaseModel], path: str = "") -> Iterator[tuple[str, str, str | None, str]]:
    """Table, key, default as JSON and docstring of every plain key of the schema; a `type` is not a plain key."""
    for name, field in table.model_fields.items():
        below = tables_of(table, name)
        for each in below:
            yield from fields(each, f"{path}.{name}".lstrip("."))
        if not below and name != "type":
            default = field.get_default(call_default_factory=True)
            text = None if field.is_required() else json.dumps("none" if default is None else default)
            yield path, name, text, " ".join((field.description or "").split())


def test_every_key_is_told_with_its_default_and_docstring() -> None:
    told = {(table.path, key.name): (key.default, key.about) for table in reference.tables() for key in table.keys}
    assert told.pop(("", "extends")) == ("[]", told and json_schema("train")["properties"]["extends"]["description"])
    expected = {
        (path, name): (("the file's name" if name == "name" else "required") if default is None else default, about)
        for path, name, default, about in fields(schema.RunConfig)
    }
    assert {key: value for key, value in told.items() if key in expected} == told
    same = {key for key, value in expected.items() if told[key] == value}
    assert expected.keys() - same == set()


def test_what_is_allowed_is_told_in_words() -> None:
    kinds = {(table.path, key.name): key.kind for table in reference.tables() for key in table.keys}
    for key, kind in {
        ("", "seed"): "integer ≥ 0 and < 2147483648",
        ("data", "mean"): "3 numbers",
        ("data", "holdout"): 'integer ≥ 1 or number > 0 and < 1 or "none"',
        ("split", "branches"): '"each", "all" or list of lists of integers',
        ("model", "bn_batch_size"): '"rank", "all" or integer ≥ 1',
        ("model", "tweaks"): 'list of "b", "c", "d"',
        ("train", "ema_decay"): 'number > 0 and < 1 or "none"',
        ("optim", "betas"): "2 numbers ≥ 0 and < 1",
    }.items():
        assert kinds[key] == kind


def test_a_table_or_a_key_is_picked() -> None:
    assert [table.header for table in reference.tables("optim")] == [
        "[optim] of every type", *(f'[optim] type = "{name}"' for name in ("sgd", "adam", "adamw", "rmsprop", "lamb")),
    ]  # fmt: skip
    (only,) = reference.tables("optim.lr")
    assert [key.name for key in only.keys] == ["lr"]
    assert {table.path for table in reference.tables("data")} == {"data", "data.decoder", "data.generate"}
    assert all(len(line) <= 60 for line in reference.as_text(reference.tables(), 60).splitlines() if " " in line[8:])
    with pytest.raises(UserError, match=r"optim.lrr: no such table or key; did you mean optim.lr\?"):
        reference.tables("optim.lrr")


def test_written_files_are_current() -> None:
    page = reference.as_markdown(reference.tables()) + "\n"
    written = (REPOSITORY / "doc/keys.md").read_text(encoding="utf-8")
    assert written == page, "bandsplit config --keys --markdown > doc/keys.md"
    for kind, file in FILES.items():
        advice = f"bandsplit config schema {kind} > config/{file.name}"
        assert json.loads(file.read_text(encoding="utf-8")) == json_schema(kind), advice


# taplo ----------------------------------------------------------------------------------------------------------------

MISTAKES = (
    "sed = 1",
    "seed = -1",
    "[optim]\nmomentm = 0.3",
    '[optim]\ntype = "adam"\nnesterov = true',
    "[optim]\nlr = 0",
    '[split]\ntransform = "dct3"',
    "[split]\nbranches = [[0], 1]",
    "[train]\nepochs = 1.5",
    '[train]\ngrad_accum_steps = "aut"',
    "[train]\ngrad_accum_steps = 0",
    '[train]\nepochs = "none"',
    "[data]\nscale = [0.1, 0.2, 0.3]",
    "[data]\nhflp = 0.5",
    "[data.decoder]\ncrop = true",
    "data = 3",
    "extends = [1]",
    "[[branch]]\narch = 'resnet18'",
    '[augment.auto]\ntype = "rand"',
    '[schedule]\ntype = "cosine"\nmilestones = [1]',
)
ALLOWED = (
    "",
    'extends = ["a.toml", "b.toml"]\ndata = "../data/demo.toml"\n[optim]\nmomentum = 0.5',
    '[data]\nroot = "x"\nscale = [1, 1]\nholdout = 0.1\n[train]\nclip_norm = "none"\ngrad_accum_steps = "auto"',
    'optim.lr = 1\nsplit.branches = [[0], [1, 2]]\naugment.auto.m = 5\ndistillation = "none"',
    '[[branch]]\nbands = [0]\n[[branch]]\nbands = [1]\nstem = "none"',
)


def accepted(*arguments: str | Path) -> bool:
    """Whether `taplo check` ends with success; what it prints is sometimes cut off at its end."""
    done = subprocess.run([TAPLO, "check", *map(str, arguments)], capture_output=True, text=True, cwd=REPOSITORY)
    assert "found files total=0" not in done.stderr
    return done.returncode == 0


def fits(file: Path, schema: str) -> bool:
    return accepted("--no-auto-config", "--schema", FILES[schema].as_uri(), file)


def test_taplo_accepts_all_configs_as_they_are_and_resolved(tmp_path: Path) -> None:
    assert accepted()  # .taplo.toml names files and schemas
    for path in sorted(REPOSITORY.glob("config/train/[!r]*.toml")) + sorted(REPOSITORY.glob("config/train/resnet*")):
        (tmp_path / path.name).write_text(tomli_w.dumps(resolved(loading.load(path))))
        assert fits(tmp_path / path.name, "train"), path


@pytest.mark.parametrize("text", ALLOWED)
def test_taplo_allows(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.toml").write_text(f"{text}\n")
    assert fits(tmp_path / "config.toml", "train")


@pytest.mark.parametrize(
    ("schema", "text"), [*(("train", each) for each in MISTAKES), ("data", 'root = "x"\nhflp = 0.5')]
)
def test_taplo_flags(tmp_path: Path, schema: str, text: str) -> None:
    (tmp_path / "config.toml").write_text(f"{text}\n")
    assert not fits(tmp_path / "config.toml", schema)
