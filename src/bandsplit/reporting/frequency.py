"""Accuracy and energy of single bands, each at its place in the block."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
import seaborn as sns
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from bandsplit.reporting.figures import WIDTH
from bandsplit.reporting.runs import Group

Grid = NDArray[np.float64]

AXES = {
    "dct2d": ("v (horizontal)", "u (vertical)"),
    "hadamard": ("v (horizontal)", "u (vertical)"),
    "dct1d": ("k mod s", "k div s"),
    "identity": ("column", "row"),
    "random": ("k mod s", "k div s"),
}
"""What column and row of band k = u s + v mean, by transform: see doc/method.md."""

LARGEST_WRITTEN = 6
"""Largest side of a grid whose values are written into its cells."""


def accuracy_grid(group: Group) -> Grid | None:
    """(s, s): mean top-1 in percent of the branch of each band at the last validation; NaN for bands of no branch.

    None if branches read several bands, if there is one band, or if a run has no validation.
    """
    settings = group.runs[0].settings
    block = int(settings.get("split.block", "1"))
    if settings["split.branches"] != "each" or block == 1 or any(run.validation.empty for run in group.runs):
        return None
    last = [run.validation["branch_top1"].iloc[-1] for run in group.runs]
    bands = json.loads(settings["split.only"]) if "split.only" in settings else range(block**2)
    if any(len(top1) != len(bands) for top1 in last):
        return None
    grid = np.full(block**2, np.nan)
    grid[list(bands)] = np.mean(last, axis=0)
    return grid.reshape(block, block)


def energy_grid(group: Group) -> Grid | None:
    """(s, s): mean square of each band in dB of that of the strongest; NaN where nothing is known or it is 0.

    None where a run has none, or none above 0.
    """
    energies = [run.branches.energy for run in group.runs if run.branches is not None]
    block = int(group.runs[0].settings.get("split.block", "1"))
    if len(energies) < len(group.runs) or any(len(energy) != block**2 for energy in energies):
        return None
    mean = np.mean(energies, axis=0)
    mean[~(mean > 0)] = np.nan
    return None if np.isnan(mean).all() else 10 * np.log10(mean / np.nanmax(mean)).reshape(block, block)


def frequency_figure(groups: Sequence[Group]) -> Figure | None:
    """Heat maps of the groups with one band a branch: accuracies on the left, and energies beside if known.

    Each half has one scale. None if there is no such group.
    """
    accuracies = {group: grid for group in groups if (grid := accuracy_grid(group)) is not None}
    if not accuracies:
        return None
    energies = {group: grid for group in accuracies if (grid := energy_grid(group)) is not None}
    columns = min(len(accuracies), 2 if len(accuracies) <= 4 else 3)
    rows = math.ceil(len(accuracies) / columns)
    figure = Figure(figsize=(WIDTH, 1 + rows * (3.1, 2.1, 1.7)[columns - 1]), layout="constrained")
    ((left, right),) = figure.subfigures(1, 2, wspace=0.04, squeeze=False)
    draw_half(left, list(accuracies), accuracies, "viridis", "Top-1 of the branch (%)", columns)
    if energies:
        draw_half(right, list(accuracies), energies, "magma", "Energy of the band (dB of the strongest)", columns)
    return figure


def draw_half(
    figure: SubFigure, groups: Sequence[Group], grids: Mapping[Group, Grid], colors: str, label: str, columns: int
) -> None:
    """Heat maps of one quantity with their color bar; values are written into the cells of small grids.

    The place of a group without a grid stays empty.
    """
    panels = figure.subplots(math.ceil(len(groups) / columns), columns, squeeze=False)
    low, high = min(map(np.nanmin, grids.values())), max(map(np.nanmax, grids.values()))
    for axes, group in zip(panels.flat, groups, strict=False):
        if group not in grids:
            axes.set_axis_off()
            continue
        grid, side = grids[group], len(grids[group])
        sns.heatmap(
            grid,
            ax=axes,
            square=True,
            cbar=False,
            cmap=colors,
            vmin=low,
            vmax=high,
            linewidths=0.5,
            annot=side <= LARGEST_WRITTEN,
            fmt=".0f" if side * columns > 4 else ".1f",
            annot_kws={"size": min(9, 54 / (side * columns))},
        )
        x, y = AXES[group.runs[0].settings.get("split.transform", "dct2d")]
        axes.set(xlabel=x, ylabel=y)
        axes.set_title(group.title(60 // columns), size=8 if columns == 1 else 6.5)
        axes.tick_params(length=0, labelrotation=0)
        axes.locator_params(nbins=9)
    for axes in panels.flat[len(groups) :]:
        axes.set_axis_off()
    shades = ScalarMappable(Normalize(low, high), colors)
    bar = figure.colorbar(shades, ax=panels, location="bottom", label=label, aspect=30)
    bar.outline.set_visible(False)
