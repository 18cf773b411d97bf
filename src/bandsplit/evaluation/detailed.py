"""Evaluation of a trained ensemble: accuracy and calibration of every fusion, every branch, and from branch 0 up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bandsplit.data.source import AnyValidationLoader
from bandsplit.distributed.mesh import Mesh
from bandsplit.evaluation.evaluate import count_of, outputs, seen
from bandsplit.evaluation.measures import (
    Sums,
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
from bandsplit.statistics import calibration_error, paired_interval


@dataclass(frozen=True)
class Fused:
    """One fusion over all images: mean cross-entropy, and the rest in percent."""

    loss: float
    top1: float
    top5: float
    ece: float
    """Expected calibration error."""
    gain: float
    """Top-1 above that of the mean."""
    gain_interval: tuple[float, float]
    """95 % interval of `gain`; see `paired_interval`."""


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in percent."""

    images: int
    left_out: int
    """Images that could not be decoded, and are not among the `images`."""
    fused: dict[str, Fused]
    branch_top1: list[float]
    branch_top5: list[float]
    cumulative_top1: list[float]
    """Entry k: of the mean of branches 0 to k."""
    cumulative_top5: list[float]


@torch.inference_mode()
def evaluate_in_detail(
    ensemble: Ensemble,
    loader: AnyValidationLoader,
    images: int,
    mesh: Mesh,
    precision: Precision,
    weights: Mapping[str, Sequence[float]],
    recorder: Recorder | None = None,
) -> Evaluation:
    """Evaluates the mean and other fusions over the images of all ranks in one pass and one reduction.

    With several crops, the probabilities of the fused logits, and of each branch alone, are averaged over them.

    Args:
        images: number of images in total.
        weights: of the branches, for each further fusion.
        recorder: takes the predictions for this rank's images.
    """
    on_device = {name: torch.tensor(given, device=mesh.ranks.device) for name, given in weights.items()}
    sums = Sums()
    batches = outputs(ensemble, loader, mesh, precision)
    for number, crops in enumerate(zip(*[batches] * loader.crops, strict=True)):
        logits = torch.stack([logits for logits, _ in crops], dim=1)  # (branches, crops, B, classes)
        labels = torch.stack([labels for _, labels in crops]).amin(0)  # an image may have gone bad between two crops
        fused = {MEAN: averaged(fuse(logits))}
        fused |= {name: averaged(torch.tensordot(w, logits, dims=1)) for name, w in on_device.items()}
        cumulative = [count_correct(averaged(fuse(logits[: k + 1])), labels) for k in range(len(logits))]
        sums.add(
            **seen(labels),
            branches=count_correct(averaged(logits), labels),
            cumulative=torch.stack(cumulative),
            **_of_fusions(fused, labels),
        )
        if recorder is not None:
            recorder.add(loader.rows(number * loader.crops), logits, fused, labels)
    total = sums.over(mesh.ranks)
    counted = count_of(total, images)
    (branch_top1, branch_top5), (cumulative_top1, cumulative_top5) = (
        [[100 * counts[i] / counted for counts in total[key]] for i in (0, 1)] for key in ("branches", "cumulative")
    )
    return Evaluation(
        counted,
        images - counted,
        {name: _fused(total, name, counted) for name in (MEAN, *weights)},
        branch_top1,
        branch_top5,
        cumulative_top1,
        cumulative_top5,
    )


def _of_fusions(fused: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """Sums of each fusion: of losses, of correct images within 1 and 5, by confidence, and only correct by it or by the
    mean."""
    sums: dict[str, Tensor] = {}
    by_mean = are_correct(fused[MEAN], labels)[:, 0]
    for name, logits in fused.items():
        correct = are_correct(logits, labels)
        sums |= {
            f"{name} loss": sum_of_losses(logits, labels),
            f"{name} correct": correct.sum(0),
            f"{name} bins": calibration(logits, labels),
            f"{name} alone": torch.stack([(correct[:, 0] & ~by_mean).sum(), (by_mean & ~correct[:, 0]).sum()]),
        }
    return sums


def _fused(total: Mapping[str, Any], name: str, images: int) -> Fused:
    top1, top5 = (100 * count / images for count in total[f"{name} correct"])
    better, worse = total[f"{name} alone"]
    return Fused(
        total[f"{name} loss"] / images,
        top1,
        top5,
        calibration_error(total[f"{name} bins"]),
        100 * (better - worse) / images,
        paired_interval(better, worse, images),
    )
