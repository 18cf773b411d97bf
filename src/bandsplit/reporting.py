"""From run directories to figures and a table. Reads `config.toml` and `metrics.jsonl`, never a checkpoint.

Runs whose resolved configurations are equal except for `seed` form one group: a mean with a band of ± 2 standard
deviations. Units: `seconds` is training time without validation, `top1` and `top5` are percent, `data_wait` is a share.
"""

import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
import tomli
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

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


def mean_curve(runs: Sequence[pd.Series]) -> pd.DataFrame:
    """Columns `mean` and `two_sigma` (2 sample standard deviations) of curves that are indexed by time or step.

    The grid is every point of every run in the range that all runs cover; runs are linear between their own points.
    """
    low, high = max(run.index[0] for run in runs), min(run.index[-1] for run in runs)
    grid = np.unique(np.concatenate([run.index for run in runs]))
    grid = grid[(low <= grid) & (grid <= high)]
    values = pd.DataFrame({n: np.interp(grid, run.index, run) for n, run in enumerate(runs)}, index=grid)
    return pd.DataFrame({"mean": values.mean(axis=1), "two_sigma": 2 * values.std(axis=1, ddof=1)})


WIDTH, HEIGHT = 7.0, 2.6  # inches: the text width of a page and the height of one row of panels in it
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
    "svg.hashsalt": "bandsplit",  # the same data gives the same file
}


@dataclass(frozen=True)
class Panel:
    """One axes: a column of an event kind, times `scale`."""

    event: str
    column: str
    label: str
    scale: float = 1.0
    bottom: float | None = None
    running_mean: bool = False  # what is logged every few steps is too noisy to be read as it is


ACCURACY = (Panel("validation", "top1", "Top-1 accuracy (%)"), Panel("validation", "top5", "Top-5 accuracy (%)"))
LOSS = (
    Panel("train", "loss", "Training loss (mean of branches)", running_mean=True),
    Panel("validation", "loss", "Validation loss (ensemble)"),
)
THROUGHPUT = (
    Panel("train", "images_per_second", "Throughput (images/s)", bottom=0, running_mean=True),
    Panel("train", "data_wait", "Waiting for data (% of time)", scale=100, bottom=0, running_mean=True),
)
FIGURES = {
    "accuracy_time": ("seconds", ACCURACY),
    "accuracy_step": ("step", ACCURACY),
    "loss": ("step", LOSS),
    "throughput": ("step", THROUGHPUT),
}


def group_curve(group: Group, x: str, panel: Panel) -> pd.DataFrame:
    """The mean curve of one column over a group's runs; empty where a run has none of it yet."""
    frames = [getattr(run, panel.event).reindex(columns=[x, panel.column]).dropna() for run in group.runs]
    if any(frame.empty for frame in frames):
        return pd.DataFrame()
    columns = [frame.set_index(x)[panel.column] * panel.scale for frame in frames]
    return mean_curve([running_mean(column) for column in columns] if panel.running_mean else columns)


def running_mean(series: pd.Series) -> pd.Series:
    """A centred moving average over 2 % of the points, and over 5 points at least."""
    return series.rolling(max(5, len(series) // 50), center=True, min_periods=1).mean()


def axis_unit(x: str, largest: float) -> tuple[float, str]:
    """Divisor and axis label for `seconds` or `step`, in the unit that suits the largest value."""
    if x == "step":
        return (1000, "Step (thousands)") if largest >= 10_000 else (1, "Step")
    unit, divisor = ("h", 3600) if largest >= 2 * 3600 else ("min", 60) if largest >= 120 else ("s", 1)
    return divisor, f"Training time ({unit})"


def draw_curve(axes: Axes, curve: pd.DataFrame, divisor: float, **line: Any) -> None:
    """A mean line with its band; few points get markers, so that one alone can be seen."""
    x = curve.index / divisor
    axes.plot(x, curve["mean"], marker="o" if len(curve) <= 12 else None, markersize=3, **line)
    low, high = curve["mean"] - curve["two_sigma"], curve["mean"] + curve["two_sigma"]
    axes.fill_between(x, low, high, color=line["color"], alpha=0.2, linewidth=0)


def line_style(group: Group) -> dict[str, Any]:
    return {"color": group.color, "linestyle": "-" if group.runs[0].ended else (0, (4, 1.5)), "linewidth": 1.3}


def curves_figure(groups: Sequence[Group], x: str, panels: Sequence[Panel]) -> Figure | None:
    """Panels side by side over a common x axis, a line a group, one legend; None where there is nothing to draw."""
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
    rows = add_legend(figure, [Line2D([], [], label=group.legend, **line_style(group)) for group in groups])
    figure.set_size_inches(WIDTH, HEIGHT + 0.2 * rows)
    return figure


def add_legend(figure: Figure, lines: Sequence[Line2D]) -> int:
    """One legend below all panels, in two columns where the labels leave room; returns its number of text rows."""
    labels = [textwrap.fill(str(line.get_label()), 95) for line in lines]
    columns = 2 if len(lines) > 1 and max(map(len, labels)) <= 45 else 1
    figure.legend(lines, labels, loc="outside lower center", ncols=columns)
    return math.ceil(sum(label.count("\n") + 1 for label in labels) / columns)


def branch_frame(run: Run) -> pd.DataFrame:
    """Top-1 in percent of each branch, (validations, branches), by step; empty before the first validation."""
    if run.validation.empty:
        return pd.DataFrame()
    return pd.DataFrame(run.validation["branch_top1"].tolist(), index=run.validation["step"])


def branches_figure(groups: Sequence[Group]) -> Figure | None:
    """A panel a group that has several branches: each branch's top-1 in colour and the ensemble's in black."""
    groups = [group for group in groups if all(branch_frame(run).shape[1] > 1 for run in group.runs)]
    if not groups:
        return None
    columns = min(len(groups), 2)
    rows = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(WIDTH * (0.2 + 0.4 * columns), HEIGHT * rows + 0.2), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    divisor, x_label = axis_unit("step", max(run.steps for group in groups for run in group.runs))
    for axes, group in zip(grid.flat, groups, strict=False):
        draw_branches(axes, group, divisor)
        axes.set(xlabel=x_label, ylabel=ACCURACY[0].label, title=group.title)
        axes.tick_params(labelbottom=True, labelleft=True)
    grid[0, 0].set(xlim=(0, None), ylim=(0, None))  # shared by all panels, so only now: a limit ends autoscaling
    for axes in grid.flat[len(groups) :]:
        axes.remove()
    add_legend(figure, [Line2D([], [], color="black", linewidth=2, label="ensemble")])
    return figure


def draw_branches(axes: Axes, group: Group, divisor: float) -> None:
    """Thin lines from dark (first branch) to bright (last) with a colour bar; the ensemble on top."""
    frames = [branch_frame(run) for run in group.runs]
    colors = sns.color_palette("viridis", frames[0].shape[1])
    for branch, color in enumerate(colors):
        curve = mean_curve([frame[branch] for frame in frames])
        axes.plot(curve.index / divisor, curve["mean"], color=color, linewidth=0.9)
    draw_curve(axes, group_curve(group, "step", ACCURACY[0]), divisor, color="black", linewidth=2)
    bounds = np.arange(len(colors) + 1) - 0.5
    shades = ScalarMappable(BoundaryNorm(bounds, len(colors)), ListedColormap(colors))
    settings = group.runs[0].settings
    label = "Band" if settings["split.branches"] == "each" else "Branch"
    ticks = range(0, len(colors), max(1, len(colors) // 8))
    bar = axes.figure.colorbar(shades, ax=axes, label=label, ticks=ticks)
    numbers = json.loads(settings["split.only"]) if "split.only" in settings else range(len(colors))
    bar.ax.set_yticklabels([str(numbers[k]) for k in ticks])
    bar.ax.tick_params(which="both", length=0)
    bar.outline.set_visible(False)


CAPTION = (
    "± is twice the sample standard deviation over the n runs. Top-1 and top-5 in percent: the ensemble at the last "
    "validation. Best branch: the best single branch there. Hours: training time without validation. "
    "In the figures, training loss and throughput are running means over 2 % of a run, or 5 points where that is more."
)


def span(values: Iterable[float]) -> str:
    """`90`, or `10-12` where runs differ."""
    low, *_, high = sorted(values) * 2
    return f"{low:.10g}" if low == high else f"{low:.10g}-{high:.10g}"


def mean_two_sigma(values: Sequence[float | None], digits: int = 2) -> str:
    """`76.07 ± 0.22`, one value as it is, a dash where a run has none."""
    series = pd.Series(values, dtype=float)
    if series.isna().any():
        return "—"
    mean = f"{series.mean():.{digits}f}"
    return f"{mean} ± {2 * series.std(ddof=1):.{digits}f}" if len(series) > 1 else mean


def table_row(group: Group) -> dict[str, str]:
    """One row of the table, as text."""
    last = [{} if run.validation.empty else run.validation.iloc[-1].to_dict() for run in group.runs]
    branches = [row.get("branch_top1", []) for row in last]
    hours = [run.seconds / 3600 for run in group.runs]
    return {
        "configuration": group.label,
        "n": str(len(group.runs)),
        "epochs": span(round(run.epoch, 1) for run in group.runs),
        "steps": span(run.steps for run in group.runs),
        "top-1": mean_two_sigma([row.get("top1") for row in last]),
        "top-5": mean_two_sigma([row.get("top5") for row in last]),
        "best branch top-1": mean_two_sigma([max(top1) if len(top1) > 1 else None for top1 in branches]),
        "hours": mean_two_sigma(hours, digits=2 if min(hours) >= 1 else 3),
    }


def markdown_table(groups: Sequence[Group]) -> str:
    """The table with its caption; cells are padded so that it also reads well in a terminal."""
    rows = [table_row(group) for group in groups]
    header = list(rows[0])
    widths = [max(2, len(key), *(len(row[key]) for row in rows)) for key in header]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    cells = [header, rule, *(list(row.values()) for row in rows)]
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned) + f"\n\n{CAPTION}\n"


def report(folders: Sequence[Path], output: Path | None = None) -> None:
    """Write each figure as PNG and SVG and `table.md` to `output`; print the table and where everything is."""
    runs = [read_run(folder) for folder in dict.fromkeys(folder.resolve() for folder in folders)]
    output = output or (folders[0] / "plots" if len(folders) == 1 else Path("plots"))
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: exists and is not a folder")
    output.mkdir(parents=True, exist_ok=True)
    groups = group_runs(runs)
    with mpl.rc_context(STYLE):
        figures = {name: curves_figure(groups, x, panels) for name, (x, panels) in FIGURES.items()}
        figures["branches"] = branches_figure(groups)
        for name, figure in figures.items():
            if figure is None:
                print(f"{name}: left out, these runs have no data for it")
                continue
            figure.savefig(output / f"{name}.png")
            figure.savefig(output / f"{name}.svg", metadata={"Date": None})
    table = markdown_table(groups)
    (output / "table.md").write_text(table, encoding="utf-8")
    print(f"figures and table.md: {output}\n\n{table}", end="")
