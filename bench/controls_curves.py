"""An arm of bench/controls.py over its budgets: accuracy image by image, training time, and what follows from these."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from controls_arms import BASELINE, FAMILIES, RGB, macs_of

from bandsplit.reporting.compare import difference_over_images, resampled_means

Correct = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Curve:
    """A way to use an arm, at every budget at which it was trained in the folds of the baseline."""

    arm: str
    label: str
    variant: str
    """A further evaluation of the same runs, such as "at 104"; else empty."""
    other_rate: bool
    """Whether its learning rate is another than that of the arm."""
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
    def is_plain(self) -> bool:
        """Whether this is the arm as the protocol has it, though perhaps with one of two fusions."""
        return not (self.variant or self.other_rate)

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
    values = np.stack([*curve.correct, base.correct[n]])
    values = values[:, ~np.isnan(values).any(0)]
    means = [values.mean(1), *resampled_means(values)]
    ratios = [time_to(curve.seconds, own, target) / base.seconds[n] for *own, target in means]
    low, high = np.percentile(ratios[1:], [2.5, 97.5], method="nearest")
    return ratios[0], float(low), float(high)


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


def best_control(curves: Sequence[Curve], budget: float) -> Curve | None:
    """The most accurate of the networks on RGB at a budget; none where the baseline was not trained."""
    controls = [curve for curve in curves if curve.arm in FAMILIES[RGB] and budget in curve.budgets]
    if not any(curve.label == BASELINE for curve in controls):
        return None
    return max(controls, key=lambda curve: curve.top1(budget))
