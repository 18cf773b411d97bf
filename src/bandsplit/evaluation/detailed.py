"""Evaluation of a trained ensemble: accuracy and calibration of every fusion, every branch, and from branch 0 up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bandsplit.data.source import AnyValidationLoader
from bandsplit.distributed.mesh import Mesh
from bandsplit.evaluation.evaluate import count_of, outputs, seen
from bandsplit.evaluation.measures import (
    ONE_LABEL,
    Sums,
    Truth,
    are_correct,
    averaged,
    calibration,
    count_correct,
    sum_of_losses,
)
from bandsplit.evaluation.predictions import Recorder
from bandsplit.models.ensemble import Ensemble, fuse
from bandsplit.models.fusion import MEAN
from bandsplit.models.precision import Precision
from bandsplit.statistics import calibration_error, gain_interval


@dataclass(frozen=True)
class Fused:
    """One fusion over all images: mean cross-entropy, and the rest in percent."""

    loss: float | None
    """None where images have several labels."""
    top1: float
    top5: float
    ece: float
    """Expected calibration error."""
    gain: float
    """Top-1 above that of the mean."""
    gain_interval: tuple[float, float]
    """95 % interval of `gain`; see `gain_interval` of `statistics`."""
    order: list[int]
    """Branches by weight, largest first, without those of weight 0."""
    cumulative_top1: list[float]
    """Entry n: of the first n + 1 branches in this order."""
    cumulative_top5: list[float]


@dataclass(frozen=True)
class Restricted:
    """Accuracies in percent when only the classes of the images can be predicted."""

    classes: int
    """How many these are."""
    top1: dict[str, float]
    """Of each fusion."""
    top5: dict[str, float]
    branch_top1: list[float]
    branch_top5: list[float]


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in percent."""

    images: int
    left_out: int
    """Images that could not be decoded, and are not among the `images`."""
    fused: dict[str, Fused]
    branch_top1: list[float]
    branch_top5: list[float]
    restricted: Restricted | None = None
    """None where the images are of all classes."""


@torch.inference_mode()
def evaluate_in_detail(
    ensemble: Ensemble,
    loader: AnyValidationLoader,
    images: int,
    mesh: Mesh,
    precision: Precision,
    weights: Mapping[str, Sequence[float]],
    recorder: Recorder | None = None,
    truth: Truth = ONE_LABEL,
) -> Evaluation:
    """Evaluates the mean and other fusions over the images of all ranks in one pass and one reduction.

    With several crops, the probabilities of the fused logits, and of each branch alone, are averaged over them.

    Args:
        images: number of images in total.
        weights: of the branches, for each further fusion.
        recorder: takes the predictions for this rank's images.
        truth: which classes are right for the images.
    """
    count = len(ensemble.branches)
    fusions = {MEAN: [1 / count] * count, **weights}
    orders = {name: _by_weight(w) for name, w in fusions.items()}
    on_device = {name: torch.tensor(w, device=mesh.ranks.device) for name, w in weights.items()}
    sums = Sums()
    batches = outputs(ensemble, loader, mesh, precision)
    for number, crops in enumerate(zip(*[batches] * loader.crops, strict=True)):
        logits = torch.stack([logits for logits, _ in crops], dim=1)  # (branches, crops, B, classes)
        labels = torch.stack([labels for _, labels in crops]).amin(0)  # an image may have gone bad between two crops
        together = {MEAN: fuse(logits)} | {name: torch.tensordot(w, logits, dims=1) for name, w in on_device.items()}
        fused = {name: averaged(z) for name, z in together.items()}
        correct = partial(count_correct, labels=labels, answers=truth.answers)
        for name, w in fusions.items():
            sums.add(**{f"{name} so far": torch.stack([correct(z) for z in _so_far(logits, w, orders[name])])})
        sums.add(
            **seen(labels),
            branches=correct(averaged(logits)),
            **_of_fusions(fused, labels, truth.answers),
        )
        if truth.among is not None:
            every = torch.cat([torch.stack([*together.values()]), logits])
            sums.add(among=correct(averaged(every.masked_fill(~truth.among, -math.inf))))
        if recorder is not None:
            recorder.add(loader.rows(number * loader.crops), logits, fused, labels)
    total = sums.over(mesh.ranks)
    counted = count_of(total, images)
    return Evaluation(
        counted,
        images - counted,
        {name: _fused(total, name, w, orders[name], counted) for name, w in fusions.items()},
        *_percent(total["branches"], counted),
        None if truth.among is None else _restricted(total["among"], [*fusions], int(truth.among.sum()), counted),
    )


def _by_weight(weights: Sequence[float]) -> list[int]:
    """Branches, largest weight first, without those of weight 0, unless all have it."""
    order = np.argsort(-np.array(weights), kind="stable").tolist()
    return [k for k in order if weights[k]] or order


def _so_far(logits: Tensor, weights: Sequence[float], order: Sequence[int]) -> Iterator[Tensor]:
    """Fused logits (B, classes) of the first branches in an order, one more each time.

    They are scaled as if the weights of these branches had the sum of all.
    """
    total, used, fused = sum(weights), 0.0, torch.zeros_like(logits[0])
    for k in order:
        fused += weights[k] * logits[k]
        used += weights[k]
        yield averaged(fused * (total / used) if used else fused)


def _of_fusions(fused: Mapping[str, Tensor], labels: Tensor, answers: Tensor | None) -> dict[str, Tensor]:
    """Sums of each fusion: of losses, of correct images within 1 and 5, by confidence, and only correct by it or by the
    mean."""
    sums: dict[str, Tensor] = {}
    by_mean = are_correct(fused[MEAN], labels, answers)[:, 0]
    for name, logits in fused.items():
        correct = are_correct(logits, labels, answers)
        sums |= {
            f"{name} correct": correct.sum(0),
            f"{name} bins": calibration(logits, labels, answers),
            f"{name} alone": torch.stack([(correct[:, 0] & ~by_mean).sum(), (by_mean & ~correct[:, 0]).sum()]),
        }
        if answers is None:
            sums[f"{name} loss"] = sum_of_losses(logits, labels)
    return sums


def _fused(total: Mapping[str, Any], name: str, weights: Sequence[float], order: list[int], images: int) -> Fused:
    top1, top5 = (100 * count / images for count in total[f"{name} correct"])
    better, worse = total[f"{name} alone"]
    return Fused(
        total[f"{name} loss"] / images if f"{name} loss" in total else None,
        top1,
        top5,
        calibration_error(total[f"{name} bins"]),
        100 * (better - worse) / images,
        gain_interval(weights, better, worse, images),
        order,
        *_percent(total[f"{name} so far"], images),
    )


def _restricted(counts: Sequence[Sequence[float]], fusions: Sequence[str], classes: int, images: int) -> Restricted:
    """`counts`: of every fusion, and then of every branch."""
    top1, top5 = _percent(counts, images)
    of_fusions = [dict(zip(fusions, top, strict=False)) for top in (top1, top5)]
    return Restricted(classes, of_fusions[0], of_fusions[1], top1[len(fusions) :], top5[len(fusions) :])


def _percent(counts: Sequence[Sequence[float]], images: int) -> tuple[list[float], list[float]]:
    """Top-1 and top-5 in percent, from one pair of counts for each."""
    top1, top5 = ([100 * pair[i] / images for pair in counts] for i in (0, 1))
    return top1, top5
