"""Predictions of made-up branches, of any number of images, branches and classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from bandsplit.evaluation import collector
from bandsplit.evaluation.measures import are_correct
from bandsplit.models import fusion
from bandsplit.runs.predictions import Branch, Fused, Predictions, Scored


def predictions(
    images: int = 500,
    branches: int = 4,
    classes: int = 10,
    held_out: int = 0,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> Predictions:
    """Branches of one band each, of falling strength; each class is likely taken for the next one.

    With held-out images, all fusions are fitted on these.
    """
    rng = np.random.default_rng(seed)
    scored, out = (_scored(rng, count, branches, classes) for count in (images, held_out))
    fusions = {"mean": [1 / branches] * branches}
    if held_out:
        fusions = {name: each.weights for name, each in fusion.fit(out.logits, out.labels).items()}
    logits = torch.from_numpy(scored.logits).float().transpose(0, 1)
    fused = torch.einsum("fk,knc->fnc", torch.tensor(list(fusions.values())), logits)
    truth = torch.from_numpy(scored.labels).long()
    columns = collector.top(fused, truth)
    block = math.isqrt(branches)
    return Predictions(
        [f"class{label}/{i}.jpg" for i, label in enumerate(scored.labels)],
        scored.labels,
        [f"class{c}" for c in range(classes)],
        list(names) if names else [f"class{c}" for c in range(classes)],
        [Branch("runs/synthetic", 100, (k,)) for k in range(branches)],
        fusions,
        "learned" if held_out else "mean",
        Fused(*(columns[key].numpy() for key in ("classes", "confidences", "losses"))),
        are_correct(logits, truth).transpose(0, 1).numpy(),
        scored.logits,
        out if held_out else None,
        images,
        block if block**2 == branches else branches,
        "dct2d",
        "center",
        None,
    )


def _scored(rng: np.random.Generator, images: int, branches: int, classes: int) -> Scored:
    labels = rng.integers(0, classes, images, dtype=np.int32)
    logits = rng.standard_normal((images, branches, classes)) * 2
    hard = rng.random(classes)[labels]  # some classes are harder than others
    for k in range(branches):
        strength = 5.0 / (1 + k) ** 0.7
        logits[np.arange(images), k, labels] += strength * (1.2 - hard)
        logits[np.arange(images), k, (labels + 1) % classes] += 0.5 * strength * hard
    return Scored(labels, collector.half(torch.from_numpy(logits.transpose(1, 0, 2))).numpy())
