"""Runs read back from their directories, and grouped."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn as sns
import tomli

from bandsplit.errors import UserError


@dataclass(frozen=True, eq=False)
class Run:
    """One run directory. `settings` is its configuration as {"train.epochs": "90", ...}, without the seed."""

    settings: dict[str, str]
    train: pd.DataFrame
    validation: pd.DataFrame
    ended: bool
    steps: int
    epoch: float
    seconds: float


def read_run(folder: Path) -> Run:
    """Read a run directory, finished or still growing."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a run directory, as written by src/train.py")
    for name in ("config.toml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: not a run directory, {name} is missing")
    settings = flatten(tomli.loads((folder / "config.toml").read_text(encoding="utf-8")))
    settings.pop("seed", None)
    events = read_events(folder / "metrics.jsonl")
    train, validation = (
        pd.DataFrame([event for event in events if event["event"] == kind]) for kind in ("train", "validation")
    )
    if train.empty and validation.empty:
        raise UserError(f"{folder / 'metrics.jsonl'}: no training or validation events yet; try again in a minute")
    last = events[-1]
    return Run(settings, train, validation, last["event"] == "end", last["step"], last["epoch"], last["seconds"])


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"train": {"epochs": 90}} → {"train.epochs": "90"}; a list is one value."""
    flat: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def read_events(path: Path) -> list[dict[str, Any]]:
    """The train, validation and end events of a run; a half-written last line is one that is still being written."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    lines = [line for line in lines if line.strip()]
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is not a JSON object: {line[:80]}") from error
    return [event for event in events if event["event"] in ("train", "validation", "end")]


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one configuration, all finished or all in progress: one line of a plot, one row of the table."""

    name: str
    notes: list[str]
    color: tuple[float, float, float]
    runs: list[Run]

    @property
    def label(self) -> str:
        return f"{self.name} ({', '.join(self.notes)})" if self.notes else self.name

    @property
    def legend(self) -> str:
        return f"{self.label}, mean ± 2 SD, n = {len(self.runs)}" if len(self.runs) > 1 else self.label

    @property
    def title(self) -> str:
        return "\n".join(textwrap.fill(line, 52) for line in self.legend.replace(" (", "\n(", 1).split("\n"))


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs by configuration, in order of appearance; unfinished runs stay apart from finished ones."""
    configurations: list[dict[str, str]] = []
    for run in runs:
        if run.settings not in configurations:
            configurations.append(run.settings)
    groups = []
    for settings, color in zip(configurations, sns.color_palette("colorblind", len(configurations)), strict=True):
        for ended in (True, False):
            members = [run for run in runs if run.settings == settings and run.ended == ended]
            if members:
                notes = differing_keys(settings, configurations) + progress(members)
                groups.append(Group(settings["name"], notes, color, members))
    return groups


def differing_keys(settings: Mapping[str, str], configurations: Sequence[Mapping[str, str]]) -> list[str]:
    """`key=value` for each key in which a configuration differs from another of the same name."""
    namesakes = [other for other in configurations if other["name"] == settings["name"]]
    return [f"{key}={value}" for key, value in settings.items() if any(other.get(key) != value for other in namesakes)]


def progress(runs: Sequence[Run]) -> list[str]:
    """Where unfinished runs are; nothing for finished ones."""
    if runs[0].ended:
        return []
    return [f"in progress, epoch {span(round(run.epoch, 1) for run in runs)} of {runs[0].settings['train.epochs']}"]


def span(values: Iterable[float]) -> str:
    """`90`, or `10-12` where runs differ."""
    low, *_, high = sorted(values) * 2
    return f"{low:.10g}" if low == high else f"{low:.10g}-{high:.10g}"
