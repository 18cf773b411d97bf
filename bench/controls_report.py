"""Figures and tables of bench/controls.py, from the results of its runs alone, and these in one file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn as sns
from controls_arms import (
    ACCUMULATED,
    BASELINE,
    CASCADES,
    FAMILIES,
    PIXELS,
    RGB,
    TEACHER_LR,
    TEACHERS,
    Times,
    macs_of,
    memory_of,
    parameters_of,
    seconds_of,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from bandsplit.errors import UserError
from bandsplit.reporting.compare import difference_over_images
from bandsplit.reporting.figures import STYLE, WIDTH
from bandsplit.runs.files import reading, replace_text
from bandsplit.training.memory import MIB

TIMES, CPU_TIMES, IMAGES = "times.json", "cpu_times.json", "images.json"
"""In a work folder: what a step of each arm takes, and the digest of the images."""
IMAGES_KEY = Path(IMAGES).stem

DRAWS = 500
"""Of the bootstrap of times."""

COSTS_HEIGHT = 2.6
"""Of the panels of costs, in inches."""

COLORS = dict(zip(FAMILIES, ("0.35", *sns.color_palette("colorblind", len(FAMILIES) - 1)), strict=True))

Correct = npt.NDArray[np.float64]

LOSS = 0.5
"""Points of accuracy that a cascade may lose on the images for which its threshold is chosen."""

RUN_COLUMNS = ("arm", "fold", "budget", "lr", "seed", "epochs", "steps", "seconds")
SCORE_COLUMNS = ("weights", "top1", "loss", "correct", "confidence")


@dataclass(frozen=True)
class Curve:
    """A way to use an arm, at every budget at which it was trained in the folds of the baseline."""

    arm: str
    label: str
    variant: str
    """A further evaluation of the same runs, such as "at 104"; else empty."""
    seconds: list[float]
    """By budget: of training, mean over the runs."""
    cpu_seconds: list[float]
    """The same of CPU time, with that of preparing images; NaN where it was not measured."""
    budgets: list[float]
    correct: list[Correct]
    """By budget: (images,), share of the seeds that classify each image correctly; NaN where it was in no fold."""
    runs: list[int]

    def at(self, budget: float) -> Correct:
        return self.correct[self.budgets.index(budget)]

    def top1(self, budget: float) -> float:
        """In percent."""
        return 100 * float(np.nanmean(self.at(budget)))

    @property
    def family(self) -> str:
        return next(family for family, arms in FAMILIES.items() if self.arm in arms)

    @property
    def name(self) -> str:
        """In the figure."""
        return FAMILIES[self.family][self.arm] + self.label.removeprefix(self.arm).replace(" (", ", ").rstrip(")")

    @property
    def macs(self) -> int:
        """Of a prediction."""
        return macs_of(self.arm, variant=self.variant)


def report(work: Path) -> None:
    """Writes figure, tables and results into WORK/report. Raises UserError if the baseline has no results."""
    results = collected(work)
    curves = read(results) if len(results) else []
    if not any(curve.arm == BASELINE for curve in curves):
        raise UserError(f"{work / 'results'}: no results of {BASELINE}, with which all are compared")
    folder = work / "report"
    folder.mkdir(exist_ok=True)
    results.to_parquet(folder / "controls.parquet", compression="zstd", index=False)
    frame = table(curves)
    frame.to_csv(folder / "controls.csv", index=False)
    text = markdown(frame) + by_cpu_time(curves) + not_continued(curves) + cascades(chosen(results))
    text += costs(results.attrs.get("times", {}), results.attrs.get("cpu_times", {}))
    (folder / "controls.md").write_text(text, encoding="utf-8")
    with mpl.rc_context(STYLE):
        figure = draw(curves)
        for suffix in ("png", "svg", "pdf"):
            figure.savefig(folder / f"controls.{suffix}")
    print(text)


def collected(work: Path) -> pd.DataFrame:
    """All results, a row for each fusion of each evaluation of each run; times and digest of the images in `attrs`."""
    rows = []
    for path in sorted((work / "results").glob("*.json")):
        run = json.loads(path.read_text())
        about = {key: value for key, value in run.items() if key != "evaluations"}
        for variant, evaluation in run["evaluations"].items():
            shared = {"variant": variant, "branch_top1": evaluation["branch_top1"], "image": evaluation["images"]}
            for fusion, scores in evaluation["fusions"].items():
                rows.append({"file": path.name, **about, **shared, "fusion": fusion, **scores})
    frame = pd.DataFrame(rows)
    for file in (TIMES, CPU_TIMES, IMAGES):
        if (work / file).exists():
            frame.attrs[Path(file).stem] = json.loads((work / file).read_text())
    return frame


def unpack(file: Path, work: Path) -> None:
    """Writes the results and times of a report into WORK where they are missing there.

    Raises UserError if the images of WORK are not those of the report.
    """
    with reading(file):
        frame = pd.read_parquet(file)
    (work / "results").mkdir(parents=True, exist_ok=True)
    if IMAGES_KEY in frame.attrs:
        require_images(work, frame.attrs[IMAGES_KEY])
    for name in (TIMES, CPU_TIMES):
        if Path(name).stem in frame.attrs and not (work / name).exists():
            (work / name).write_text(json.dumps(frame.attrs[Path(name).stem], indent=2) + "\n")
    for name, rows in frame.groupby("file"):
        path = work / "results" / str(name)
        if path.exists():
            continue
        first = rows.iloc[0]
        run: dict[str, Any] = {key: first[key] for key in RUN_COLUMNS} | {"evaluations": {}}
        for row in rows.itertuples():
            shared = {"images": row.image, "branch_top1": row.branch_top1, "fusions": {}}
            evaluation = run["evaluations"].setdefault(row.variant, shared)
            evaluation["fusions"][row.fusion] = {key: getattr(row, key) for key in SCORE_COLUMNS}
        replace_text(path, json.dumps(run, default=lambda value: value.tolist()) + "\n")


def require_images(work: Path, digest: str) -> None:
    """Notes the images of WORK by their digest. Raises UserError if it has noted others."""
    path = work / IMAGES
    if not path.exists():
        path.write_text(json.dumps(digest) + "\n")
    elif json.loads(path.read_text()) != digest:
        raise UserError(f"{work}: its results are those of other images; use another --work")


def chosen(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs with the learning rate of their arm, of arms and budgets with all folds and seeds of the baseline.

    So without those that only served as teachers, and without what has only begun.
    """
    tried = frame[(frame["fold"] == "lr") & (frame["budget"] == 0.5) & (frame["variant"] == "")]
    tried = tried[tried["fusion"] == "mean"]
    best = tried.sort_values(["top1", "lr"], ascending=[False, True]).groupby("arm")["lr"].first()
    rate = frame["arm"].map(best)
    rows = frame[(frame["fold"] != "lr") & (rate.isna() | (rate == frame["lr"]))]
    groups = rows.groupby(["arm", "budget"])
    folds = {key: set(zip(group["fold"], group["seed"], strict=True)) for key, group in groups}
    keys = zip(rows["arm"], rows["budget"], strict=True)
    return rows[[folds[arm, budget] == folds.get((BASELINE, budget)) for arm, budget in keys]]


def read(frame: pd.DataFrame) -> list[Curve]:
    """The curves of all arms, from what `collected` returns."""
    images = 1 + max(max(numbers) for numbers in frame["image"])
    found: dict[tuple[str, str, str], dict[float, list[tuple[float, float, Correct]]]] = {}
    for run in chosen(frame).itertuples():
        if run.fusion not in ("mean", "learned"):
            continue
        several = len(run.branch_top1) > 1
        label = " ".join(filter(None, [run.arm, run.variant, f"({run.fusion})" if several else ""]))
        correct = np.full(images, np.nan)
        correct[run.image] = run.correct
        budgets = found.setdefault((run.arm, label, run.variant), {})
        budgets.setdefault(run.budget, []).append((run.seconds, cpu_seconds_of(run, frame), correct))
    return [curve_of(*names, budgets) for names, budgets in found.items()]


def cpu_seconds_of(run: Any, frame: pd.DataFrame) -> float:
    """CPU time of a run, with its teacher's; NaN where it was not measured."""
    times = frame.attrs.get("cpu_times", {})
    if run.arm not in times:
        return math.nan
    own = seconds_of(run.arm, run.epochs, run.steps // run.epochs, times)
    if run.arm not in TEACHERS:
        return own
    same = (frame["fold"] == run.fold) & (frame["seed"] == run.seed) & (frame["budget"] == run.budget / 2)
    teachers = frame[same & (frame["arm"] == TEACHERS[run.arm]) & (frame["lr"] == TEACHER_LR)]
    return own + next((cpu_seconds_of(teacher, frame) for teacher in teachers.itertuples()), math.nan)


def curve_of(arm: str, label: str, variant: str, budgets: dict[float, list[tuple[float, float, Correct]]]) -> Curve:
    order = sorted(budgets)
    correct = []
    for budget in order:
        stack = np.stack([each for _, _, each in budgets[budget]])
        count = (~np.isnan(stack)).sum(0)
        correct.append(np.where(count > 0, np.nansum(stack, 0) / np.maximum(count, 1), np.nan))
    seconds, cpu_seconds = ([float(np.mean([run[n] for run in budgets[budget]])) for budget in order] for n in (0, 1))
    return Curve(arm, label, variant, seconds, cpu_seconds, order, correct, [len(budgets[b]) for b in order])


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


def best_control(curves: Sequence[Curve], budget: float) -> Curve | None:
    """The most accurate of the networks on RGB at a budget; none where the baseline was not trained."""
    controls = [curve for curve in curves if curve.arm in FAMILIES[RGB] and budget in curve.budgets]
    if not any(curve.arm == BASELINE for curve in controls):
        return None
    return max(controls, key=lambda curve: curve.top1(budget))


def table(curves: Sequence[Curve]) -> pd.DataFrame:
    """One row for each way and budget.

    `mmacs` are those of a prediction, `memory_mib` that of a step of training. `top1_above` is against the baseline at
    the same budget, `control_above` against the best network on RGB, which is chosen by the same images and so looks a
    little better than it is. A time that is `time_first`, that of the smallest budget of the arm, is an upper bound.
    """
    base = next(curve for curve in curves if curve.arm == BASELINE)
    controls = {budget: best_control(curves, budget) for budget in {b for curve in curves for b in curve.budgets}}
    rows = []
    for curve in curves:
        for n, budget in enumerate(curve.budgets):
            row = {
                "arm": curve.label,
                "budget": budget,
                "seconds": curve.seconds[n],
                "runs": curve.runs[n],
                "images": int((~np.isnan(curve.correct[n])).sum()),
                "mmacs": curve.macs / 1e6,
                "memory_mib": memory_of(curve.arm).total / MIB,
                "top1": curve.top1(budget),
            }
            if control := controls[budget]:
                mean, (low, high) = difference(curve.correct[n], base.at(budget))
                row |= {"top1_above": mean, "low": low, "high": high}
                mean, (low, high) = difference(curve.correct[n], control.at(budget))
                row |= {"control": control.label, "control_above": mean, "control_low": low, "control_high": high}
                names = ("time_ratio", "time_low", "time_high")
                row |= dict(zip(names, time_ratio(curve, base, budget), strict=True))
                row["time_first"] = curve.seconds[0] / base.seconds[base.budgets.index(budget)]
            rows.append(row)
    return pd.DataFrame(rows)


def markdown(frame: pd.DataFrame) -> str:
    """The table by budget, best first."""
    parts = []
    for budget, rows in frame.groupby("budget"):
        rows = rows.sort_values("top1", ascending=False)
        control = rows["control"].dropna().unique()
        lines = [
            f"Budget {budget:g}: {rows['seconds'].median() / 60:.1f} minutes of one thread",
            "",
            f"| arm | runs | images | MMACs | MiB | top-1 | above {BASELINE} (95 %) | "
            f"above {'/'.join(control) or 'the best on RGB'} (95 %) | "
            "time to the baseline's accuracy, to its time (95 %) |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for row in rows.itertuples():
            above, above_control = (
                "" if np.isnan(mean) else f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
                for mean, low, high in (
                    (row.top1_above, row.low, row.high),
                    (row.control_above, row.control_low, row.control_high),
                )
            )
            time, low, high = (
                "not reached" if math.isinf(ratio) else f"{'≤ ' * (ratio <= row.time_first)}{ratio:.2f}"
                for ratio in (row.time_ratio, row.time_low, row.time_high)
            )
            times = "" if np.isnan(row.time_ratio) else f"{time} ({low} to {high})"
            costs = f"{row.mmacs:.0f}", f"{row.memory_mib:.0f}"
            cells = row.arm, row.runs, f"{row.images:,}", *costs, f"{row.top1:.2f}", above, above_control, times
            lines.append(f"| {' | '.join(map(str, cells))} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def by_cpu_time(curves: Sequence[Curve]) -> str:
    """Table of what counts the CPU time of decoding too: accuracies at the largest CPU time of the baseline.

    Budgets are of wall-clock time, in which images are prepared on another core. Accuracies are linear in the logarithm
    of time between budgets.
    """
    base = next(curve for curve in curves if curve.arm == BASELINE)
    at, target = base.cpu_seconds[-1], base.top1(base.budgets[-1])
    found = [(curve, correct) for curve in curves if (correct := at_cpu_time(curve, at)) is not None]
    if len(found) < 2:
        return ""
    found.sort(key=lambda each: -float(np.nanmean(each[1])))
    control, best = next((curve, correct) for curve, correct in found if curve.family == RGB)
    lines = [
        "",
        f"| arm | CPU minutes | top-1 at {at / 60:.1f} | above {BASELINE} (95 %) | above {control.label} (95 %) "
        "| time to the baseline's accuracy, to its time |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for curve, correct in found:
        time = time_to(curve.cpu_seconds, [curve.top1(budget) for budget in curve.budgets], target)
        ratio = "not reached" if math.isinf(time) else f"{'≤ ' * (time <= curve.cpu_seconds[0])}{time / at:.2f}"
        cells = [curve.label, " / ".join(f"{each / 60:.1f}" for each in curve.cpu_seconds)]
        cells.append(f"{100 * np.nanmean(correct):.2f}")
        for other in (base.correct[-1], best):
            mean, (low, high) = difference(correct, other)
            cells.append(f"{mean:+.2f} ({low:+.2f} to {high:+.2f})")
        lines.append(f"| {' | '.join([*cells, ratio])} |")
    return "\n".join(lines) + "\n"


def at_cpu_time(curve: Curve, seconds: float) -> Correct | None:
    """Share of correct answers for each image at a CPU time between two budgets, or within 1 % of one; else None."""
    times = curve.cpu_seconds
    if len(times) < 2 or not 0.99 * times[0] <= seconds <= 1.01 * times[-1]:
        return None
    seconds = min(max(seconds, times[0]), times[-1])
    n = max(n for n in range(len(times) - 1) if times[n] <= seconds)
    share = math.log(seconds / times[n]) / math.log(times[n + 1] / times[n])
    between: Correct = (1 - share) * curve.correct[n] + share * curve.correct[n + 1]
    return between


def not_continued(curves: Sequence[Curve], budgets: Sequence[float] = (1.0, 2.0)) -> str:
    """Table of the ways that are left out after these budgets, each with one that is better at all of them.

    The better one takes no more multiplications for a prediction, and the intervals of its advantage do not contain 0.
    The baseline, with which all are compared, is never left out.
    """
    both = [curve for curve in curves if set(budgets) <= set(curve.budgets) and not curve.variant]
    both.sort(key=lambda curve: -curve.top1(budgets[-1]))
    titles = [f"above at {budget:g} (95 %)" for budget in budgets]
    lines = ["", f"| not continued | since | {' | '.join(titles)} |", f"|---|---|{'--:|' * len(budgets)}"]
    for curve in both:
        if curve.arm == BASELINE:
            continue
        for other in (each for each in both if each.arm != curve.arm and each.macs <= curve.macs):
            if any(other.top1(budget) <= curve.top1(budget) for budget in budgets):
                continue  # no need of the bootstrap
            found = [difference(other.at(budget), curve.at(budget)) for budget in budgets]
            if all(low > 0 for _, (low, _) in found):
                cells = [f"{mean:+.2f} ({low:+.2f} to {high:+.2f})" for mean, (low, high) in found]
                lines.append(f"| {curve.label} | {other.label} | {' | '.join(cells)} |")
                break
    return "\n".join(lines) + "\n" if len(lines) > 3 else ""


def cascades(frame: pd.DataFrame) -> str:
    """Table of CASCADES: accuracy and multiplications against those of the second alone.

    The threshold is chosen on half of the images of a fold and used on the other half, both ways.
    """
    lines = [
        "",
        "| cascade | budget | images | top-1 | above the second (95 %) | second asked | multiplications (second: 1) |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    frame = frame[frame["variant"] == ""]
    keys = ["fold", "budget", "seed"]
    for (one, one_fusion), (two, two_fusion) in CASCADES:
        firsts = frame[(frame["arm"] == one) & (frame["fusion"] == one_fusion)]
        seconds = frame[(frame["arm"] == two) & (frame["fusion"] == two_fusion)]
        pairs = firsts.merge(seconds, on=keys, suffixes=("", "_2"))
        own, alone = (macs_of(arm, fusion) for arm, fusion in ((one, one_fusion), (two, two_fusion)))
        if one == two:
            alone = max(alone, own)
        for budget, runs in pairs.groupby("budget"):
            found = [halves(run, LOSS / 100) for run in runs.itertuples()]
            right, other, passed = (np.concatenate(each) for each in zip(*found, strict=True))
            mean, (low, high) = difference_over_images(right, other)
            rest = alone - own if one == two else alone
            cost = (own + passed.mean() * rest) / alone
            name = f"{one}{f' ({one_fusion})' if one == two else ''} → {two}"
            lines.append(
                f"| {name} | {budget:g} | {len(right):,} | {100 * right.mean():.2f} | {100 * mean:+.2f} "
                f"({100 * low:+.2f} to {100 * high:+.2f}) | {100 * passed.mean():.0f} % | {cost:.2f} |"
            )
    return "\n".join(lines) + "\n" if len(lines) > 3 else ""


def costs(times: Times, cpu_times: Times) -> str:
    """Table of the arms that were timed: a step of training with one thread, a prediction, and memory by kind."""
    kinds = ("weights", "optimizer", "gradients", "activations", "bands")
    lines = [
        "",
        "| arm | step, ms | CPU time, ms | a prediction, MMACs | parameters, M | memory of a step, MiB | "
        f"{' | '.join(kinds)} |",
        f"|---|{'--:|' * (5 + len(kinds))}",
    ]
    for arm in (arm for names in FAMILIES.values() for arm in names if arm in times):
        memory = memory_of(arm)
        cells = [
            arm,
            *(
                " / ".join(f"{1e3 * of[size]:.0f}" for size in sorted(of, key=int))
                for of in (times[arm], cpu_times.get(arm, {}))
            ),
            f"{macs_of(arm) / 1e6:.0f}",
            f"{parameters_of(arm) / 1e6:.2f}",
            *(f"{bytes / MIB:.0f}" for bytes in (memory.total, *(getattr(memory, kind) for kind in kinds))),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" if len(lines) > 3 else ""


def halves(run: Any, loss: float) -> tuple[Correct, Correct, Correct]:
    """Whether the cascade of a pair of runs is right, whether the second alone is, and whether it was asked: (N,)."""
    order = np.argsort(run.image_2, kind="stable")[np.searchsorted(np.sort(run.image_2), run.image)]
    sure, first = np.asarray(run.confidence), np.asarray(run.correct, float)
    second = np.asarray(run.correct_2, float)[order]
    right, asked, even = np.empty_like(first), np.empty_like(first), np.arange(len(first)) % 2 == 0
    for chosen, used in ((even, ~even), (~even, even)):
        threshold = next(
            (t for t in np.linspace(0, 1, 201)
             if np.where(sure >= t, first, second)[chosen].mean() >= second[chosen].mean() - loss),
            1.0,
        )  # fmt: skip
        asked[used] = sure[used] < threshold
        right[used] = np.where(asked[used] > 0, second[used], first[used])
    return right, second, asked


def draw(curves: Sequence[Curve]) -> Figure:
    """Above: top-1 above the baseline at equal training time, a panel for each budget at which most arms were trained.

    Below, for the largest of these budgets: top-1 by multiplications of a prediction, and by memory of training.
    """
    base = next(curve for curve in curves if curve.arm == BASELINE)
    counts = {budget: sum(budget in curve.budgets for curve in curves) for budget in base.budgets}
    budgets = [budget for budget, count in counts.items() if 2 * count > max(counts.values())]
    shown = [curve for curve in curves if budgets[-1] in curve.budgets]
    shown.sort(key=lambda curve: curve.top1(budgets[-1]))
    rows = 1.1 + 0.155 * len(shown)
    figure = Figure(figsize=(WIDTH, rows + COSTS_HEIGHT), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(rows, COSTS_HEIGHT))
    panels = above.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    for axes, budget in zip(panels, budgets, strict=True):
        _draw_budget(axes, budget, shown, base, best_control(curves, budget))
        title = f"{base.seconds[base.budgets.index(budget)] / 60:.1f} minutes of one thread"
        axes.set(title=title, xlabel=f"Top-1 above {BASELINE} (points)")
    panels[0].set_yticks(range(len(shown)), [curve.name for curve in shown], fontsize=7)
    panels[0].set_ylim(-0.7, len(shown) - 0.3)
    once = {curve.arm: curve for curve in shown if not curve.variant}.values()  # of two fusions the better
    macs, memory = below.subplots(1, 2, sharey=True)
    named = [curve for curve in once if curve in (base, best_control(curves, budgets[-1]))]
    _draw_cost(macs, [(curve.macs / 1e6, curve) for curve in once], budgets[-1], named)
    _draw_cost(memory, [(memory_of(curve.arm).total / MIB, curve) for curve in once], budgets[-1], named)
    memory.plot(memory_of(ACCUMULATED).total / MIB, base.top1(budgets[-1]), "x", markersize=4.5, color=COLORS[RGB])
    macs.set(title=title, xlabel="Multiplications of a prediction (millions)", ylabel="Top-1 (%)")
    memory.set(xlabel="Memory of a step of training (MiB)")
    figure.legend(handles=_legend(), loc="outside lower center", ncols=3, fontsize=7, handlelength=1)
    return figure


def _draw_budget(axes: Axes, budget: float, shown: Sequence[Curve], base: Curve, control: Curve | None) -> None:
    for y, curve in enumerate(shown):
        if budget not in curve.budgets:
            continue
        mean, (low, high) = difference(curve.at(budget), base.at(budget))
        axes.plot([low, high], [y, y], color=COLORS[curve.family], linewidth=1)
        axes.plot(mean, y, **_marker(curve))
        if curve is control:
            axes.axvline(mean, color=COLORS[RGB], linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.axvline(0, color="black", linewidth=0.8, zorder=0)
    axes.grid(axis="y", visible=False)


def _draw_cost(axes: Axes, points: Sequence[tuple[float, Curve]], budget: float, named: Sequence[Curve]) -> None:
    """Accuracy by cost. The names of those that no other beats in both, costs taken to two digits, and of `named`."""
    best, costs, accuracies = 0.0, [], []
    for cost, curve in sorted(points, key=lambda point: (float(f"{point[0]:.1e}"), -point[1].top1(budget))):
        top1 = curve.top1(budget)
        axes.plot(cost, top1, **_marker(curve))
        name = partial(axes.annotate, curve.name, (cost, top1), textcoords="offset points", fontsize=6)
        if top1 > best:
            best = top1
            costs.append(cost)
            accuracies.append(top1)
            name(xytext=(-4, 3), ha="right")
        elif curve in named:
            name(xytext=(5, -2))
    costs.append(max(cost for cost, _ in points))
    axes.step(costs, [*accuracies, best], where="post", color="0.7", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.set_xlim(min(costs) / 6, 4 * max(costs))  # room for names
    axes.margins(y=0.1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _marker(curve: Curve) -> dict[str, Any]:
    color = COLORS[curve.family]
    face = "white" if curve.arm in (*FAMILIES[RGB], *PIXELS) else color
    return {"marker": "o", "markersize": 4.5, "linestyle": "none", "color": color, "markerfacecolor": face}


def _legend() -> list[Line2D]:
    dot = partial(Line2D, [], [], marker="o", markersize=4.5, linestyle="none", color="0.35")
    families = [dot(color=color, label=family) for family, color in COLORS.items()]
    kinds = [dot(label="DCT"), dot(markerfacecolor="white", label="no DCT")]
    best = Line2D([], [], color="0.35", linewidth=0.8, linestyle=(0, (4, 3)), label="best network on RGB")
    return [*families, *kinds, best, dot(marker="x", label="RGB 128, 4 accumulation steps")]
