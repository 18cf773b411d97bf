"""Accuracy on corrupted images as a table and a figure, from the JSON file of `src/evaluate.py --corrupt --output`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bandsplit.paths import reading_from, writing_to
from bandsplit.reporting.figures import HEIGHT, STYLE, WIDTH, add_legend

ENSEMBLE = "ensemble"

COLUMNS = 3
"""Panels in a row."""


def write(path: Path) -> None:
    """Writes NAME_corruption.csv, .png and .svg beside the JSON file NAME.json.

    Raises UserError if they cannot be written.
    """
    with reading_from(path):
        table = json.loads(path.read_text(encoding="utf-8"))
    rows = accuracies(table)
    beside = {end: path.with_name(f"{path.stem}_corruption.{end}") for end in ("csv", "png", "svg")}
    with writing_to(path), mpl.rc_context(STYLE):
        rows.to_csv(beside["csv"], index=False, float_format="%.4f")
        drawn = figure(rows)
        drawn.savefig(beside["png"])
        drawn.savefig(beside["svg"], metadata={"Date": None})


def accuracies(table: dict[str, Any]) -> pd.DataFrame:
    """Columns kind, strength, value, branch ("ensemble" or its number), top1 and top5 in percent.

    Strength 0 is the plain evaluation, once for each kind.
    """
    results, numbers = table["corruption"]["results"], table["branches"]
    plain = [{**table, "kind": kind, "strength": 0, "value": None} for kind in {row["kind"]: None for row in results}]
    rows = [
        {
            "kind": row["kind"],
            "strength": row["strength"],
            "value": row["value"],
            "branch": branch,
            "top1": top1,
            "top5": top5,
        }
        for row in [*plain, *results]
        for branch, top1, top5 in [
            (ENSEMBLE, row["top1"], row["top5"]),
            *zip(numbers, row["branch_top1"], row["branch_top5"], strict=True),
        ]
    ]
    return pd.DataFrame(rows)


def figure(rows: pd.DataFrame) -> Figure:
    """One panel per kind: top-1 by strength, of the ensemble in black and of each branch in color."""
    kinds = rows["kind"].unique()
    lines = -(-len(kinds) // COLUMNS)
    drawn = Figure(figsize=(WIDTH, HEIGHT * lines), layout="constrained")
    grid = drawn.subplots(lines, min(COLUMNS, len(kinds)), sharex=True, sharey=True, squeeze=False)
    for axes, kind in zip(grid.flat, kinds, strict=False):
        _draw(axes, rows[rows["kind"] == kind])
        axes.set(title=kind, xlabel="Strength (0: not corrupted)")
        axes.tick_params(labelbottom=True)
    for axes in grid.flat[len(kinds) :]:
        axes.remove()
    grid[0, 0].set(ylim=(0, None))
    for axes in grid[:, 0]:
        axes.set_ylabel("Top-1 accuracy (%)")
    add_legend(drawn, _legend(rows))
    return drawn


def _draw(axes: Axes, rows: pd.DataFrame) -> None:
    top1 = rows.pivot(index="strength", columns="branch", values="top1")
    for name, line in _lines(rows).items():
        axes.plot(top1.index, top1[name], **line)
    axes.set_xticks(top1.index)


def _lines(rows: pd.DataFrame) -> dict[Any, dict[str, Any]]:
    """How each branch is drawn, from dark (first) to bright (last), and the ensemble, on top.

    A single branch is the ensemble.
    """
    branches = [name for name in rows["branch"].unique() if name != ENSEMBLE]
    colors = sns.color_palette("viridis", len(branches))
    lines: dict[Any, dict[str, Any]] = {
        name: {"color": color, "linewidth": 0.9} for name, color in zip(branches, colors, strict=True)
    }
    black = {"color": "black", "linewidth": 2, "marker": "o", "markersize": 3}
    return {**(lines if len(lines) > 1 else {}), ENSEMBLE: black}


def _legend(rows: pd.DataFrame) -> list[Line2D]:
    """Of many branches the first and the last."""
    lines = _lines(rows)
    *branches, ensemble = lines
    named = [ensemble, *(branches if len(branches) <= 4 else (branches[0], branches[-1]))]
    return [Line2D([], [], label=name if name == ENSEMBLE else f"branch {name}", **lines[name]) for name in named]
