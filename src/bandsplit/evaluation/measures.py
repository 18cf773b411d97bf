"""Sums over images, from which accuracy, loss and calibration follow: kept on the device, reduced over ranks once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from bandsplit.distributed.ranks import Ranks
from bandsplit.models.ranking import likeliest
from bandsplit.statistics import BINS


class Sums:
    """Named sums in float64, in which counts are exact."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value.double() if name in self._sums else value.double()

    def over(self, ranks: Ranks) -> dict[str, Any]:
        """The sums over all ranks, as numbers and nested lists. Every rank calls it, with the same names."""
        together = ranks.sum(torch.cat([value.flatten() for value in self._sums.values()]))
        parts = torch.split(together, [value.numel() for value in self._sums.values()])
        return {
            name: part.view_as(value).tolist() for (name, value), part in zip(self._sums.items(), parts, strict=True)
        }


def averaged(logits: Tensor) -> Tensor:
    """Logits of several crops (..., crops, B, classes) -> log of their mean probabilities (..., B, classes).

    Of a single crop, its logits.
    """
    crops = logits.shape[-3]
    if crops == 1:
        return logits.squeeze(-3)
    return logits.log_softmax(-1).logsumexp(-3) - math.log(crops)


@dataclass(frozen=True)
class Truth:
    """Which classes are right for the images of a data set, where that is more than a label for each."""

    answers: Tensor | None = None
    """(labels, classes), bool, where several classes may be right for a label; None: labels are classes."""
    among: Tensor | None = None
    """(classes,), bool: the classes of the data set, where it lacks some of the network's; None: all."""


ONE_LABEL = Truth()
"""Every image has one label, and all classes have images."""


def are_right(predicted: Tensor, labels: Tensor, answers: Tensor | None = None) -> Tensor:
    """Predicted classes (..., B, n) and labels (B,) -> (..., B, n), bool; `answers` as `Truth` has them.

    Nothing is right for a negative label.
    """
    if answers is None:
        return predicted == labels[:, None]
    right = answers[labels.clamp(min=0)] & (labels >= 0)[:, None]  # (B, classes)
    return right.expand(*predicted.shape[:-1], -1).gather(-1, predicted)


def are_correct(logits: Tensor, labels: Tensor, answers: Tensor | None = None) -> Tensor:
    """Logits (..., B, classes) and labels (B,) -> (..., B, 2), bool: correct within the top 1 and the top 5."""
    top = are_right(likeliest(logits, 5), labels, answers)
    return torch.stack([top[..., 0], top.any(-1)], dim=-1)


def count_correct(logits: Tensor, labels: Tensor, answers: Tensor | None = None) -> Tensor:
    """Logits (..., B, classes) and labels (B,) -> (..., 2): correct within the top 1 and the top 5."""
    return are_correct(logits, labels, answers).sum(-2)


def sum_of_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (B, classes), summed over the images whose label is not negative; float64."""
    return cross_entropy(logits.double(), labels.clamp(min=-1), reduction="sum", ignore_index=-1)


def calibration(logits: Tensor, labels: Tensor, answers: Tensor | None = None) -> Tensor:
    """Logits (B, classes) -> (BINS, 3), float64: images, correct ones and sum of confidences by confidence.

    The confidence is the largest probability of the softmax. Bin i holds those in (i / BINS, (i + 1) / BINS].
    """
    confidence = logits.double().softmax(-1).amax(-1)
    inner = torch.linspace(0, 1, BINS + 1, dtype=torch.float64, device=logits.device)[1:-1]
    counted = one_hot(torch.bucketize(confidence, inner), BINS) * (labels >= 0)[:, None]
    right = are_right(logits.argmax(-1, keepdim=True), labels, answers)[:, 0]
    each = torch.stack([torch.ones_like(confidence), right.double(), confidence], dim=-1)
    return counted.double().T @ each
