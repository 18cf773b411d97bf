"""Figure of bench/controls.py: all arms against the best network on RGB, by time and by cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import seaborn as sns
from controls_arms import ACCUMULATED, BASELINE, FAMILIES, PIXELS, RGB, memory_of
from controls_curves import Correct, Curve, at_cpu_time, best_control, difference
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from bandsplit.reporting.figures import WIDTH
from bandsplit.training.memory import MIB

COLORS = dict(zip(FAMILIES, ("0.35", *sns.color_palette("colorblind", len(FAMILIES) - 1)), strict=True))

LOWEST = -9.0
"""Points below the best network on RGB: arms further below are at the edge, with their number."""

COSTS_HEIGHT, COSTS_BELOW = 2.6, 1.5
"""Of the panels of costs: inches, and points below the baseline that they show."""

APART = 0.3
"""Points by which an accuracy has to be above the last one for its name to be on the same side of its point."""


def draw(curves: Sequence[Curve], where: str) -> Figure:
    """Above: top-1 above the best network on RGB, a panel for each budget of several arms, and one at equal CPU time.

    Below, for the largest budget at which most arms were trained: top-1 by MACs of a prediction, and by memory of
    training. Of two fusions the better is shown. `where`: `timed_on` of the results.
    """
    base = next(curve for curve in curves if curve.label == BASELINE)
    counts = {budget: sum(budget in curve.budgets for curve in curves) for budget in base.budgets}
    most = max(budget for budget, count in counts.items() if 2 * count > max(counts.values()))
    budgets = [budget for budget, count in counts.items() if 4 * count > counts[most]]
    rising = sorted((c for c in curves if most in c.budgets and c.is_plain), key=lambda curve: curve.top1(most))
    shown = sorted({curve.arm: curve for curve in rising}.values(), key=lambda curve: curve.top1(most))
    panels = {
        f"{_minutes(base, budget)}\n{where}": {c: c.at(budget) for c in shown if budget in c.budgets}
        for budget in budgets
    }
    at = base.cpu_seconds[-1]
    by_cpu = {curve: correct for curve in shown if (correct := at_cpu_time(curve, at)) is not None}
    if len(by_cpu) > 1:
        panels[f"{at / 60:.1f} minutes of CPU\nwith decoding"] = by_cpu

    rows = 1.3 + 0.165 * len(shown)
    figure = Figure(figsize=(WIDTH, rows + COSTS_HEIGHT), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(rows, COSTS_HEIGHT))
    all_axes = above.subplots(1, len(panels), sharey=True, sharex=True, squeeze=False)[0]
    for axes, (title, results) in zip(all_axes, panels.items(), strict=True):
        _draw_time(axes, shown, results)
        axes.set_title(title, fontsize=9)
    all_axes[0].set_yticks(range(len(shown)), [curve.name for curve in shown], fontsize=7)
    all_axes[0].set_ylim(-0.7, len(shown) - 0.3)
    above.supxlabel("Top-1 above the best network on RGB (points)", fontsize=9)
    macs, memory = below.subplots(1, 2, sharey=True)
    named = [curve for curve in (base, best_control(curves, most)) if curve]
    _draw_cost(macs, [(curve.macs / 1e6, curve) for curve in shown], most, named)
    _draw_cost(memory, [(memory_of(curve.arm).total / MIB, curve) for curve in shown], most, named)
    memory.plot(memory_of(ACCUMULATED).total / MIB, base.top1(most), "x", markersize=4.5, color=COLORS[RGB])
    macs.set_ylim(bottom=base.top1(most) - COSTS_BELOW)
    macs.set_title(f"{_minutes(base, most)} {where}", fontsize=9)
    macs.set(xlabel="MACs of a prediction (millions)", ylabel="Top-1 (%)")
    memory.set(xlabel="Memory of a training step in float32 (MiB)")
    figure.legend(handles=_legend(), loc="outside lower center", ncols=3, fontsize=7, handlelength=1)
    return figure


def _minutes(base: Curve, budget: float) -> str:
    return f"{base.seconds[base.budgets.index(budget)] / 60:.1f} minutes"


def _draw_time(axes: Axes, shown: Sequence[Curve], results: dict[Curve, Correct]) -> None:
    best = max((curve for curve in results if curve.family == RGB), key=lambda curve: np.nanmean(results[curve]))
    for y, curve in enumerate(shown):
        if curve not in results:
            continue
        mean, (low, high) = difference(results[curve], results[best])
        if mean < LOWEST:
            axes.annotate(f"← {mean:.1f}".replace("-", "−"), (LOWEST, y), fontsize=6, va="center",
                          color=COLORS[curve.family])  # fmt: skip
            continue
        axes.plot([max(low, LOWEST), high], [y, y], color=COLORS[curve.family], linewidth=1)
        axes.plot(mean, y, **_marker(curve))
    axes.axvline(0, color="black", linewidth=0.8, zorder=0)
    axes.set_xlim(LOWEST - 0.3, 3)
    axes.grid(axis="y", visible=False)


def _draw_cost(axes: Axes, points: Sequence[tuple[float, Curve]], budget: float, named: Sequence[Curve]) -> None:
    """Accuracy by cost. The names of those that no other beats in both, costs taken to two digits, and of `named`."""
    best, costs, accuracies = 0.0, [], []
    for cost, curve in sorted(points, key=lambda point: (float(f"{point[0]:.1e}"), -point[1].top1(budget))):
        top1 = curve.top1(budget)
        axes.plot(cost, top1, **_marker(curve))
        name = partial(axes.annotate, curve.name, (cost, top1), textcoords="offset points", fontsize=6)
        if top1 > best + APART:
            name(xytext=(-4, 3), ha="right")
        elif top1 > best or curve in named:
            name(xytext=(5, -2))
        if top1 > best:
            best = top1
            costs.append(cost)
            accuracies.append(top1)
    costs.append(max(cost for cost, _ in points))
    axes.step(costs, [*accuracies, best], where="post", color="0.7", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.set_xlim(min(costs) / 30, 8 * max(costs))  # room for names
    axes.margins(y=0.1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _marker(curve: Curve) -> dict[str, Any]:
    color = COLORS[curve.family]
    face = "white" if curve.arm in (*FAMILIES[RGB], *PIXELS) else color
    return {"marker": "o", "markersize": 4.5, "linestyle": "none", "color": color, "markerfacecolor": face}


def _legend() -> list[Line2D]:
    families = [Line2D([], [], color=color, linewidth=3, label=family) for family, color in COLORS.items()]
    dot = partial(Line2D, [], [], markersize=4.5, linestyle="none", color="0.35")
    kinds = [dot(marker="o", label="frequencies"), dot(marker="o", markerfacecolor="white", label="pixels")]
    return [*families, *kinds, dot(marker="x", label="RGB 128, 4 accumulation steps")]
