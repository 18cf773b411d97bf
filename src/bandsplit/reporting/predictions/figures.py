"""Figures of saved predictions. Each is a figure, or the reason why these predictions have none."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bandsplit.models.fusion import MEAN
from bandsplit.reporting.figures import HEIGHT, WIDTH
from bandsplit.reporting.frequency import AXES
from bandsplit.reporting.predictions.results import Floats, Growth, Results
from bandsplit.statistics import BINS

Drawn = Figure | str
"""A figure, or why there is none."""

BLUE, ORANGE, GREEN, RED, *_ = sns.color_palette("colorblind")
MATRIX = 30
"""Classes up to which the confusion matrix is drawn."""
SHOWN = 20
"""Classes, or pairs of them, that are named."""
_HEAT = "cividis"  # also monotone in grey

ONE_BRANCH = "there is one branch"


def confusion(results: Results) -> Drawn:
    """The matrix of a few classes; of many, the pairs that are confused most often."""
    if len(results.classes) <= MATRIX:
        return _matrix(results)
    return _pairs(results)


def _matrix(results: Results) -> Figure:
    count, c = len(results.classes), results.confusions
    share = np.zeros((count, count))
    share[c.true, c.predicted] = c.images
    np.fill_diagonal(share, results.class_correct)
    with np.errstate(invalid="ignore"):
        share = 100 * share / results.class_images[:, None]
    side = min(WIDTH, 2.6 + 0.36 * count)
    figure = Figure(figsize=(side, 0.88 * side), layout="constrained")
    axes = figure.subplots()
    names = short_names(results, 22)
    sns.heatmap(
        share,
        ax=axes,
        cmap="Blues",
        vmin=0,
        vmax=100,
        square=True,
        annot=np.vectorize(_whole)(share) if count <= 20 else False,
        fmt="",
        annot_kws={"fontsize": 7 if count <= 12 else 5},
        xticklabels=names,
        yticklabels=names,
        linewidths=0.5,
        linecolor="white",
        cbar_kws={"label": "Images of the class (%)", "shrink": 0.7},
    )
    axes.set(xlabel="Predicted class", ylabel="True class")
    axes.tick_params(length=0, labelsize=8 if count <= 12 else 6)
    axes.tick_params(axis="x", rotation=90)
    axes.tick_params(axis="y", rotation=0)
    axes.grid(False)
    return figure


def _whole(share: float) -> str:
    """A percentage for a cell; nothing for 0 or no images."""
    return f"{share:.0f}" if share >= 0.5 else ""


def _pairs(results: Results) -> Drawn:
    c = results.confusions
    if not len(c.images):
        return "there are no mistakes"
    true, predicted, images = (part[:SHOWN] for part in (c.true, c.predicted, c.images))
    share = 100 * images / results.class_images[true]
    names = short_names(results, 24)
    figure, axes = _bars([f"{names[a]} → {names[b]}" for a, b in zip(true, predicted, strict=True)])
    axes.barh(range(len(share)), share, color=BLUE, height=0.7)
    _beside(axes, share, [f"{n} of {results.class_images[a]}" for n, a in zip(images, true, strict=True)])
    axes.set(
        xlabel="Images of the true class (%)", title=f"The {len(share)} most frequent confusions: true → predicted"
    )
    return figure


def classes(results: Results) -> Drawn:
    """Top-1 of the classes: all by name if they are few; otherwise the sorted curve, and the worst by name."""
    present = np.flatnonzero(results.class_images)
    order = present[np.lexsort((-results.class_images[present], results.class_top1[present]))]
    worst, top1 = order[:SHOWN], results.class_top1
    names, others = short_names(results, 24), short_names(results, 20)
    named = [names[c] for c in worst]
    figure, axes = _bars(named, panels=1 if len(order) <= SHOWN else 2)
    axes.barh(range(len(worst)), top1[worst], color=BLUE, height=0.7)
    _beside(axes, top1[worst], [_taken(results, others, c) for c in worst.tolist()])
    axes.set(xlabel="Top-1 accuracy (%)")
    line = f"dashed: {'the sample' if results.is_sample else 'all images'}, {results.fused.top1:.2f} %"
    axes.axvline(results.fused.top1, color="0.3", linewidth=0.9, linestyle=(0, (4, 2)), zorder=0)
    if len(order) <= SHOWN:
        axes.set(title=f"What each class is most often taken for; {line}")
        return figure
    axes.set(title=f"The worst {len(worst)}, and what they are taken for")
    left = figure.axes[0]
    left.plot(np.arange(1, len(order) + 1), top1[order], color=BLUE, linewidth=1.5)
    left.fill_between(np.arange(1, len(order) + 1), top1[order], color=BLUE, alpha=0.15, linewidth=0)
    left.axhline(results.fused.top1, color="0.3", linewidth=0.9, linestyle=(0, (4, 2)))
    left.set(xlabel="Classes, worst first", ylabel="Top-1 accuracy (%)", xlim=(1, len(order)), ylim=(0, 100))
    left.set_title(f"All classes; {line}")
    return figure


def _taken(results: Results, names: Sequence[str], c: int) -> str:
    if c not in results.taken_for:
        return ""
    other, times = results.taken_for[c]
    return f"{names[other]} ({times} of {results.class_images[c]})"


def calibration(results: Results) -> Drawn:
    """Reliability diagrams of the mean, of the mean with a fitted temperature, and of the fusion in use."""
    wanted = dict.fromkeys((MEAN, "temperature", results.predictions.fusion, "learned"))
    shown = [name for name in wanted if name in results.fusions][:3]
    figure = Figure(figsize=(WIDTH * (0.12 + 0.88 / 3 * len(shown)), 3.1), layout="constrained")
    grid = figure.subplots(2, len(shown), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 1))
    edges = np.linspace(0, 100, BINS + 1)
    for column, name in enumerate(shown):
        images, correct, _ = results.fusions[name].bins.T
        upper, lower = grid[:, column]
        width, full = 0.9 * 100 / BINS, images > 0
        middles = (edges[:-1] + edges[1:])[full] / 2
        upper.bar(middles, 100 * correct[full] / images[full], width, color=BLUE)
        upper.plot([0, 100], [0, 100], color="0.3", linewidth=0.9, linestyle=(0, (4, 2)))
        title = name if len(results.branches) > 1 else "one branch"
        upper.set(xlim=(0, 100), ylim=(0, 100), title=f"{title}: ECE {results.fusions[name].ece:.2f} %")
        lower.bar(middles, 100 * images[full] / images.sum(), width, color="0.55")
        lower.set(xlabel="Confidence (%)", ylim=(0, None))
    grid[0, 0].set(ylabel="Accuracy (%)")
    grid[1, 0].set(ylabel="Images (%)")
    return figure


def fusions(results: Results) -> Drawn:
    """Top-1 of every fusion, and how much it is above that of the mean, with its interval."""
    if len(results.fusions) == 1:
        return "no fusion was fitted"
    names = list(results.fusions)
    figure = Figure(figsize=(WIDTH, 0.9 + 0.28 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(names))
    for place, each in zip(places, results.fusions.values(), strict=True):
        left.plot(each.top1, place, "o", color=BLUE, markersize=5)
        left.annotate(f"{each.top1:.2f}", (each.top1, place), (6, 0), textcoords="offset points", va="center", size=7.5)
        low, high = each.gain_interval
        right.plot([low, high], [place, place], color=BLUE, linewidth=1.6, solid_capstyle="butt")
        right.plot(each.gain, place, "o", color=BLUE, markersize=5)
    right.axvline(0, color="0.3", linewidth=0.9, linestyle=(0, (4, 2)), zorder=0)
    left.set_yticks(places, [f"{name} (in use)" if name == results.predictions.fusion else name for name in names])
    left.set(xlabel="Top-1 accuracy (%)", ylim=(len(names) - 0.4, -0.6))
    left.margins(x=0.25)
    right.set(xlabel="Top-1 above the mean (points), 95 % interval")
    right.tick_params(axis="y", length=0)
    return figure


def weights(results: Results) -> Drawn:
    """Weights of the branches by every fusion that does not treat them alike, as parts of their sum."""
    fitted = _unequal(results)
    if not fitted:
        return ONE_BRANCH if len(results.branches) == 1 else "no fusion with different weights was fitted"
    count = len(results.branches)
    figure = Figure(figsize=(min(WIDTH, 2.2 + 0.3 * count), 0.35 + 1.35 * len(fitted)), layout="constrained")
    rows = figure.subplots(len(fitted), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, values) in zip(rows, fitted.items(), strict=True):
        axes.bar(range(count), values, color=BLUE, width=0.75)
        axes.axhline(1 / count, color="0.3", linewidth=0.9, linestyle=(0, (4, 2)))
        dropped = int((values == 0).sum())
        axes.set(ylabel="Weight / sum", title=name + f": {dropped} of {count} branches have weight 0" * bool(dropped))
        axes.grid(False, axis="x")
    rows[-1].set_xticks(range(count), _branch_ticks(results))
    rows[-1].set(xlabel=("Band" if results.grid else "Branch") + "; dashed: equal weights", xlim=(-0.6, count - 0.4))
    return figure


def _unequal(results: Results) -> dict[str, Floats]:
    """Normalized weights of the fusions whose weights differ."""
    given = {name: np.array(w) for name, w in results.predictions.fusions.items() if len(set(w)) > 1}
    return {name: w / w.sum() for name, w in given.items()}


def _branch_ticks(results: Results) -> list[str]:
    """Band numbers where each branch has one, else numbers of branches; thinned out where they are many."""
    numbers: Sequence[int] = results.grid or range(len(results.branches))
    step = max(1, len(numbers) // 24)
    return [str(number) if place % step == 0 else "" for place, number in enumerate(numbers)]


def growth(results: Results) -> Drawn:
    """Top-1 against the number of branches, in several orders."""
    if len(results.branches) == 1:
        return ONE_BRANCH
    if not results.growth:
        return "the file has no logits of the branches"
    figure = Figure(figsize=(WIDTH * 0.72, HEIGHT + 0.9), layout="constrained")
    axes = figure.subplots()
    styles = zip((BLUE, ORANGE, GREEN), ("-", (0, (5, 1.5)), (0, (1.5, 1))), "osD", strict=True)
    for curve, (color, line, marker) in zip(results.growth, styles, strict=False):
        _grow(axes, curve, color=color, linestyle=line, marker=marker)
    count = len(results.branches)
    axes.set(xlabel="Branches", ylabel="Top-1 accuracy (%)", xlim=(1 - 0.02 * count, count * 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(min(count, 9), integer=True, min_n_ticks=1))
    figure.legend(loc="outside lower center", handlelength=3)
    return figure


def _grow(axes: Axes, curve: Growth, **style: Any) -> None:
    x = np.arange(1, len(curve.top1) + 1)
    axes.plot(x, curve.top1, label=curve.label, linewidth=1.4, markersize=3.5, **style)


def bands(results: Results) -> Drawn:
    """Accuracy and fitted weights by band, at its place in the block."""
    if results.grid is None:
        return "not every branch reads one band of its own"
    side, numbers = results.predictions.block, results.grid
    panels = {"Top-1 (%)": (results.branch_top[:, 0], ".1f" if side <= 4 else ".0f")}
    for name, values in _unequal(results).items():
        panels[f"Weight / sum, {name}"] = (values, ".2f")
    figure = Figure(figsize=(min(WIDTH, 0.4 + 2.2 * len(panels)), 2.5), layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    horizontal, vertical = AXES[results.predictions.transform]
    for number, (axes, (title, (values, form))) in enumerate(zip(row, panels.items(), strict=True)):
        table = np.full(side * side, np.nan)
        table[numbers] = values
        sns.heatmap(
            table.reshape(side, side),
            ax=axes,
            cmap=_HEAT,
            square=True,
            annot=side <= 8,
            fmt=form,
            annot_kws={"fontsize": 8 if side <= 4 else 5},
            linewidths=0.5,
            linecolor="white",
            cbar_kws={"shrink": 0.75},
        )
        axes.set(title=title, xlabel=horizontal, ylabel=vertical if number == 0 else "")
        axes.tick_params(length=0, rotation=0)
        axes.grid(False)
    return figure


def short(name: str, width: int) -> str:
    """At most `width` characters, cut between words where there are some."""
    if len(name) <= width:
        return name
    cut = textwrap.shorten(name, width, placeholder="…")
    return cut.replace(",…", "…") if len(cut) > 1 else name[: width - 1] + "…"


def short_names(results: Results, width: int) -> list[str]:
    """Names of the classes, by `short`; those that would look alike are cut in the middle."""
    cut = [short(name, width) for name in results.classes]
    times, end = Counter(cut), width // 2
    return [
        text if times[text] == 1 else f"{name[: width - end - 1].rstrip(' ,')}…{name[-end:].lstrip(' ,')}"
        for text, name in zip(cut, results.classes, strict=True)
    ]


def _bars(labels: Sequence[str], panels: int = 1) -> tuple[Figure, Axes]:
    """A figure for horizontal bars with these labels, in its last panel, the first on top."""
    figure = Figure(figsize=(WIDTH, max(HEIGHT, 0.7 + 0.19 * len(labels))), layout="constrained")
    axes: Axes = figure.subplots(1, panels, squeeze=False, width_ratios=(1, 1.15)[-panels:])[0, -1]
    axes.set_yticks(range(len(labels)), labels)
    axes.set(ylim=(len(labels) - 0.4, -0.6), xlim=(0, 100))
    axes.tick_params(axis="y", length=0, labelsize=7)
    axes.grid(False, axis="y")
    return figure, axes


def _beside(axes: Axes, lengths: Floats, texts: Sequence[str]) -> None:
    """A text at the end of each bar: after it, or inside where there is no room."""
    for place, (length, text) in enumerate(zip(lengths, texts, strict=True)):
        inside = length > 55
        axes.annotate(
            text,
            (length, place),
            (-3 if inside else 3, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            size=6.5,
            color="white" if inside else "0.2",
            bbox=None if inside else {"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )


FIGURES: dict[str, Callable[[Results], Drawn]] = {
    "fusions": fusions,
    "weights": weights,
    "bands": bands,
    "growth": growth,
    "calibration": calibration,
    "classes": classes,
    "confusion": confusion,
}
