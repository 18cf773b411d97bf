"""Runs read back from their directories, and grouped."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import seaborn as sns
import tomli

from bandsplit.errors import UserError
from bandsplit.reporting.events import read_events
from bandsplit.runs.directory import flatten

NEEDED = ("name", "train.epochs", "split.branches")
"""Required keys of config.toml. All other keys only serve to group runs."""


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
    remarks: list[str]
    """Warnings for the user about data that the figures leave out."""


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs that can be drawn, and an error message for each folder that cannot. Duplicate folders count once."""
    named: dict[str, Path] = {}
    for folder in folders:
        named.setdefault(os.path.realpath(folder), folder)
    runs, left_out = [], []
    for folder in named.values():
        try:
            runs.append(read_run(folder))
        except UserError as error:
            left_out.append(str(error))
    return runs, left_out


def read_run(folder: Path) -> Run:
    """Reads a run directory, finished or in progress. Raises UserError if there is nothing to draw."""
    try:
        if not folder.is_dir():
            what = "not a folder" if folder.exists() else "no such folder"
            raise UserError(f"{folder}: {what}; expected a run directory, as written by src/train.py")
        for name in ("config.toml", "metrics.jsonl"):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: not a run directory, {name} is missing")
        settings = read_settings(folder / "config.toml")
        events, remarks = read_events(folder / "metrics.jsonl")
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error}") from error
    train, validation = (
        pd.DataFrame([event for event in events if event["event"] == kind]) for kind in ("train", "validation")
    )
    if train.empty and validation.empty:
        raise UserError(f"{folder / 'metrics.jsonl'}: no training or validation events yet; try again in a minute")
    last = events[-1]
    ended = last["event"] == "end"
    return Run(settings, train, validation, ended, last["step"], last["epoch"], last["seconds"], remarks)


def read_settings(path: Path) -> dict[str, str]:
    """The configuration of a run as {"train.epochs": "90", ...}, without the seed."""
    try:
        table = tomli.loads(path.read_text(encoding="utf-8"))
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error
    settings = {
        key: value if isinstance(value, str) else json.dumps(value, default=str)
        for key, value in flatten(table).items()
    }
    settings.pop("seed", None)
    missing = [key for key in NEEDED if key not in settings]
    if missing:
        raise UserError(f"{path}: not the config of a run, {missing[0]} is missing")
    return settings


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
        return "\n".join(textwrap.fill(line, 40) for line in self.legend.replace(" (", "\n(", 1).split("\n"))


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups runs by configuration, in order of appearance; finished and unfinished runs form separate groups."""
    configurations: list[dict[str, str]] = []
    for run in runs:
        if run.settings not in configurations:
            configurations.append(run.settings)
    groups = []
    palette = sns.color_palette("colorblind" if len(configurations) <= 10 else "husl", len(configurations))
    for settings, color in zip(configurations, palette, strict=True):
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
    """The epoch reached by unfinished runs, as a note; empty for finished ones."""
    if runs[0].ended:
        return []
    return [f"in progress, epoch {span(round(run.epoch, 1) for run in runs)} of {runs[0].settings['train.epochs']}"]


def span(values: Iterable[float]) -> str:
    """`90`, or `10-12` where runs differ."""
    low, *_, high = sorted(values) * 2
    return f"{low:.10g}" if low == high else f"{low:.10g}-{high:.10g}"
