"""Figures of groups of runs."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike, NDArray

from bandsplit.reporting.runs import Group, Run


def mean_curve(runs: Sequence[pd.Series]) -> pd.DataFrame:
    """Columns `mean` and `two_sigma` (2 sample standard deviations) of curves indexed by time or step.

    The grid is the union of all runs' points, within the range that all runs cover; runs are interpolated linearly.
    NaN at and next to a run's NaN, which leaves a gap in the line. Empty if the runs have no range in common.
    """
    low, high = max(run.index[0] for run in runs), min(run.index[-1] for run in runs)
    grid = np.unique(np.concatenate([run.index for run in runs]))
    grid = grid[(low <= grid) & (grid <= high)]
    return _mean_of(grid, [np.interp(grid, run.index, run) for run in runs])


def _mean_of(x: NDArray[np.float64], values: Sequence[ArrayLike]) -> pd.DataFrame:
    """Of values (runs, points) at x (points,)."""
    frame = pd.DataFrame(np.column_stack(values), index=x)
    return pd.DataFrame({"mean": frame.mean(axis=1, skipna=False), "two_sigma": 2 * frame.std(axis=1, ddof=1)})


WIDTH, HEIGHT = 7.0, 2.6  # inches: text width of a page, and height of one row of panels
SHORT = 12  # points of a curve that has a marker at each of them
FEW = 9  # branches whose numbers are written at the ends of their lines

STYLE = {
    **sns.axes_style("ticks"),
    **sns.plotting_context("paper"),
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "grid.linewidth": 0.6,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    **{f"{axis}tick.major.{key}": value for axis in "xy" for key, value in (("width", 0.8), ("size", 3))},
    "legend.fontsize": 8.5,
    "legend.handlelength": 2.4,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "text.parse_math": False,  # names of runs and classes may hold $
    "svg.hashsalt": "bandsplit",  # reproducible SVG files
    "pdf.fonttype": 42,  # TrueType, which journals ask for
}


@dataclass(frozen=True)
class Panel:
    """One axes: `column` of events of one kind, times `scale`."""

    event: str
    column: str
    label: str
    scale: float = 1.0
    bottom: float | None = None
    limits: tuple[float, float] = (-math.inf, math.inf)
    """Beyond which only bands of ± 2 SD can reach."""
    running_mean: bool = False  # for values logged every few steps, which are noisy


PERCENT = (-2.0, 102.0)  # markers at 0 and 100 are whole

ACCURACY = (
    Panel("validation", "top1", "Top-1 accuracy (%)", limits=PERCENT),
    Panel("validation", "top5", "Top-5 accuracy (%)", limits=PERCENT),
)

LOSS = (
    Panel("train", "loss", "Training loss (mean of branches)", running_mean=True),
    Panel("validation", "loss", "Validation loss (ensemble)"),
)

THROUGHPUT = (
    Panel("train", "images_per_second", "Throughput (images/s)", bottom=0, running_mean=True),
    Panel("train", "data_wait", "Waiting for data (% of time)", scale=100, bottom=0, running_mean=True),
    Panel("train", "peak_memory_mib", "Peak memory of rank 0 (GiB)", scale=2**-10, bottom=0),
)

FIGURES = {
    "accuracy_time": ("seconds", ACCURACY),
    "accuracy_step": ("step", ACCURACY),
    "accuracy_macs": ("macs", ACCURACY),
    "loss": ("step", LOSS),
    "throughput": ("step", THROUGHPUT),
}


def group_curve(group: Group, x: str, panel: Panel) -> pd.DataFrame:
    """The mean curve of one column over those of a group's runs that have values; empty if none has.

    Runs with points at the same steps, such as seeds, are averaged point by point, over x too: hosts may differ in
    speed. The others are averaged by `mean_curve`, and the curve is empty where they have no range of x in common.
    """
    curves = [*run_curves(group, x, panel).values()]
    if not curves:
        return pd.DataFrame()
    values = [curve["value"] for curve in curves]
    if len({tuple(curve["step"]) for curve in curves}) == 1:
        return _mean_of(np.mean([curve.index for curve in curves], axis=0), values)
    return mean_curve(values)


def run_curves(group: Group, x: str, panel: Panel) -> dict[Run, pd.DataFrame]:
    """Columns `step` and `value` of those runs of a group that have values, indexed by x."""
    curves = {}
    for run in group.runs:
        frame = getattr(run, panel.event).reindex(columns=list(dict.fromkeys(["step", x, panel.column])))
        frame = frame.dropna(subset=[x]).set_index(x, drop=False)
        column = frame[panel.column].astype(float) * panel.scale
        curve = column.where(np.isfinite(column))
        if not curve.isna().all():
            value = running_mean(curve) if panel.running_mean else curve
            curves[run] = pd.DataFrame({"step": frame["step"], "value": value})
    return curves


def left_out(groups: Sequence[Group], x: str, panels: Sequence[Panel]) -> list[str]:
    """What a figure lacks: runs without values, and groups whose runs have neither steps nor a range of x in common."""
    with_values = {panel: {run for group in groups for run in run_curves(group, x, panel)} for panel in panels}
    shown = [panel for panel, runs in with_values.items() if runs]
    told: dict[tuple[Run, ...], list[str]] = {}
    for panel in shown:
        without = tuple(run for group in groups for run in group.runs if run not in with_values[panel])
        told.setdefault(without, []).append(panel.label)
    sentences = [
        f"{', '.join(str(run.folder) for run in without)}, without values"
        + f" of {' and '.join(labels)}" * (len(labels) < len(shown))
        for without, labels in told.items()
        if without
    ]
    for group in groups:
        with_data = [panel for panel in shown if run_curves(group, x, panel)]
        if with_data and all(group_curve(group, x, panel).empty for panel in with_data):
            sentences.append(f"{group.label}, whose runs cover no common part of the x axis")
    return sentences


def running_mean(series: pd.Series) -> pd.Series:
    """A centered moving average over 2 % of the points, at least 5; NaN stays NaN."""
    mean = series.rolling(max(5, len(series) // 50), center=True, min_periods=1).mean()
    return mean.where(series.notna())


def axis_unit(x: str, largest: float) -> tuple[float, str]:
    """Divisor and axis label for `seconds`, `step` or `macs`, in the unit that suits the largest value."""
    if x == "step":
        return (1000, "Step (thousands)") if largest >= 10_000 else (1, "Step")
    if x == "macs":
        power = next((power for power in (18, 15, 12) if largest >= 10**power), 9)
        return 10**power, f"Training compute ({'GTPE'[power // 3 - 3]}MACs)"
    unit, divisor = ("h", 3600) if largest >= 2 * 3600 else ("min", 60) if largest >= 120 else ("s", 1)
    return divisor, f"Training time ({unit})"


def draw_curve(axes: Axes, curve: pd.DataFrame, divisor: float, **line: Any) -> None:
    """A mean line with its ± 2 SD band. Short curves have a marker at every point, longer ones at about eight."""
    x, every = curve.index / divisor, len(curve) // 8 if len(curve) > SHORT else 1
    axes.plot(x, curve["mean"], markevery=every, **line)
    low, high = curve["mean"] - curve["two_sigma"], curve["mean"] + curve["two_sigma"]
    axes.fill_between(x, low, high, color=line["color"], alpha=0.2, linewidth=0)


def short_marks(curve: pd.DataFrame) -> dict[str, Any]:
    """Markers for short curves, so that a single point is visible."""
    return {"marker": "o", "markersize": 3} if len(curve) <= SHORT else {}


def line_style(group: Group) -> dict[str, Any]:
    """Color and marker say which configuration it is; a broken line, that its runs have not ended."""
    return {
        "color": group.color,
        "linestyle": "-" if group.runs[0].ended else (0, (4, 1.5)),
        "linewidth": 1.3,
        "marker": group.marker,
        "markersize": 4,
        "markeredgecolor": "white",
        "markeredgewidth": 0.5,
    }


def curves_figure(groups: Sequence[Group], x: str, panels: Sequence[Panel]) -> Figure | None:
    """Panels side by side with the same x axis, one line per group, one legend. None if there is no data."""
    curves = {panel: [group_curve(group, x, panel) for group in groups] for panel in panels}
    curves = {panel: column for panel, column in curves.items() if any(len(curve) for curve in column)}
    if not curves:
        return None
    largest = max(curve.index[-1] for column in curves.values() for curve in column if len(curve))
    divisor, x_label = axis_unit(x, largest)
    figure = Figure(layout="constrained")
    for axes, (panel, column) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for group, curve in zip(groups, column, strict=True):
            if len(curve):
                draw_curve(axes, curve, divisor, **line_style(group))
        axes.set(xlabel=x_label, ylabel=panel.label, xlim=(0, None), ylim=(panel.bottom, None))
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, panel.limits[0]), min(high, panel.limits[1]))
    drawn = [group for n, group in enumerate(groups) if any(len(column[n]) for column in curves.values())]
    numbers = [{len(run_curves(group, x, panel)) for panel in curves} - {0} for group in drawn]
    labels = [group.legend(n) for group, n in zip(drawn, numbers, strict=True)]
    lines = [Line2D([], [], label=label, **line_style(group)) for group, label in zip(drawn, labels, strict=True)]
    rows = add_legend(figure, lines)
    figure.set_size_inches(WIDTH, HEIGHT + 0.2 * rows)
    return figure


def add_legend(figure: Figure, lines: Sequence[Line2D]) -> int:
    """One legend below all panels, in two columns if the labels are short enough; returns its number of text rows."""
    labels = [textwrap.fill(str(line.get_label()), 95) for line in lines]
    columns = 2 if len(lines) > 1 and max(map(len, labels)) <= 45 else 1
    figure.legend(lines, labels, loc="outside lower center", ncols=columns)
    return math.ceil(sum(label.count("\n") + 1 for label in labels) / columns)


def branch_frame(run: Run) -> pd.DataFrame:
    """Top-1 in percent of each branch, (validations, branches), by step; empty before the first validation."""
    if run.validation.empty:
        return pd.DataFrame()
    return pd.DataFrame(run.validation["branch_top1"].tolist(), index=run.validation["step"])


def has_several_branches(run: Run) -> bool:
    return len(branch_frame(run).columns) > 1


def of_several_branches(groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if any(map(has_several_branches, group.runs))]


def branches_figure(groups: Sequence[Group]) -> Figure | None:
    """One panel per group with several branches: top-1 of each branch in color, of the ensemble in black."""
    groups = [group.having(has_several_branches) for group in of_several_branches(groups)]
    groups = [group for group in groups if len(group_curve(group, "step", ACCURACY[0]))]
    if not groups:
        return None
    columns = min(len(groups), 2 if len(groups) <= 6 else 3)
    rows = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(WIDTH * min(1, 0.2 + 0.4 * columns), HEIGHT * rows + 0.2), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    divisor, x_label = axis_unit("step", max(run.steps for group in groups for run in group.runs))
    for axes, group in zip(grid.flat, groups, strict=False):
        draw_branches(axes, group, divisor)
        axes.set(xlabel=x_label, ylabel=ACCURACY[0].label, title=group.title(80 // columns))
        axes.tick_params(labelbottom=True, labelleft=True)
    grid[0, 0].set(xlim=(0, None), ylim=(0, None))  # after all panels are drawn: setting a limit ends autoscaling
    for axes in grid.flat[len(groups) :]:
        axes.remove()
    add_legend(figure, [Line2D([], [], color="black", linewidth=2, label="ensemble")])
    return figure


def draw_branches(axes: Axes, group: Group, divisor: float) -> None:
    """One thin line per branch, from dark (first) to bright (last), with a color bar; the ensemble on top."""
    frames = [branch_frame(run) for run in group.runs]
    settings = group.runs[0].settings
    colors = sns.color_palette("viridis", frames[0].shape[1])
    numbers = json.loads(settings["split.only"]) if "split.only" in settings else range(len(colors))
    for branch, color in enumerate(colors):
        curve = mean_curve([frame[branch] for frame in frames])
        axes.plot(curve.index / divisor, curve["mean"], color=color, linewidth=0.9, **short_marks(curve))
        if len(colors) <= FEW:
            end = curve.index[-1] / divisor, curve["mean"].iloc[-1]
            shift = 3 + 6 * (branch % 3), 0  # so that the numbers of lines that end together do not overlap
            axes.annotate(
                str(numbers[branch]), end, shift, textcoords="offset points", color=color, size=7, va="center"
            )
    ensemble = group_curve(group, "step", ACCURACY[0])
    draw_curve(axes, ensemble, divisor, color="black", linewidth=2, **short_marks(ensemble))
    bounds = np.arange(len(colors) + 1) - 0.5
    shades = ScalarMappable(BoundaryNorm(bounds, len(colors)), ListedColormap(colors))
    label = "Band" if settings["split.branches"] == "each" else "Branch"
    ticks = range(0, len(colors), max(1, len(colors) // 8))
    bar = axes.figure.colorbar(shades, ax=axes, label=label, ticks=ticks)
    bar.ax.set_yticklabels([str(numbers[k]) for k in ticks])
    bar.ax.tick_params(which="both", length=0)
    bar.outline.set_visible(False)
