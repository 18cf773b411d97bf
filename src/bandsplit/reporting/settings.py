"""The configuration of a run, read back from its directory without the schema: runs may be older than a key."""

from __future__ import annotations

import json
from pathlib import Path

import tomli

from bandsplit.errors import UserError
from bandsplit.runs.directory import NO_EFFECT, flatten

NEEDED = ("name", "train.epochs", "split.branches")
"""Required keys of config.toml. All other keys only serve to group runs."""

MEASURED = "split.sigma"
"""What a run measures at its start, with its seed, unless it is given: config.toml does not say which."""


def read_settings(path: Path) -> tuple[dict[str, str], dict[str, str], str | None]:
    """The configuration of a run as {"train.epochs": "90", ...}: keys that tell configurations apart, others, and the
    seed."""
    try:
        table = tomli.loads(path.read_text(encoding="utf-8"))
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error
    settings = {
        key: value if isinstance(value, str) else json.dumps(value, default=str)
        for key, value in flatten(table).items()
    }
    seed = settings.pop("seed", None)
    missing = [key for key in NEEDED if key not in settings]
    if missing:
        raise UserError(f"{path}: not the config of a run, {missing[0]} is missing")
    other = {key: value for key, value in settings.items() if key.startswith((*NO_EFFECT, MEASURED))}
    return {key: value for key, value in settings.items() if key not in other}, other, seed
