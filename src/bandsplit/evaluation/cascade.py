"""A fitted cascade, run: each stage evaluates its branch on the images that have not left, and is timed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from bandsplit.data.source import AnyValidationLoader
from bandsplit.evaluation.joined import Joined
from bandsplit.evaluation.measures import Sums
from bandsplit.models.cascade import Cascade
from bandsplit.models.costs import forward_macs
from bandsplit.models.ensemble import Ensemble
from bandsplit.progress import followed
from bandsplit.statistics import paired_interval

T = TypeVar("T")


@dataclass(frozen=True)
class Cascaded:
    """A cascade over all images; accuracies in percent."""

    top1: float
    full_top1: float
    """Of learned fusion, of all branches that have a weight in it."""
    gain: float
    """Top-1 above that."""
    gain_interval: tuple[float, float]
    """95 % interval of `gain`, see `paired_interval`; 0 to 0 with one stage, which is learned fusion."""
    left: list[int]
    """Images that leave at each stage."""
    correct: list[int]
    """Those of them that are classified correctly."""
    branches: float
    """Branches evaluated per image, mean."""
    macs: float
    """Multiply-accumulates per image, mean."""
    all_macs: int
    """Those of learned fusion."""
    seconds: float
    """Time of all forward passes, summed over the ranks."""
    all_seconds: float
    """That of learned fusion for all images."""


class Staged:
    """A cascade on a stream of images: each stage waits for a full batch of images that have not left before it."""

    def __init__(self, ensemble: Ensemble, cascade: Cascade, batch_size: int) -> None:
        """`ensemble`: all branches, in evaluation mode."""
        self._branches = [ensemble.branches[k] for k in cascade.order]
        self._cascade, self._batch_size = cascade, batch_size
        self._waiting: list[_Images | None] = [None] * len(cascade.order)
        self._count = 0
        self._left: list[tuple[Tensor, Tensor, int]] = []

    def add(self, inputs: Sequence[Tensor]) -> None:
        """Inputs (B, 3·bands, h, w), one per branch of the ensemble, of the next B images."""
        batch = len(inputs[0])
        rows = torch.arange(self._count, self._count + batch, device=inputs[0].device)
        self._count += batch
        if not batch:  # a rank may have no image at all
            self._left.append((rows, rows, 0))
            return
        self._enter(0, _Images(rows, [inputs[k] for k in self._cascade.order], torch.zeros_like(rows)[:, None]))

    def finish(self) -> tuple[Tensor, Tensor]:
        """Evaluates what still waits -> predicted classes (N,), and at which stage each image has left (N,)."""
        for stage, images in enumerate(self._waiting):
            if images is not None:
                self._evaluate(stage, images)
        rows, predicted, stages = zip(*self._left, strict=True)
        order = torch.cat(rows).argsort()
        of_images = torch.cat([torch.full_like(r, stage) for r, stage in zip(rows, stages, strict=True)])
        return torch.cat(predicted)[order], of_images[order]

    def _enter(self, stage: int, images: _Images) -> None:
        before = self._waiting[stage]
        waiting = images if before is None else before.and_then(images)
        while len(waiting) >= self._batch_size:
            self._evaluate(stage, waiting.taken(slice(self._batch_size)))
            waiting = waiting.taken(slice(self._batch_size, None))
        self._waiting[stage] = waiting if len(waiting) else None

    def _evaluate(self, stage: int, images: _Images) -> None:
        cascade, (x, *others) = self._cascade, images.inputs
        fused = images.fused + cascade.weights[stage] * self._branches[stage](x).float()
        leave = (cascade.scales[stage] * fused).softmax(-1).amax(-1) > cascade.threshold
        leave |= stage == len(cascade.order) - 1
        self._left.append((images.rows[leave], fused[leave].argmax(-1), stage))
        if not bool(leave.all()):
            self._enter(stage + 1, _Images(images.rows, others, fused).taken(~leave))


@dataclass(frozen=True, eq=False)
class _Images:
    """B images on their way through the stages."""

    rows: Tensor
    """(B,), their numbers."""
    inputs: list[Tensor]
    """(B, 3·bands, h, w), one per stage that is still to come."""
    fused: Tensor
    """(B, classes), logits of the stages before."""

    def __len__(self) -> int:
        return len(self.rows)

    def taken(self, which: Tensor | slice) -> _Images:
        inputs = [x[which].contiguous(memory_format=torch.channels_last) for x in self.inputs]
        return _Images(self.rows[which], inputs, self.fused[which])

    def and_then(self, others: _Images) -> _Images:
        inputs = [torch.cat(pair) for pair in zip(self.inputs, others.inputs, strict=True)]
        return _Images(torch.cat([self.rows, others.rows]), inputs, torch.cat([self.fused, others.fused]))


@torch.inference_mode()
def run(runs: Joined, loader: AnyValidationLoader, cascade: Cascade) -> Cascaded:
    """Evaluates the cascade, and learned fusion of all its branches, on the same batches; every rank calls it.

    The forward passes of the two are timed batch by batch, and take turns in being first. Each rank has all branches,
    and evaluates its share of the images.
    """
    ensemble = runs.ensemble.eval()
    used = Ensemble(ensemble.branches[k] for k in cascade.order)  # the others have no weight
    weights = torch.tensor(cascade.weights, device=runs.ranks.device)[:, None, None]

    def at_once(inputs: Sequence[Tensor]) -> Tensor:
        logits: Tensor = used([inputs[k] for k in cascade.order])
        return (weights * logits).sum(0).argmax(-1)

    labels: list[Tensor] = []
    full: list[Tensor] = []
    seconds = all_seconds = 0.0
    staged: Staged | None = None
    batches = followed(loader, "cascade", len(loader), "batches", runs.ranks.is_first)
    for number, batch in enumerate(batches):
        counts = batch.labels >= 0
        labels.append(batch.labels[counts])
        inputs = [x[counts] for x in batch.inputs]
        if staged is None:
            _warm_up(cascade, ensemble, inputs, runs)
            staged = Staged(ensemble, cascade, len(batch))
        if number % 2:
            seconds += _timed(partial(staged.add, inputs), runs)[1]
        predicted, took = _timed(partial(at_once, inputs), runs)
        all_seconds += took
        full.append(predicted)
        if not number % 2:
            seconds += _timed(partial(staged.add, inputs), runs)[1]
    assert staged is not None
    (predicted, left), took = _timed(staged.finish, runs)
    sums = _sums(torch.cat(labels), torch.cat(full), predicted, left, len(cascade.order))
    sums.add(seconds=torch.tensor([seconds + took, all_seconds], dtype=torch.float64, device=runs.ranks.device))
    return _result(sums.over(runs.ranks), branch_macs(runs), cascade)


def _warm_up(cascade: Cascade, ensemble: Ensemble, inputs: Sequence[Tensor], runs: Joined) -> None:
    """Memory is allocated, and algorithms are chosen, before any time is taken."""
    with runs.precision.autocast():
        ensemble(inputs)
        staged = Staged(ensemble, cascade, len(inputs[0]))
        staged.add(inputs)
        staged.finish()


def _sums(labels: Tensor, full: Tensor, predicted: Tensor, left: Tensor, stages: int) -> Sums:
    correct, full_correct = predicted == labels, full == labels
    sums = Sums()
    sums.add(
        left=left.bincount(minlength=stages),
        correct=left[correct].bincount(minlength=stages),
        full_correct=full_correct.sum(),
        alone=torch.stack([(correct & ~full_correct).sum(), (full_correct & ~correct).sum()]),
    )
    return sums


def branch_macs(runs: Joined) -> list[int]:
    """Multiply-accumulates of each branch for one validation image."""
    size = runs.config.data.val_size // runs.config.split.block
    return [
        forward_macs(copy.deepcopy(branch).to("meta"), 3 * len(bands), size)
        for branch, bands in zip(runs.ensemble.branches, runs.config.split.groups, strict=True)
    ]


def _result(total: dict[str, Any], macs: Sequence[int], cascade: Cascade) -> Cascaded:
    left, correct = ([int(count) for count in total[key]] for key in ("left", "correct"))
    images = sum(left)
    per_stage = np.cumsum([macs[k] for k in cascade.order])
    better, worse = total["alone"]
    return Cascaded(
        100 * sum(correct) / images,
        100 * total["full_correct"] / images,
        100 * (better - worse) / images,
        paired_interval(better, worse, images) if len(left) > 1 else (0.0, 0.0),
        left,
        correct,
        float(np.arange(1, len(left) + 1) @ left) / images,
        float(per_stage @ left) / images,
        int(per_stage[-1]),
        *total["seconds"],
    )


def _timed(work: Callable[[], T], runs: Joined) -> tuple[T, float]:
    """What `work` returns, and the seconds until the device has done it."""
    runs.ranks.synchronize()
    start = time.perf_counter()
    with runs.precision.autocast():
        result = work()
    runs.ranks.synchronize()
    return result, time.perf_counter() - start
