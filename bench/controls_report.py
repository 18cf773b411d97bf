"""Tables of bench/controls.py, from the results of its runs alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from controls_arms import BASELINE, CASCADES, FAMILIES, PAIRS, RGB, Times, macs_of, memory_of, parameters_of
from controls_curves import Correct, Curve, at_cpu_time, best_control, difference, time_ratio, time_to
from controls_figure import draw
from controls_results import chosen, collected, compared, read, timed_on

from bandsplit.errors import UserError
from bandsplit.reporting.compare import difference_over_images
from bandsplit.reporting.figures import STYLE
from bandsplit.training.memory import MIB

LOSS = 0.5
"""Points of accuracy that a cascade may lose on the images for which its threshold is chosen."""


def report(work: Path) -> None:
    """Writes figure, tables and results into WORK/report. Raises UserError if the baseline has no results."""
    results = collected(work)
    curves = read(results) if len(results) else []
    if not any(curve.label == BASELINE for curve in curves):
        raise UserError(f"{work / 'results'}: no results of {BASELINE}, with which all are compared")
    folder = work / "report"
    folder.mkdir(exist_ok=True)
    results.to_parquet(folder / "controls.parquet", compression="zstd", index=False)
    frame = table(curves)
    frame.to_csv(folder / "controls.csv", index=False)
    where = timed_on(results)
    text = markdown(frame, where) + incomplete(results)
    text += pairs(curves) + by_cpu_time(curves) + not_continued(curves) + cascades(chosen(results))
    text += costs(results.attrs.get("times", {}), results.attrs.get("cpu_times", {}))
    (folder / "controls.md").write_text(text, encoding="utf-8")
    with mpl.rc_context(STYLE):
        figure = draw(curves, where)
        for suffix in ("png", "svg", "pdf"):
            figure.savefig(folder / f"controls.{suffix}")
    print(text)


def table(curves: Sequence[Curve]) -> pd.DataFrame:
    """One row for each way and budget.

    `mmacs` are those of a prediction, `memory_mib` that of a step of training. `top1_above` is against the baseline at
    the same budget, `control_above` against the best network on RGB, which is chosen by the same images and so looks a
    little better than it is. A time that is `time_first`, that of the smallest budget of the arm, is an upper bound.
    """
    base = next(curve for curve in curves if curve.label == BASELINE)
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


def points(mean: float, interval: tuple[float, float]) -> str:
    """A difference and its interval, in a cell of a table."""
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(mean, *interval)


def markdown(frame: pd.DataFrame, where: str) -> str:
    """The table by budget, best first. `where`: `timed_on` of the results."""
    parts = []
    for budget, rows in frame.groupby("budget"):
        rows = rows.sort_values(["top1", "arm"], ascending=[False, True])
        control = rows["control"].dropna().unique()
        lines = [
            f"Budget {budget:g}: {rows['seconds'].median() / 60:.1f} minutes {where}",
            "",
            f"| arm | runs | images | MMACs | MiB | top-1 | above {BASELINE} (95 %) | "
            f"above {'/'.join(control) or 'the best on RGB'} (95 %) | "
            "time to the baseline's accuracy, to its time (95 %) |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for row in rows.itertuples():
            above, above_control = (
                "" if np.isnan(mean) else points(mean, (low, high))
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


def incomplete(frame: pd.DataFrame) -> str:
    """A line that names what is left out of the tables: without a run of each fold and seed of the baseline."""
    rows = compared(frame)
    missing = rows[~rows["complete"]].groupby(["budget", "arm", "other_rate", "lr"]).size().index
    names = ", ".join(f"{arm}{f' lr {lr:g}' * other} at {budget:g}" for budget, arm, other, lr in missing)
    return f"\nLeft out, as their folds and seeds are not those of {BASELINE}: {names}\n" if names else ""


def pairs(curves: Sequence[Curve]) -> str:
    """Table of PAIRS: the first above the second, at each budget of at least one pair."""
    by_label = {curve.label: curve for curve in curves}
    known = [(by_label[a], by_label[b]) for a, b in PAIRS if a in by_label and b in by_label]
    budgets = sorted({budget for a, b in known for budget in set(a.budgets) & set(b.budgets)})
    lines = [
        "",
        f"| | above | {' | '.join(f'at {b:g} (95 %)' for b in budgets)} |",
        f"|---|---|{'--:|' * len(budgets)}",
    ]
    for a, b in known:
        cells = []
        for budget in budgets:
            if budget in a.budgets and budget in b.budgets:
                cells.append(points(*difference(a.at(budget), b.at(budget))))
            else:
                cells.append("")
        lines.append(f"| {a.label} | {b.label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" if known else ""


def by_cpu_time(curves: Sequence[Curve]) -> str:
    """Table of what counts the CPU time of decoding too: accuracies at the largest CPU time of the baseline.

    Budgets are of wall-clock time, in which images are prepared on another core. Accuracies are linear in the logarithm
    of time between budgets.
    """
    base = next(curve for curve in curves if curve.label == BASELINE)
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
            cells.append(points(*difference(correct, other)))
        lines.append(f"| {' | '.join([*cells, ratio])} |")
    return "\n".join(lines) + "\n"


def not_continued(curves: Sequence[Curve], budgets: Sequence[float] = (1.0, 2.0)) -> str:
    """Table of the ways that are left out after these budgets, each with one that is better at all of them.

    The better one takes no more MACs for a prediction, and the intervals of its advantage do not contain 0.
    The baseline, with which all are compared, is never left out.
    """
    both = [curve for curve in curves if set(budgets) <= set(curve.budgets) and curve.is_plain]
    both.sort(key=lambda curve: -curve.top1(budgets[-1]))
    titles = [f"above at {budget:g} (95 %)" for budget in budgets]
    lines = ["", f"| not continued | since | {' | '.join(titles)} |", f"|---|---|{'--:|' * len(budgets)}"]
    for curve in both:
        if curve.label == BASELINE:
            continue
        for other in (each for each in both if each.arm != curve.arm and each.macs <= curve.macs):
            if any(other.top1(budget) <= curve.top1(budget) for budget in budgets):
                continue  # no need of the bootstrap
            found = [difference(other.at(budget), curve.at(budget)) for budget in budgets]
            if all(low > 0 for _, (low, _) in found):
                cells = [points(*each) for each in found]
                lines.append(f"| {curve.label} | {other.label} | {' | '.join(cells)} |")
                break
    return "\n".join(lines) + "\n" if len(lines) > 3 else ""


def cascades(frame: pd.DataFrame) -> str:
    """Table of CASCADES: accuracy and MACs against those of the second alone.

    The threshold is chosen on half of the images of a fold and used on the other half, both ways.
    """
    lines = [
        "",
        "| cascade | budget | images | top-1 | above the second (95 %) | second asked | MACs (second: 1) |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    frame = frame[(frame["variant"] == "") & ~frame["other_rate"]]
    keys = ["fold", "budget", "seed"]
    for (one, one_fusion), (two, two_fusion) in CASCADES:
        firsts = frame[(frame["arm"] == one) & (frame["fusion"] == one_fusion)]
        seconds = frame[(frame["arm"] == two) & (frame["fusion"] == two_fusion)]
        pairs = firsts.merge(seconds, on=keys, suffixes=("", "_2"))
        own, alone = (macs_of(arm, fusion) for arm, fusion in ((one, one_fusion), (two, two_fusion)))
        if one == two:
            alone = max(alone, own)
        for budget, runs in pairs.groupby("budget"):
            found = [pd.DataFrame(halves(run, LOSS / 100), columns=run.image) for run in runs.itertuples()]
            shares = pd.concat(found, axis=1).T.groupby(level=0).mean()  # of the seeds
            right, other, passed = (shares[k].to_numpy() for k in range(3))
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
    """Table of the arms that were timed: a step of training, a prediction, and memory by kind."""
    kinds = ("weights", "optimizer", "gradients", "activations", "bands")
    lines = [
        "",
        "| arm | step, ms | CPU time, ms | a prediction, MMACs | parameters, M | memory of a step, float32, MiB | "
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
    for tuned, used in ((even, ~even), (~even, even)):
        threshold = next(
            (t for t in np.linspace(0, 1, 201)
             if np.where(sure >= t, first, second)[tuned].mean() >= second[tuned].mean() - loss),
            1.0,
        )  # fmt: skip
        asked[used] = sure[used] < threshold
        right[used] = np.where(asked[used] > 0, second[used], first[used])
    return right, second, asked
