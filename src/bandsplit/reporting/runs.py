"""Runs read back from their directories, and grouped."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns

from bandsplit.errors import UserError
from bandsplit.progress import followed
from bandsplit.reporting.events import read_events
from bandsplit.reporting.settings import read_settings

MARKERS = "osD^vP<X>p*h"
"""Of the lines of groups, so that they are told apart without color."""


@dataclass(frozen=True)
class Branches:
    """What branches.json says of all branches of a run together."""

    parameters: int
    macs_of_each: list[dict[int, int]]
    """By branch: multiply-accumulates of a forward pass over one image, by the side of the training image in pixels."""
    energy: list[float]
    """Mean square of each band over the first training batch; NaN where no branch reads it."""

    @property
    def macs(self) -> dict[int, int]:
        """The same of all branches together."""
        return {size: sum(each[size] for each in self.macs_of_each) for size in self.macs_of_each[0]}


@dataclass(frozen=True, eq=False)
class Run:
    """One run directory. `settings` is its configuration as {"train.epochs": "90", ...}, without the seed. Those
    without effect on results, and `split.sigma`, which is measured, are in `other`."""

    folder: Path
    settings: dict[str, str]
    other: dict[str, str]
    seed: str | None
    train: pd.DataFrame
    validation: pd.DataFrame
    branches: Branches | None
    """None for runs that were trained before branches.json was written."""
    ended: bool
    steps: int
    epoch: float
    seconds: float
    remarks: list[str]
    """Warnings for the user about data that the figures leave out."""

    @property
    def macs(self) -> float | None:
        """Multiply-accumulates of training up to the last line; None if unknown."""
        return None if self.train.empty else self.train["macs"].iloc[-1]


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs that can be drawn, and an error message for each folder that cannot. Duplicate folders count once."""
    named: dict[str, Path] = {}
    for folder in folders:
        named.setdefault(os.path.realpath(folder), folder)
    runs, left_out = [], []
    for folder in followed(named.values(), "reading runs", len(named), "runs"):
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
            raise UserError(f"{folder}: {what}; expected a run directory")
        for name in ("config.toml", "metrics.jsonl"):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: not a run directory, {name} is missing")
        settings, other, seed = read_settings(folder / "config.toml")
        events, remarks = read_events(folder / "metrics.jsonl")
        branches, damage = read_branches(folder / "branches.json")
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error}") from error
    train, validation = (
        pd.DataFrame([event for event in events if event["event"] == kind]) for kind in ("train", "validation")
    )
    if train.empty and validation.empty:
        raise UserError(f"{folder / 'metrics.jsonl'}: no training or validation events yet; try again in a minute")
    try:
        add_macs(train, validation, branches, settings)
    except (ValueError, IndexError):  # not as many branches as elsewhere in the run
        branches, damage = None, [damaged(folder / "branches.json")]
    last = events[-1]
    return Run(
        folder,
        settings,
        other,
        seed,
        train,
        validation,
        branches,
        last["event"] == "end",
        last["step"],
        last["epoch"],
        last["seconds"],
        remarks + damage,
    )


def read_branches(path: Path) -> tuple[Branches | None, list[str]]:
    """What branches.json says, if there is one, and a warning if it is damaged."""
    if not path.exists():
        return None, []
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        each = table["branches"]
        if not each:
            raise ValueError
        macs = [{int(size): int(count) for size, count in branch["macs"].items()} for branch in each]
        if not macs[0] or any(of_size.keys() != macs[0].keys() for of_size in macs):
            raise ValueError
        energy = [math.nan if value is None else float(value) for value in table["band_energy"]]
        return Branches(sum(branch["parameters"] for branch in each), macs, energy), []
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None, [damaged(path)]


def damaged(path: Path) -> str:
    return f"{path}: damaged; figures and columns of costs and energies are left out"


def add_macs(
    train: pd.DataFrame, validation: pd.DataFrame, branches: Branches | None, settings: Mapping[str, str]
) -> None:
    """Adds a column `macs`: multiply-accumulates of training up to a line; NaN where unknown.

    3 times the images times the forward pass, at the size of these images, of the branches that trained: a backward
    pass takes two products of the size of a forward pass, one for gradients of the weights and one for those of the
    inputs. Raises ValueError or IndexError if the branches are not those of the run.
    """
    for frame in (train, validation):
        frame["macs"] = math.nan
    if branches is None or not {"images", "image_size"} <= set(train.columns):
        return
    numbers = json.loads(settings["split.only"]) if "split.only" in settings else range(len(branches.macs_of_each))
    starts = json.loads(settings.get("train.start_epochs", "[]"))
    ends = [each for each in validation.get("stopped_after", []) if isinstance(each, list)]
    stopped = ends[-1] if ends else [None] * len(numbers)
    images = train["images"].astype(float)
    new, macs = images.diff().fillna(images), pd.Series(0.0, train.index)
    for number, of_size, end in zip(numbers, branches.macs_of_each, stopped, strict=True):
        trains = train["epoch"] > (starts[number] if starts else 0)
        trains &= train["step"] <= (math.inf if end is None else end)
        macs += new.where(trains, 0.0) * train["image_size"].map(of_size)
    train["macs"] = (3 * macs).cumsum()
    if "images" in validation:
        validation["macs"] = np.interp(validation["images"].astype(float), images, train["macs"])


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one configuration, all finished or all in progress: one line of a plot, one row of the table."""

    name: str
    differing: list[str]
    """`key=value` for each key in which another configuration of this name differs."""
    color: tuple[float, float, float]
    marker: str
    runs: list[Run]

    @property
    def label(self) -> str:
        notes = self.differing + progress(self.runs)
        return f"{self.name} ({', '.join(notes)})" if notes else self.name

    def legend(self, drawn: Iterable[int]) -> str:
        """The label, and how many of the runs are drawn, in each panel if that differs."""
        n, of = span(drawn), str(len(self.runs))
        return f"{self.label}, mean ± 2 SD, n = {n if n == of else f'{n} of {of}'}" if of != "1" else self.label

    def having(self, what: Callable[[Run], bool]) -> Group:
        """With those of its runs that have something."""
        return replace(self, runs=[run for run in self.runs if what(run)])

    def title(self, width: int) -> str:
        """The label, and n if there are several, in lines of about `width` characters."""
        text = f"{self.label}, n = {len(self.runs)}" if len(self.runs) > 1 else self.label
        parts = text.replace(" (", "\n(", 1).split("\n")
        return "\n".join(textwrap.fill(part, width, break_long_words=False) for part in parts)

    @property
    def remarks(self) -> list[str]:
        """Names the keys in which the runs differ all the same."""
        keys = sorted({key for run in self.runs for key in run.other})
        differing = [key for key in keys if len({run.other.get(key) for run in self.runs}) > 1]
        return [f"{self.label}: one group of runs that differ in {', '.join(differing)}"] if differing else []

    @property
    def repeated_seeds(self) -> list[str]:
        """A sentence for each seed of several runs, which may be copies."""
        return [
            f"{self.label}: {n} runs of seed {seed} count as {n}, but tell nothing of the spread between seeds."
            for seed, n in Counter(run.seed for run in self.runs).items()
            if n > 1
        ]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups runs by configuration, in order of appearance; finished and unfinished runs form separate groups."""
    configurations: list[dict[str, str]] = []
    for run in runs:
        if run.settings not in configurations:
            configurations.append(run.settings)
    groups = []
    palette = sns.color_palette("colorblind" if len(configurations) <= 10 else "husl", len(configurations))
    for number, (settings, color) in enumerate(zip(configurations, palette, strict=True)):
        for ended in (True, False):
            members = [run for run in runs if run.settings == settings and run.ended == ended]
            if members:
                differing = differing_keys(settings, configurations)
                groups.append(Group(settings["name"], differing, color, MARKERS[number % len(MARKERS)], members))
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
