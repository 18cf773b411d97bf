"""Fusion: one weight per branch, fitted on images that no branch was trained on. The fused logits are Σ_k a_k z_k.

| fusion | weights |
|---|---|
| `mean` | a_k = 1 / branches |
| `rank` | a_k ∝ p (1 - p)^r, where r = 0, 1, … is the place of branch k in the order of top-1, best first |
| `temperature` | a_k = t / branches, with t >= 0: the mean, with calibrated confidence |
| `learned` | any a_k >= 0 |
| `drop` | those of `learned` for the branches that help, 0 for the others |

`rank` is the fusion of Liu et al., *Spectral Tensor Layers for Communication-Free Distributed Deep Learning* (IEEE
TNNLS, 2024), but with order and p from held-out images. `temperature` is temperature scaling (Guo et al., *On
Calibration of Modern Neural Networks*, ICML 2017), with t / branches in the place of 1 / T. `temperature` and `learned`
minimize the mean cross-entropy, which is convex in the weights: the log-sum-exp of functions that are linear in them.
Their labels are smoothed as if there were one image more, of any class with equal probability. Otherwise the weights
would grow without bound where they separate all of few images, and be wrong with certainty on others (Platt,
*Probabilistic Outputs for Support Vector Machines*, 1999, section 2.2, for two classes).

`drop` is backward elimination: the branch whose loss from the fusion costs least is dropped, and the others are fitted
anew, as long as this does not raise the cross-entropy by more than one standard error of its difference, image by image
(the one-standard-error rule of Breiman et al., *Classification and Regression Trees*, 1984, section 3.4.3, for paired
differences). For many images this is a test of the branch's weight against 0 at two standard deviations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Logits = NDArray[np.floating]
"""(N, branches, classes)."""
Labels = NDArray[np.integer]
"""(N,), class indices."""

MEAN = "mean"
FUSIONS = (MEAN, "rank", "learned", "temperature", "drop")

P = tuple(round(0.05 * i, 2) for i in range(1, 20))
"""Values of p that `rank` chooses from."""

_RESTARTS = 10
"""Of L-BFGS-B, whose line search may fail far from the optimum."""

_AT_ONCE = 2**22
"""Logits that are converted to float64 at a time."""


@dataclass(frozen=True)
class Fusion:
    """Weights of the branches, and what the fused logits reach on the images that the weights were fitted on."""

    weights: list[float]
    loss: float
    """Mean cross-entropy."""
    top1: float
    """In percent."""
    p: float | None = None
    """Of `rank`."""


def fit(logits: Logits, labels: Labels) -> dict[str, Fusion]:
    """All of FUSIONS, fitted on these images."""
    branches = logits.shape[1]
    uniform = np.full(branches, 1 / branches)
    _, alone = scores(logits, labels, np.eye(branches))
    candidates = np.stack([rank_weights(alone, p) for p in P])
    losses, top1 = scores(logits, labels, candidates)
    best = int(np.lexsort((losses, -top1))[0])  # of equal accuracy the one with the lowest loss
    learned = least_loss(logits, labels, np.eye(branches))
    weights = {
        MEAN: uniform,
        "rank": candidates[best],
        "learned": learned,
        "temperature": least_loss(logits, labels, uniform[:, None]),
        "drop": without_useless(logits, labels, learned),
    }
    losses, top1 = scores(logits, labels, np.stack(list(weights.values())))
    return {
        name: Fusion(a.tolist(), float(losses[i]), float(top1[i]), P[best] if name == "rank" else None)
        for i, (name, a) in enumerate(weights.items())
    }


def rank_weights(top1: Floats, p: float) -> Floats:
    """p (1 - p)^r for the place r of each branch in the order of its accuracy (branches,), normalized to the sum 1."""
    order = np.argsort(-top1, kind="stable")
    weights = np.empty(len(top1))
    weights[order] = p * (1 - p) ** np.arange(len(top1))
    return np.asarray(weights / weights.sum())


def scores(logits: Logits, labels: Labels, weights: Floats) -> tuple[Floats, Floats]:
    """Mean cross-entropy (fusions,) and top-1 in percent (fusions,) of several fusions: weights (fusions, branches)."""
    losses, correct = np.zeros(len(weights)), np.zeros(len(weights))
    for z, y in _chunks(logits, labels):
        fused = weights @ z  # (n, fusions, classes)
        losses += (_log_sum_exp(fused) - _of_labels(fused, y)).sum(0)
        correct += (fused.argmax(-1) == y[:, None]).sum(0)
    return losses / len(labels), 100 * correct / len(labels)


def without_useless(logits: Logits, labels: Labels, weights: Floats) -> Floats:
    """Backward elimination: the weights (branches,) of `learned` -> those of `drop`, of which one at least is not 0."""
    used = np.flatnonzero(weights) if weights.any() else np.array([0])
    z, a = logits[:, used], weights[used]
    losses = _losses(z, labels, a)
    while len(used) > 1:
        without = a * (1 - np.eye(len(a)))
        left = np.delete(np.arange(len(a)), scores(z, labels, without)[0].argmin())
        fewer = z[:, left]
        refitted = least_loss(fewer, labels, np.eye(len(left)), start=a[left])
        then = _losses(fewer, labels, refitted)
        if (then - losses).mean() > (then - losses).std() / np.sqrt(len(labels)):
            break
        used, z, a, losses = used[left], fewer, refitted, then
    kept = np.zeros(len(weights))
    kept[used] = a
    return kept


def _losses(logits: Logits, labels: Labels, weights: Floats) -> Floats:
    """Cross-entropy of each image (N,) with these weights (branches,)."""
    fused = ((weights @ z, y) for z, y in _chunks(logits, labels))
    return np.concatenate([_log_sum_exp(z) - _of_labels(z, y) for z, y in fused])


def least_loss(logits: Logits, labels: Labels, basis: Floats, start: Floats | None = None) -> Floats:
    """The weights (branches,) of the least mean cross-entropy, with smoothed labels, among `basis` @ t with t >= 0.

    The loss is convex in t, so every start ends at the same loss. L-BFGS-B (Byrd et al., *A Limited
    Memory Algorithm for Bound Constrained Optimization*, 1995).

    Args:
        basis: (branches, parameters).
        start: (parameters,), a t to start from.
    """
    from scipy import optimize  # here, as every training imports this file

    scale = 1 / max(1e-12, float(np.sqrt(np.mean([np.mean(z.var(-1)) for z, _ in _chunks(logits, labels)]))))

    def objective(t: Floats) -> tuple[float, Floats]:
        loss, gradient = loss_and_gradient(logits, labels, scale * basis @ t, smoothing(len(labels)))
        return loss, scale * gradient @ basis

    count = basis.shape[1]
    t = np.full(count, 1 / count) if start is None else start / scale
    for _ in range(_RESTARTS):
        result = optimize.minimize(
            objective,
            t,
            jac=True,
            method="L-BFGS-B",
            bounds=[(0, None)] * count,
            options={"ftol": 0, "gtol": 1e-9, "maxiter": 1000, "maxcor": 30},
        )
        t = result.x
        if np.abs(t - np.maximum(t - result.jac, 0)).max() < 1e-6:
            break
    return np.asarray(scale * basis @ t)


def smoothing(images: int) -> float:
    """Weight of one additional image: 1 / (images + 1)."""
    return 1 / (images + 1)


def loss_and_gradient(logits: Logits, labels: Labels, weights: Floats, smoothing: float = 0.0) -> tuple[float, Floats]:
    """Mean cross-entropy of the fused logits, and its gradient with respect to the weights (branches,).

    The gradient is E[Σ_c softmax(fused)_c z_kc - (1 - smoothing) z_ky] for logits z that are centered over the classes,
    since the part of the target that is equal for all classes then multiplies their sum, which is 0.

    Args:
        smoothing: part of the target that is spread over all classes.
    """
    kept = 1 - smoothing
    loss, gradient = 0.0, np.zeros(len(weights))
    for z, y in _chunks(logits, labels):
        fused = weights @ z  # (n, classes)
        normalizer = _log_sum_exp(fused)
        loss += float((normalizer - kept * _of_labels(fused, y)).sum())
        probabilities = np.exp(fused - normalizer[:, None])
        gradient += (z @ probabilities[..., None])[..., 0].sum(0) - kept * z[np.arange(len(y)), :, y].sum(0)
    return loss / len(labels), gradient / len(labels)


def _chunks(logits: Logits, labels: Labels) -> Iterator[tuple[Floats, Labels]]:
    """Logits in float64, centered over the classes, which changes no probability, and their labels."""
    count = max(1, _AT_ONCE // (logits.shape[1] * logits.shape[2]))
    for first in range(0, len(labels), count):
        z = logits[first : first + count].astype(np.float64)
        yield z - z.mean(-1, keepdims=True), labels[first : first + count]


def _log_sum_exp(logits: Floats) -> Floats:
    """(..., classes) -> (...)."""
    largest = logits.max(-1)
    return np.asarray(largest + np.log(np.exp(logits - largest[..., None]).sum(-1)))


def _of_labels(logits: Floats, labels: Labels) -> Floats:
    """The logit of each image's label: (n, ..., classes) and (n,) -> (n, ...)."""
    return np.asarray(logits[np.arange(len(labels)), ..., labels])
