"""Figure and tables of bench/controls.py, from the results of its runs alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from bandsplit.errors import UserError
from bandsplit.reporting.compare import difference_over_images
from bandsplit.reporting.figures import STYLE, WIDTH

BASELINE = "rgb128"
DRAWS = 500
"""Of the bootstrap of times."""

Correct = npt.NDArray[np.float64]

FAMILIES = {
    "one network on RGB": ("rgb128", "rgb128_growing", "rgb128_thin", "rgb128_deep", "rgb80", "rgb64"),
    "all bands as channels": (
        "coarse2", "coarse2_identity", "coarse2_random", "coarse2_half", "coarse2_unit", "coarse2_random_unit",
        "coarse2_deep", "coarse2_growing", "coarse2_distilled", "coarse8",
    ),
    "ensembles": (
        "each_dct2d", "each_dct1d", "each_identity", "each_distilled", "overlap", "low_wide", "coarse2_x2",
        "coarse2_x4", "rgb64_x4",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """A way to use an arm, at every budget at which it was trained in as many folds as the baseline."""

    arm: str
    label: str
    seconds: list[float]
    """By budget: of training, mean over the runs."""
    budgets: list[float]
    correct: list[Correct]
    """By budget: (images,), share of the seeds that classify each image correctly; NaN where it was in no fold."""
    runs: list[int]


def report(work: Path) -> None:
    """Writes figure and tables into WORK/report. Raises UserError if the baseline has no results."""
    curves = read(work)
    if not any(curve.arm == BASELINE for curve in curves):
        raise UserError(f"{work / 'results'}: no results of {BASELINE}, with which all are compared")
    folder = work / "report"
    folder.mkdir(exist_ok=True)
    frame = table(curves)
    frame.to_csv(folder / "controls.csv", index=False)
    text = markdown(frame)
    (folder / "controls.md").write_text(text, encoding="utf-8")
    with mpl.rc_context(STYLE):
        figure = draw(curves)
        for suffix in ("png", "svg", "pdf"):
            figure.savefig(folder / f"controls.{suffix}")
    print(text)


def read(work: Path) -> list[Curve]:
    images = len(pd.read_csv(work / "images.csv"))
    found: dict[tuple[str, str], dict[float, list[tuple[float, str, Correct]]]] = {}
    for path in sorted((work / "results").glob("*.json")):
        run = json.loads(path.read_text())
        if run["fold"] == "lr":
            continue
        out = out_of_fold(work, run["fold"], images)
        for variant, evaluation in run["evaluations"].items():
            for fusion, scores in evaluation["fusions"].items():
                if fusion not in ("mean", "learned"):
                    continue
                several = len(evaluation["branch_top1"]) > 1
                label = " ".join(filter(None, [run["arm"], variant, f"({fusion})" if several else ""]))
                correct = np.where(out, 0.0, np.nan)
                correct[scores["correct"]] = 1.0
                runs = found.setdefault((run["arm"], label), {}).setdefault(run["budget"], [])
                runs.append((run["seconds"], run["fold"], correct))
    return [curve_of(arm, label, budgets) for (arm, label), budgets in found.items()]


def out_of_fold(work: Path, fold: str, images: int) -> npt.NDArray[np.bool_]:
    """(images,), which are the validation images of a fold."""
    return np.asarray(pd.read_csv(work / "images.csv")["fold"].to_numpy() == int(fold)).reshape(images)


def curve_of(arm: str, label: str, budgets: dict[float, list[tuple[float, str, Correct]]]) -> Curve:
    order = sorted(budgets)
    correct = []
    for budget in order:
        stack = np.stack([each for _, _, each in budgets[budget]])
        count = (~np.isnan(stack)).sum(0)
        correct.append(np.where(count > 0, np.nansum(stack, 0) / np.maximum(count, 1), np.nan))
    seconds = [float(np.mean([s for s, _, _ in budgets[budget]])) for budget in order]
    return Curve(arm, label, seconds, order, correct, [len(budgets[budget]) for budget in order])


def difference(a: Correct, b: Correct) -> tuple[float, tuple[float, float]]:
    """Accuracy of a above b in points, on the images of both, and its 95 % interval by a paired bootstrap."""
    both = ~np.isnan(a) & ~np.isnan(b)
    mean, (low, high) = difference_over_images(a[both], b[both])
    return 100 * mean, (100 * low, 100 * high)


def time_to(seconds: Sequence[float], top1: Sequence[float], target: float) -> float:
    """Seconds in which a curve reaches an accuracy, linear in log time between budgets.

    Its first time where it is above at once, infinity where it does not get there.
    """
    if top1[0] >= target:
        return seconds[0]
    points = list(zip(np.log(seconds), top1, strict=True))
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 >= target:
            return float(np.exp(x0 + (x1 - x0) * (target - y0) / (y1 - y0)))
    return math.inf


def time_ratio(curve: Curve, base: Curve, budget: float) -> tuple[float, float, float]:
    """Time to reach what the baseline reaches at a budget, to the baseline's time, and its 95 % interval.

    The horizontal distance of two accuracy-time curves; the bootstrap draws the images that both were evaluated on.
    """
    n = base.budgets.index(budget)
    seen = ~np.isnan(np.stack([*curve.correct, base.correct[n]])).any(0)
    own, target = np.stack(curve.correct)[:, seen], base.correct[n][seen]
    rng, ratios = np.random.default_rng(0), []
    for draw in range(DRAWS):
        rows = rng.integers(0, own.shape[1], own.shape[1]) if draw else slice(None)
        reached = time_to(curve.seconds, own[:, rows].mean(1).tolist(), float(target[rows].mean()))
        ratios.append(reached / base.seconds[n])
    low, high = np.percentile(ratios[1:], [2.5, 97.5], method="nearest")
    return ratios[0], float(low), float(high)


def table(curves: Sequence[Curve]) -> pd.DataFrame:
    """One row for each way and budget; `top1_above` is against the baseline at the same budget."""
    base = next(curve for curve in curves if curve.arm == BASELINE)
    rows = []
    for curve in curves:
        for n, budget in enumerate(curve.budgets):
            row = {
                "arm": curve.label,
                "budget": budget,
                "seconds": curve.seconds[n],
                "runs": curve.runs[n],
                "images": int((~np.isnan(curve.correct[n])).sum()),
                "top1": 100 * float(np.nanmean(curve.correct[n])),
            }
            if budget in base.budgets:
                mean, (low, high) = difference(curve.correct[n], base.correct[base.budgets.index(budget)])
                row |= {"top1_above": mean, "low": low, "high": high}
                names = ("time_ratio", "time_low", "time_high")
                row |= dict(zip(names, time_ratio(curve, base, budget), strict=True))
            rows.append(row)
    return pd.DataFrame(rows)


def markdown(frame: pd.DataFrame) -> str:
    """The table by budget, best first."""
    parts = []
    for budget, rows in frame.groupby("budget"):
        rows = rows.sort_values("top1", ascending=False)
        lines = [
            f"Budget {budget:g}: {rows['seconds'].median() / 60:.1f} minutes of one thread",
            "",
            f"| arm | runs | images | top-1 | above {BASELINE} (95 %) | time to its accuracy, to its time (95 %) |",
            "|---|--:|--:|--:|--:|--:|",
        ]
        for row in rows.itertuples():
            above = "" if np.isnan(row.top1_above) else f"{row.top1_above:+.2f} ({row.low:+.2f} to {row.high:+.2f})"
            time = (
                "" if np.isnan(row.time_ratio) else f"{row.time_ratio:.2f} ({row.time_low:.2f} to {row.time_high:.2f})"
            )
            time = time.replace("inf", "not reached")
            lines.append(f"| {row.arm} | {row.runs} | {row.images:,} | {row.top1:.2f} | {above} | {time} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def draw(curves: Sequence[Curve]) -> Figure:
    """Top-1 against training time, one panel for each family, the baseline in all."""
    base = next(curve for curve in curves if curve.arm == BASELINE)
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    panels = figure.subplots(1, len(FAMILIES), sharey=True)
    for axes, (family, arms) in zip(panels, FAMILIES.items(), strict=True):
        members = [curve for curve in curves if curve.arm in arms and curve is not base]
        palette = sns.color_palette("colorblind", max(len(members), 1))
        for curve, color, marker in zip(members, palette, "osD^vP*Xhd<>" * 3, strict=False):
            top1 = [100 * float(np.nanmean(each)) for each in curve.correct]
            minutes = np.array(curve.seconds) / 60
            axes.plot(minutes, top1, color=color, marker=marker, markersize=4, linewidth=1, label=curve.label)
        top1 = [100 * float(np.nanmean(each)) for each in base.correct]
        axes.plot(np.array(base.seconds) / 60, top1, color="black", linewidth=2, marker="o", label=BASELINE)
        axes.set(xscale="log", title=family, xlabel="Training time (min, one thread)")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.legend(fontsize=5.5, loc="lower right", handlelength=1.5)
    panels[0].set_ylabel("Top-1 accuracy (%)")
    return figure
