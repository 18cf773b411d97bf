"""What follows from saved predictions: accuracies, confusions, calibration. Accuracies are in percent."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bandsplit.models.fusion import MEAN, Labels, Logits, scores
from bandsplit.runs.predictions import Predictions
from bandsplit.statistics import BINS, calibration_error, gain_interval

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Correct = NDArray[np.bool_]

_AT_ONCE = 2**24
"""Logits that are converted to float32 at a time."""


@dataclass(frozen=True, eq=False)
class FusionResult:
    """One fusion over all images."""

    loss: float
    top1: float
    top5: float
    ece: float
    gain: float
    """Top-1 above that of the mean."""
    gain_interval: tuple[float, float]
    """95 % interval of `gain`; see `gain_interval` of `statistics`."""
    bins: Floats
    """(BINS, 3); see `calibration`."""


@dataclass(frozen=True)
class Growth:
    """Top-1 of the first n branches in some order, n = 1, 2, …"""

    label: str
    order: list[int]
    top1: list[float]


@dataclass(frozen=True, eq=False)
class Confusions:
    """Wrong predictions, the most frequent pair of classes first, of equal ones that of the smaller class."""

    true: Counts
    """(pairs,), class indices."""
    predicted: Counts
    images: Counts


@dataclass(frozen=True, eq=False)
class Results:
    """Everything that reports show of one file; computed when it is first asked for."""

    predictions: Predictions

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes as they are shown; those that several classes have are told apart by the class."""
        p = self.predictions
        times = Counter(p.class_names)
        named = [f"{name} ({c})" if times[name] > 1 else name for name, c in zip(p.class_names, p.classes, strict=True)]
        return [printable(name) for name in named]

    @property
    def is_sample(self) -> bool:
        """Whether more images were evaluated than are saved."""
        return self.predictions.images > len(self.predictions.labels)

    @cached_property
    def branches(self) -> list[str]:
        """Names of the branches as they are shown."""
        return [branch.label for branch in self.predictions.branches]

    @cached_property
    def fusions(self) -> dict[str, FusionResult]:
        p, results = self.predictions, {}
        found = p.fused.classes == p.labels[:, None, None]  # (N, fusions, k)
        images, by_mean = len(p.labels), found[:, list(p.fusions).index(MEAN), 0]
        for n, name in enumerate(p.fusions):
            right = found[:, n, 0]
            better, worse = int((right & ~by_mean).sum()), int((by_mean & ~right).sum())
            bins = calibration(p.fused.confidences[:, n, 0], right)
            results[name] = FusionResult(
                float(p.fused.losses[:, n].mean(dtype=np.float64)),
                100 * float(right.sum()) / images,
                100 * float(found[:, n].any(1).sum()) / images,
                calibration_error(bins.tolist()),
                100 * (better - worse) / images,
                gain_interval(p.fusions[name], better, worse, images),
                bins,
            )
        return results

    @property
    def fused(self) -> FusionResult:
        """Of the fusion in use."""
        return self.fusions[self.predictions.fusion]

    @cached_property
    def predicted(self) -> NDArray[np.int32]:
        """(N,), by the fusion in use."""
        return self.predictions.fused.classes[:, self._used, 0]

    @cached_property
    def confidence(self) -> NDArray[np.float32]:
        """(N,), by the fusion in use."""
        return self.predictions.fused.confidences[:, self._used, 0]

    @property
    def _used(self) -> int:
        return list(self.predictions.fusions).index(self.predictions.fusion)

    @cached_property
    def class_images(self) -> Counts:
        """(classes,), images of each class."""
        return np.bincount(self.predictions.labels, minlength=len(self.classes))

    @cached_property
    def class_correct(self) -> Counts:
        """(classes,), images of each class that are classified correctly."""
        labels = self.predictions.labels
        return np.bincount(labels[self.predicted == labels], minlength=len(self.classes))

    @cached_property
    def class_top1(self) -> Floats:
        """(classes,), NaN for a class without images."""
        with np.errstate(invalid="ignore"):
            return np.asarray(100 * self.class_correct / self.class_images)

    @cached_property
    def confusions(self) -> Confusions:
        labels, predicted, classes = self.predictions.labels, self.predicted, len(self.classes)
        wrong = predicted != labels
        pairs, images = np.unique(labels[wrong].astype(np.int64) * classes + predicted[wrong], return_counts=True)
        true, taken_for = np.divmod(pairs, classes)
        order = np.lexsort((pairs, self.class_images[true], -images))
        return Confusions(true[order], taken_for[order], images[order])

    @cached_property
    def taken_for(self) -> dict[int, tuple[int, int]]:
        """For each class with a mistake, the class that it is most often taken for, and for how many images."""
        first: dict[int, tuple[int, int]] = {}
        c = self.confusions
        for true, predicted, images in zip(c.true.tolist(), c.predicted.tolist(), c.images.tolist(), strict=True):
            first.setdefault(true, (predicted, images))
        return first

    @cached_property
    def branch_top(self) -> Floats:
        """(branches, 2), top-1 and top-5 of each branch alone."""
        correct = self.predictions.branch_correct
        return np.asarray(100 * correct.sum(0) / len(correct))

    @cached_property
    def growth(self) -> list[Growth]:
        """Of the mean in the order of the branches; of a fitted fusion, largest weight first; and of the mean in the
        order of accuracy on held-out images. Empty without logits."""
        p = self.predictions
        if p.logits is None:
            return []
        count = len(p.branches)
        orders: list[tuple[str, Floats, Floats]] = [
            ("mean, in order", np.ones(count), np.arange(count, dtype=np.float64))
        ]
        fitted = [name for name in (p.fusion, "learned") if name in p.fusions and len(set(p.fusions[name])) > 1]
        if fitted:
            weights = np.array(p.fusions[fitted[0]])
            orders.append((f"{fitted[0]}, largest weight first", weights, -weights))
        if p.held_out is not None:
            _, top1 = scores(p.held_out.logits, p.held_out.labels, np.eye(count))
            orders.append(("mean, best on held-out images first", np.ones(count), -top1))
        curves = []
        for label, weights, key in orders:
            order = np.argsort(key, kind="stable")
            curves.append(Growth(label, order.tolist(), growing(p.logits, p.labels, order, weights).tolist()))
        return curves

    @property
    def grid(self) -> list[int] | None:
        """For each branch, its one band; None if a branch has several, a band comes twice, or there is only one."""
        bands = [branch.bands for branch in self.predictions.branches]
        single = [group[0] for group in bands if len(group) == 1]
        return single if self.predictions.block > 1 and len(set(single)) == len(bands) else None


def printable(name: str) -> str:
    """A name of a file or class; bytes that are not UTF-8 become �."""
    return os.fsencode(name).decode("utf-8", "replace")


def calibration(confidence: NDArray[np.floating], correct: Correct) -> Floats:
    """(BINS, 3): images, correct ones and sum of confidences; bin i has confidences in (i / BINS, (i + 1) / BINS]."""
    confidence = confidence.astype(np.float64)
    places = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence)
    sums = [np.bincount(places, weights, BINS) for weights in (None, correct.astype(np.float64), confidence)]
    return np.stack(sums, axis=1).astype(np.float64)


def growing(logits: Logits, labels: Labels, order: Counts, weights: Floats) -> Floats:
    """(branches,), top-1 of the weighted sum of the first 1, 2, … branches in `order`."""
    counts = np.zeros(len(order))
    scale = weights[order].astype(np.float32)[:, None]
    for z, y in _chunks(logits, labels):
        fused = np.cumsum(z[:, order] * scale, axis=1)  # (n, branches, classes)
        counts += (fused.argmax(-1) == y[:, None]).sum(0)
    return 100 * counts / len(labels)


def _chunks(logits: Logits, labels: Labels) -> Iterator[tuple[NDArray[np.float32], Labels]]:
    """Logits in float32, some images at a time, and their labels."""
    count = max(1, _AT_ONCE // (logits.shape[1] * logits.shape[2]))
    for first in range(0, len(labels), count):
        yield logits[first : first + count].astype(np.float32), labels[first : first + count]
