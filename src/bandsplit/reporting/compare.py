"""Two sets of runs compared: what it takes to reach an accuracy, and the difference of the last accuracies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import Locator, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from bandsplit.errors import UserError
from bandsplit.reporting.figures import WIDTH, add_legend, axis_unit, line_style
from bandsplit.reporting.runs import Group, Run, span
from bandsplit.reporting.tables import MISSING, Table, mean_two_sigma
from bandsplit.runs.predictions import Predictions

PREDICTIONS = "predictions.npz"
"""Predictions of a run, in its directory: evaluate.py --save."""

RESAMPLES = 10_000

FEW = 20
"""Images on which two sides differ: with fewer, a bootstrap over images is too narrow."""

QUANTITIES = ("seconds", "step", "macs")

CAPTION = (
    "An accuracy is reached at the first validation with at least this top-1 of the ensemble; times are training time "
    "without validation. The last of each quantity is the highest accuracy that all runs reach. ± is twice the sample "
    "standard deviation over the runs. Ratio: mean of A over mean of B."
)


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two sets of runs, all of one configuration."""

    name: str
    """A or B."""
    group: Group

    @property
    def runs(self) -> list[Run]:
        return self.group.runs


def side(name: str, folders: Sequence[Path], groups: Sequence[Group]) -> Side:
    """The runs in these folders. Raises UserError if they are of several groups, or without a validation."""
    wanted = {folder.resolve() for folder in folders}
    found = [(group, [run for run in group.runs if run.folder.resolve() in wanted]) for group in groups]
    found = [(group, runs) for group, runs in found if runs]
    given = ",".join(map(str, folders))
    if len(found) > 1:
        labels = "; ".join(group.label for group, _ in found)
        if len({group.color for group, _ in found}) == 1:  # of one configuration
            raise UserError(f"--compare {given}: some of these runs are finished and some are not: {labels}")
        raise UserError(f"--compare {given}: these runs differ in more than their seeds: {labels}")
    ((group, runs),) = found
    for run in runs:
        if run.validation.empty:
            raise UserError(f"--compare {run.folder}: no validation yet")
    return Side(name, replace(group, runs=runs))


# Reaching an accuracy -------------------------------------------------------------------------------------------------

ROUNDING = 1e-6
"""Of an accuracy in percent as a float: less than one image counts."""


def reached(run: Run, x: str, top1: float) -> float | None:
    """`seconds`, `step` or `macs` at the first validation with at least this top-1; None if there is none, or no x."""
    at = run.validation[run.validation["top1"] >= top1 - ROUNDING][x]
    return None if at.empty or math.isnan(at.iloc[0]) else float(at.iloc[0])


def levels(runs: Sequence[Run]) -> list[float]:
    """Round accuracies above the first validation of some run, and the highest that all runs reach (0.01 steps)."""
    lowest = min(run.validation["top1"].iloc[0] for run in runs)
    highest = math.floor(100 * min(run.validation["top1"].max() for run in runs) + ROUNDING) / 100
    ticks = MaxNLocator(nbins=7, steps=[1, 2, 5, 10]).tick_values(lowest, max(highest, lowest + 1e-9))
    return [*(tick for tick in np.round(ticks, 6).tolist() if lowest < tick < highest), highest]


@dataclass(frozen=True)
class Effort:
    """What each run of A and B needs to reach each accuracy, in one unit."""

    label: str
    """With the unit."""
    values: dict[float, tuple[list[float | None], list[float | None]]]

    @property
    def has_means(self) -> bool:
        """Whether all runs of a side reach some accuracy, so that there is something to draw."""
        return any(None not in values for sides in self.values.values() for values in sides)

    def ratio(self, top1: float) -> float:
        """Mean of A over mean of B; NaN where a run does not reach it."""
        a, b = (np.mean([math.nan if value is None else value for value in each]) for each in self.values[top1])
        return float(a / b)


def efforts(a: Side, b: Side) -> dict[str, Effort]:
    """By `seconds`, `step` and, if any run knows it, `macs`."""
    found = {}
    for x in QUANTITIES:
        values = {
            top1: ([reached(run, x, top1) for run in a.runs], [reached(run, x, top1) for run in b.runs])
            for top1 in levels([*a.runs, *b.runs])
        }
        known = [value for sides in values.values() for each in sides for value in each if value is not None]
        if not known:
            continue
        divisor, label = axis_unit(x, max(known))
        scaled = {top1: (_divided(of_a, divisor), _divided(of_b, divisor)) for top1, (of_a, of_b) in values.items()}
        found[x] = Effort(label, scaled)
    return found


def _divided(values: Sequence[float | None], divisor: float) -> list[float | None]:
    return [None if value is None else value / divisor for value in values]


# The difference of accuracies -----------------------------------------------------------------------------------------


def difference_over_seeds(a: Sequence[float], b: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Difference of means, and its 95 % interval by Welch's t where both sides have several values that vary."""
    from scipy import stats

    difference = float(np.mean(a) - np.mean(b))
    if min(len(a), len(b)) < 2 or np.ptp(a) == np.ptp(b) == 0:
        return difference, None
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    return difference, (float(interval.low), float(interval.high))


def difference_over_images(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, tuple[float, float]]:
    """Difference of mean correctness (N,) of the same images, and its 95 % interval: paired bootstrap over images."""
    low, high = np.percentile(resampled_means((a - b)[None]), [2.5, 97.5])
    return float(np.mean(a - b)), (float(low), float(high))


def resampled_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of values (K, N) over N images, in RESAMPLES bootstrap resamples of the images: (RESAMPLES, K).

    Images with the same values are drawn by their number, which is multinomial.
    """
    distinct, counts = np.unique(values, axis=1, return_counts=True)
    images = values.shape[1]
    drawn = np.random.default_rng(0).multinomial(images, counts / images, size=RESAMPLES)
    means: NDArray[np.float64] = drawn @ distinct.T / images
    return means


@dataclass(frozen=True, eq=False)
class Saved:
    """Saved predictions of the runs of a side."""

    correct: pd.Series
    """Share of the runs that classify each image correctly, by name of the image."""
    labels: pd.Series
    """Names of the classes, in the same way."""
    crops: str
    folders: list[str]
    """Of the images, where it is known."""
    about: str
    """Steps, fusion and crops, and what is unusual in them."""


def saved(runs: Sequence[Run]) -> Saved | str:
    """What the runs have saved, or why it cannot be compared."""
    columns, labels, crops, places, about = [], [], set(), [], []
    for run in runs:
        path = run.folder / PREDICTIONS
        if not path.is_file():
            return f"{path} is not there"
        try:
            found = Predictions.read(path)
        except UserError as error:
            return str(error)
        if len(set(found.names)) < len(found.names):
            return f"{path} has several images of the same name"
        predicted = found.fused.classes[:, list(found.fusions).index(found.fusion), 0]
        columns.append(pd.Series((predicted == found.labels).astype(float), index=found.names))
        labels.append(pd.Series(np.array(found.classes)[found.labels], index=found.names))
        crops.add(found.crops)
        places += [found.folder] if found.folder else []
        about.append(_about(found, run))
    folders = ", ".join(str(run.folder) for run in runs)
    if any(set(column.index) != set(columns[0].index) for column in columns):
        return f"{PREDICTIONS} of {folders} are of different images"
    if len(crops) > 1:
        return f"{PREDICTIONS} of {folders} are of different crops"
    if any((each != labels[0].reindex(each.index)).any() for each in labels):
        return f"{PREDICTIONS} of {folders} have different labels for the same images"
    of_images = pd.concat(columns, axis=1).mean(axis=1)
    return Saved(of_images, labels[0], crops.pop(), places, "; ".join(dict.fromkeys(about)))


def _about(found: Predictions, run: Run) -> str:
    steps = sorted({branch.step for branch in found.branches})
    of = f" of {run.steps}" * (steps != [run.steps])
    facts = [f"step {', '.join(map(str, steps))}{of}", f"{found.fusion} fusion"]
    if found.crops != "center":
        facts.append(f"{found.crops} crops")
    others = sorted({Path(branch.run).resolve().name for branch in found.branches} - {run.folder.resolve().name})
    if others:
        facts.append(f"branches of {', '.join(others)}")
    return ", ".join(facts)


def difference_notes(a: Side, b: Side) -> list[str]:
    """Sentences on the difference in top-1, A − B, with the intervals that the data allow."""
    last = [[float(run.validation["top1"].iloc[-1]) for run in side.runs] for side in (a, b)]
    difference, interval = difference_over_seeds(*last)
    how = f"Welch's t over {len(last[0])} and {len(last[1])} runs"
    of_a, of_b = ([round(float(run.validation["epoch"].iloc[-1]), 2) for run in each.runs] for each in (a, b))
    where = f" (of A at epoch {span(of_a)}, of B at epoch {span(of_b)})" * (len({*of_a, *of_b}) > 1)
    notes = [f"Top-1 at the last validation{where}: A {mean_two_sigma(last[0])}, B {mean_two_sigma(last[1])}; A − B = "]
    if any(len({run.seed for run in each.runs}) < len(each.runs) for each in (a, b)):
        notes[0] += f"{_points(difference)}. No interval over seeds: several runs of a side have the same seed."
    elif interval:
        notes[0] += f"{_points(difference, interval)} ({how})."
    elif min(map(len, last)) < 2:
        notes[0] += f"{_points(difference)}. No interval over seeds, which takes two runs on both sides."
    else:
        notes[0] += f"{_points(difference)}. No interval over seeds: the runs of a side do not differ."
    return [*notes, _predictions_note(saved(a.runs), saved(b.runs))]


def _predictions_note(a: Saved | str, b: Saved | str) -> str:
    none = "No interval over images: "
    if isinstance(a, str) or isinstance(b, str):
        return f"{none}{a if isinstance(a, str) else b}."
    if set(a.correct.index) != set(b.correct.index):
        return f"{none}{PREDICTIONS} of A and of B are of different images."
    if a.crops != b.crops:
        return f"{none}{PREDICTIONS} of A are of the crops {a.crops!r}, those of B of {b.crops!r}."
    if (a.labels != b.labels.reindex(a.labels.index)).any():
        return f"{none}{PREDICTIONS} of A and of B have different labels for the same images."
    pair = 100 * a.correct.to_numpy(), 100 * b.correct.reindex(a.correct.index).to_numpy()
    discordant = int((pair[0] != pair[1]).sum())
    folders = dict.fromkeys(a.folders + b.folders)
    of = f" of {' and '.join(folders)}" * bool(folders)
    few = f"; A and B differ on {discordant} images, too few for a reliable interval" * (discordant < FEW)
    return (
        f"Saved predictions of the same {len(pair[0]):,} images{of} (A: {a.about}; B: {b.about}): "
        f"A {pair[0].mean():.2f}, B {pair[1].mean():.2f}; A − B = {_points(*difference_over_images(*pair))} "
        f"(paired bootstrap over images, {RESAMPLES:,} resamples{few})."
    )


def _points(difference: float, interval: tuple[float, float] | None = None) -> str:
    spread = ", 95 % interval {:+.2f} to {:+.2f}".format(*interval) if interval else ""
    return f"{difference:+.2f} points{spread}".replace("-", "−")


# Table and figure -----------------------------------------------------------------------------------------------------


def compare_table(a: Side, b: Side) -> Table:
    """One row per quantity and accuracy: what A and B need to reach it, and the ratio."""
    text: list[dict[str, str]] = []
    numbers = []
    for x, effort in efforts(a, b).items():
        for top1, sides in effort.values.items():
            first = not text or text[-1]["unit"] != effort.label
            digits = 0 if effort.label == "Step" else 2
            ratio = effort.ratio(top1)
            text.append(
                {
                    "unit": effort.label,
                    "to reach": effort.label if first else "",
                    "top-1 (%)": f"{top1:.10g}",
                    **{name: mean_two_sigma(values, digits) for name, values in zip("AB", sides, strict=True)},
                    "A / B": MISSING if math.isnan(ratio) else f"{ratio:.2f}",
                }
            )
            series = {name: pd.Series(values, dtype=float) for name, values in zip("ab", sides, strict=True)}
            numbers.append(
                {"quantity": x, "unit": effort.label, "top1": top1, "ratio": ratio}
                | {name: each.mean(skipna=False) for name, each in series.items()}
                | {f"{name}_two_sd": 2 * each.std(ddof=1, skipna=False) for name, each in series.items()}
            )
    notes = [f"{side.name}: {side.group.label}, n = {len(side.runs)}." for side in (a, b)]
    cells = pd.DataFrame(text).drop(columns="unit")
    return Table(cells, pd.DataFrame(numbers), CAPTION, notes + difference_notes(a, b))


def compare_figure(a: Side, b: Side) -> Figure:
    """What A and B need to reach each accuracy, side by side, with the ratio A / B of each at the right edge.

    Without a quantity that some runs of both sides do not know, such as `macs`.
    """
    shown = [effort for effort in efforts(a, b).values() if effort.has_means]
    figure = Figure(layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, effort in zip(panels, shown, strict=True):
        draw_effort(axes, effort, a, b)
    panels[0].set_ylabel("Top-1 to reach (%)")
    lines = [
        Line2D([], [], label=f"{side.name}: {side.group.legend([len(side.runs)])}", **_marks(side)) for side in (a, b)
    ]
    rows = add_legend(figure, lines)
    figure.set_size_inches(WIDTH, 1.4 + 0.22 * len(levels([*a.runs, *b.runs])) + 0.2 * rows)
    return figure


def draw_effort(axes: Axes, effort: Effort, a: Side, b: Side) -> None:
    """A mark for the mean of each side at each accuracy, with a bar of ± 2 SD, joined by a gray line."""
    places = list(range(len(effort.values)))
    sides = [
        [[math.nan if value is None else value for value in effort.values[top1][n]] for top1 in effort.values]
        for n in (0, 1)
    ]
    means = [np.mean(values, axis=1) for values in sides]
    axes.hlines(places, *means, color="0.75", linewidth=1.5, zorder=1)
    for side, values, mean in zip((a, b), sides, means, strict=True):
        spread = 2 * np.std(values, axis=1, ddof=1) if len(side.runs) > 1 else None
        axes.errorbar(mean, places, xerr=spread, elinewidth=0.8, capsize=2, **_marks(side))
    for place, top1 in zip(places, effort.values, strict=True):
        ratio = effort.ratio(top1)
        axes.annotate(
            MISSING if math.isnan(ratio) else f"{ratio:.2f}",
            (1.02, place),
            xycoords=("axes fraction", "data"),
            va="center",
            size=8,
        )
    axes.set(xlabel=effort.label, yticks=places, yticklabels=[f"{top1:.10g}" for top1 in effort.values])
    axes.set_xscale("log")  # on which equal ratios are equal distances
    axes.xaxis.set_major_locator(_ticks(means))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title("A / B", loc="right")


def _ticks(means: Sequence[NDArray[np.float64]]) -> Locator:
    """At most about five ticks of a logarithmic axis."""
    ratio = np.nanmax(means) / np.nanmin(means)
    return LogLocator(subs=(1, 3) if ratio > 8 else (1, 2, 5)) if ratio > 3 else MaxNLocator(5)


def _marks(side: Side) -> dict[str, Any]:
    """A is filled and B is hollow, so that runs of one configuration can be compared too."""
    style = line_style(side.group)
    face = style["color"] if side.name == "A" else "white"
    return {**style, "linestyle": "", "markersize": 5.5, "markerfacecolor": face, "markeredgecolor": style["color"]}
