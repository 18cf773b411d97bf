"""What a model says of an image, with all of its bands and branches or with some of them switched off."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bandsplit.inference.classifier import Classifier, Guess
from bandsplit.models.fusion import MEAN
from bandsplit.spectral import transforms


@dataclass(frozen=True, eq=False)
class Answer:
    """The model's answer for one image."""

    confidences: NDArray[np.float64] | None
    """(classes,), probabilities of the fused logits; None: no branch that is on has a weight."""
    votes: list[Guess]
    """The likeliest class of each branch by its own logits, whether it is on or off."""
    logits: Tensor
    """(branches, 1, classes)."""

    def top(self, count: int) -> list[int]:
        """The likeliest classes, best first."""
        assert self.confidences is not None
        return [int(label) for label in np.argsort(-self.confidences, kind="stable")[:count]]


@torch.inference_mode()
def answer(model: Classifier, crop: Tensor, bands: Collection[int], branches: Collection[int]) -> Answer:
    """Classifies an image of which only some bands and branches are on.

    A band that is off is 0 in every block: for a band whose pixels weigh nothing in sum, an image without this
    detail; for the others, the mean color of the training images. Branches that are off have no weight; mean fusion is
    the mean of the others, and fitted weights are kept.

    Args:
        crop: (3, H, W), as `preparation.prepared` returns it.
        bands: those that are on.
        branches: places of those that are on, from 0.
    """
    values = model.split(crop[None])
    off = [band for band in range(len(values)) if band not in bands]
    values[off] = 0
    logits = model.logits_of(transforms.stack(values, model.bands))
    weights = weights_of(model, branches)
    confidences = None
    if weights.any():
        confidences = torch.einsum("k,kbc->bc", weights, logits)[0].double().softmax(-1).numpy()
    return Answer(confidences, model.predictions(logits, 1)[0].votes, logits)


def weights_of(model: Classifier, branches: Collection[int]) -> Tensor:
    """(branches,), those of the fusion with all but these branches off."""
    on = torch.tensor([place in branches for place in range(len(model.bands))])
    if model.description.fusion == MEAN:
        return on / max(1, int(on.sum()))
    return model.weights * on


def bands_read(model: Classifier) -> list[int]:
    """The bands that some branch reads."""
    return sorted({band for bands in model.bands for band in bands})
