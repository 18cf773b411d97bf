"""Cascade: branches are evaluated one after another, until the fused confidence of the image is above a threshold.

Stage n fuses the first n branches, with the weights of `learned` fusion: Σ_{i<=n} a_i z_i. Its confidence is the
largest probability of the softmax of s_n times these logits. An image leaves at the first stage whose confidence is
above the threshold, with the prediction of this stage; the last stage is learned fusion itself. Early exits by
confidence are those of Teerapittayanon et al., *BranchyNet* (ICPR 2016), and of cascades of whole networks in Wang et
al., *Wisdom of Committees* (ICLR 2022); the idea is that of Viola and Jones, *Rapid Object Detection using a Boosted
Cascade of Simple Features* (CVPR 2001). One threshold serves all stages, since s_n calibrates each of them (temperature
scaling; Guo et al., ICML 2017).

The order is greedy: each stage adds the branch with which the fused logits classify the most images. All of this is
fitted on held-out images, and so is the threshold, for a stated loss of accuracy. An image is lost at a threshold if
learned fusion is right about it and the cascade is wrong, at this threshold or at any above. That many images at most
are lost among the held-out ones as to say with 95 % confidence that not more than the stated fraction of all images is
lost: with k lost images of N, the Clopper-Pearson bound, or the distribution-free tolerance limit of Wilks (*Annals of
Mathematical Statistics*, 1941). Accuracy falls by no more than that, as images that only the cascade classifies
correctly count for nothing. Confidences of each half of the held-out images are those of a cascade fitted on the other
half, so that the threshold does not rely on images that the weights know. What is bounded is thus the mean loss of the
two cascades that the halves fitted, and that approximately, since each of them knows the images of the other; the
cascade in use is fitted on both halves, and stands for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bandsplit.errors import UserError
from bandsplit.models import fusion
from bandsplit.models.fusion import Floats, Labels, Logits

RISK = 0.05
"""Probability that more images are lost than stated."""

_HALVES = (slice(0, None, 2), slice(1, None, 2))
"""Images of each class in equal numbers, as they are in the order of classes."""


@dataclass(frozen=True)
class Cascade:
    """Stages, one per branch of `order`, and when an image leaves them."""

    order: list[int]
    """Branches in the order of evaluation; those without weight in learned fusion are not among them."""
    weights: list[float]
    """(stages,), a_i of the branch of each stage."""
    scales: list[float]
    """(stages,), s_n of the fused logits of each stage, for their confidence."""
    threshold: float
    """An image leaves at a confidence above it."""
    loss: float
    """Top-1 accuracy that may be lost, in percent of all images."""

    def check(self, branches: int) -> None:
        """Raises ValueError if it is no cascade of so many branches."""
        if not len(self.order) == len(self.weights) == len(self.scales) > 0:
            raise ValueError("order, weights and scales of the cascade differ in number")
        if len(set(self.order)) < len(self.order) or not set(self.order) <= set(range(branches)):
            raise ValueError(f"order of the cascade: {self.order}, but there are {branches} branches")


@dataclass(frozen=True, eq=False)
class Applied:
    """What a cascade does with N images."""

    stages: NDArray[np.int64]
    """(N,), at which of the stages 0, 1, … each image leaves."""
    confidence: Floats
    """(N, stages), at every stage, whether the image comes so far or not."""
    predicted: Labels
    """(N,), classes."""
    full: Labels
    """(N,), classes that the last stage would predict."""


def fit(logits: Logits, labels: Labels, weights: Floats, loss: float) -> Cascade:
    """The cascade for a stated loss.

    Args:
        weights: (branches,), of learned fusion on these images.
        loss: in percent.

    Raises UserError if these images are too few to vouch for the loss.
    """
    most = most_lost(len(labels), loss)
    needed = np.concatenate([_needed_of(logits, labels, weights, *pair) for pair in (_HALVES, _HALVES[::-1])])
    threshold = float(np.sort(needed)[::-1][most])
    order, scales = _stages_of(logits, labels, weights)
    return Cascade(order, weights[order].tolist(), scales, threshold, loss)


def apply(cascade: Cascade, logits: Logits) -> Applied:
    """Where images leave the cascade, from the logits (N, branches, classes) of all their branches."""
    confidence, predicted = _traced(logits, cascade.order, cascade.weights, cascade.scales)
    leaves = confidence > cascade.threshold
    leaves[:, -1] = True
    stages = leaves.argmax(1)
    return Applied(stages, confidence, predicted[np.arange(len(stages)), stages], predicted[:, -1])


def most_lost(images: int, loss: float) -> int:
    """The most held-out images that may be lost; raises UserError if that is not even none."""
    from scipy import stats  # here, as every training imports this file

    most = int(stats.binom.ppf(RISK, images, loss / 100)) - 1
    if most < 0:
        enough = math.ceil(math.log(RISK) / math.log1p(-loss / 100))
        least = 100 * (1 - RISK ** (1 / images))
        raise UserError(
            f"--cascade {loss:g}: {images:,} held-out images cannot vouch for a loss of at most {loss:g} points; "
            f"allowed with these: {math.ceil(100 * least) / 100:g} or more; {loss:g} needs {enough:,} held-out images "
            "(data.holdout)"
        )
    return most


def _stages_of(logits: Logits, labels: Labels, weights: Floats) -> tuple[list[int], list[float]]:
    """The order of the branches with a weight, and the scale of each stage."""
    order: list[int] = []
    left = np.flatnonzero(weights).tolist() or [0]
    while left:
        prefixes = np.zeros((len(left), len(weights)))
        for prefix, k in zip(prefixes, left, strict=True):
            prefix[[*order, k]] = weights[[*order, k]]
        losses, top1 = fusion.scores(logits, labels, prefixes)
        order.append(left.pop(int(np.lexsort((losses, -top1))[0])))  # of equal accuracy the one with the lowest loss
    fused = _fused(logits, order, weights[order].tolist())
    one = np.ones((1, 1))
    return order, [float(fusion.least_loss(z[:, None], labels, one)[0]) for z in fused]


def _needed_of(logits: Logits, labels: Labels, weights: Floats, fitted_on: slice, images: slice) -> Floats:
    """For each of the `images`, the threshold at which it is not lost, by stages fitted on others.

    That is the highest confidence at which it could leave with a wrong prediction, if the last stage is right; else 0.

    Args:
        weights: (branches,), to start the fit from.
    """
    some, known = logits[fitted_on], labels[fitted_on]
    weights = fusion.least_loss(some, known, np.eye(logits.shape[1]), start=weights)
    order, scales = _stages_of(some, known, weights)
    confidence, predicted = _traced(logits[images], order, weights[order].tolist(), scales)
    before = np.maximum.accumulate(confidence, axis=1)[:, :-1]
    can_leave = confidence > np.pad(before, ((0, 0), (1, 0)))
    right = predicted == labels[images, None]
    return np.asarray(np.where(can_leave & ~right & right[:, -1:], confidence, 0.0).max(1))


def _traced(logits: Logits, order: list[int], weights: list[float], scales: list[float]) -> tuple[Floats, Labels]:
    """Confidence (N, stages) and predicted class (N, stages) of each image at each stage, if it came so far."""
    confidence, predicted = [], []
    for z, scale in zip(_fused(logits, order, weights), scales, strict=True):
        confidence.append(1 / np.exp(scale * (z - z.max(1, keepdims=True))).sum(1))
        predicted.append(z.argmax(1))
    return np.stack(confidence, 1), np.stack(predicted, 1)


def _fused(logits: Logits, order: list[int], weights: list[float]) -> Iterator[NDArray[np.float32]]:
    """Fused logits (N, classes) of each stage."""
    fused = np.zeros((len(logits), logits.shape[2]), dtype=np.float32)
    for k, weight in zip(order, weights, strict=True):
        fused = fused + np.float32(weight) * logits[:, k].astype(np.float32)
        yield fused
