"""Accuracy and energy of single bands, each at its place in the block."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import seaborn as sns
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from bandsplit.reporting.figures import WIDTH
from bandsplit.reporting.runs import Group, Run

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


def is_validated(run: Run) -> bool:
    return not run.validation.empty


def has_energies(run: Run) -> bool:
    return run.branches is not None


def accuracy_grid(group: Group) -> Grid | None:
    """(s, s): mean top-1 in percent of the branch of each band at the last validation; NaN for bands of no branch.

    Of the runs that have one. None if branches read several bands, if there is one band, or if no run has a validation.
    """
    settings = group.runs[0].settings
    block = int(settings.get("split.block", "1"))
    if settings["split.branches"] != "each" or block == 1:
        return None
    last = [run.validation["branch_top1"].iloc[-1] for run in group.runs if is_validated(run)]
    bands = json.loads(settings["split.only"]) if "split.only" in settings else range(block**2)
    if not last or any(len(top1) != len(bands) for top1 in last):
        return None
    grid = np.full(block**2, np.nan)
    grid[list(bands)] = np.mean(last, axis=0)
    return grid.reshape(block, block)


def energy_grid(group: Group) -> Grid | None:
    """(s, s): mean square of each band in dB of that of the strongest; NaN where nothing is known or it is 0.

    Of the runs that know it. None where no run does, or none is above 0.
    """
    energies = [run.branches.energy for run in group.runs if run.branches is not None]
    block = int(group.runs[0].settings.get("split.block", "1"))
    if not energies or any(len(energy) != block**2 for energy in energies):
        return None
    mean = np.mean(energies, axis=0)
    mean[~(mean > 0)] = np.nan
    return None if np.isnan(mean).all() else 10 * np.log10(mean / np.nanmax(mean)).reshape(block, block)


def frequency_figure(groups: Sequence[Group]) -> Figure | None:
    """Heat maps of the groups with one band a branch: accuracies on the left, and energies beside if known.

    Each half has one scale. None if there is no such group.
    """
    drawn = [(group, grid) for group in groups if (grid := accuracy_grid(group)) is not None]
    if not drawn:
        return None
    accuracies = [(group.having(is_validated), grid) for group, grid in drawn]
    energies = [(group.having(has_energies), energy_grid(group)) for group, _ in drawn]
    columns = min(len(drawn), 2 if len(drawn) <= 4 else 3)
    rows = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(WIDTH, 1 + rows * (3.1, 2.1, 1.7)[columns - 1]), layout="constrained")
    ((left, right),) = figure.subfigures(1, 2, wspace=0.04, squeeze=False)
    draw_half(left, accuracies, "viridis", "Top-1 of the branch (%)", columns)
    if any(grid is not None for _, grid in energies):
        draw_half(right, energies, "magma", "Energy of the band (dB of the strongest)", columns)
    return figure


def left_out(groups: Sequence[Group]) -> list[str]:
    """What the figure lacks of the runs of its groups."""
    runs = [run for group in groups if accuracy_grid(group) is not None for run in group.runs]
    told = {"top-1": is_validated}
    if any(map(has_energies, runs)):
        told["energies"] = has_energies
    without = {what: [str(run.folder) for run in runs if not has(run)] for what, has in told.items()}
    return [f"{', '.join(folders)}, without {what}" for what, folders in without.items() if folders]


def draw_half(
    figure: SubFigure, grids: Sequence[tuple[Group, Grid | None]], colors: str, label: str, columns: int
) -> None:
    """Heat maps of one quantity with their color bar; values are written into the cells of small grids.

    The place of a group without a grid stays empty.
    """
    panels = figure.subplots(math.ceil(len(grids) / columns), columns, squeeze=False)
    known = [grid for _, grid in grids if grid is not None]
    low, high = min(map(np.nanmin, known)), max(map(np.nanmax, known))
    for axes, (group, grid) in zip(panels.flat, grids, strict=False):
        if grid is None:
            axes.set_axis_off()
            continue
        side = len(grid)
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
    for axes in panels.flat[len(grids) :]:
        axes.set_axis_off()
    shades = ScalarMappable(Normalize(low, high), colors)
    bar = figure.colorbar(shades, ax=panels, location="bottom", label=label, aspect=30)
    bar.outline.set_visible(False)
