"""What is kept of every image on its rank, until it is gathered on rank 0."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bandsplit import seeds
from bandsplit.data.source import Images
from bandsplit.distributed.ranks import Ranks
from bandsplit.models.ranking import likeliest
from bandsplit.runs.predictions import TOP

LIMIT = 2**33
"""Bytes of logits that are gathered on one rank."""


@dataclass(frozen=True, eq=False)
class Gathered:
    """Some images of a data set, in its order, and one row of every column for each."""

    rows: NDArray[np.int64]
    """(N,), numbers of the images."""
    labels: NDArray[np.int32]
    """(N,), class indices."""
    columns: dict[str, NDArray[np.generic]]
    """(N, …) each."""


class Collector:
    """Rows of named columns for the images of this rank, kept on the host."""

    def __init__(self, wanted: NDArray[np.bool_]) -> None:
        """`wanted`: (images,), which images of the data set to keep."""
        self._wanted = wanted
        self._rows: list[NDArray[np.int64]] = []
        self._columns: dict[str, list[Tensor]] = {}

    def add(self, rows: NDArray[np.int64], labels: Tensor, **columns: Tensor) -> None:
        """A batch: which images of the data set it holds (B,), their labels (B,), and columns (B, …).

        Images with a negative label do not count.
        """
        keep = (labels >= 0).cpu().numpy() & self._wanted[rows]
        self._rows.append(rows[keep])
        chosen = torch.from_numpy(keep).to(labels.device)
        for name, column in columns.items():
            self._columns.setdefault(name, []).append(column[chosen].cpu())

    def gathered(self, files: Images, ranks: Ranks) -> Gathered | None:
        """What all ranks have kept of these images, on rank 0, None on the others; every rank calls it."""
        rows = ranks.at_first(torch.from_numpy(np.concatenate(self._rows)))
        columns = {name: ranks.at_first(torch.cat(kept).contiguous()) for name, kept in self._columns.items()}
        if not ranks.is_first:
            return None
        numbers = torch.cat(rows).numpy()
        order = np.argsort(numbers)
        numbers = numbers[order]
        return Gathered(
            numbers,
            np.asarray(files.labels, dtype=np.int32)[numbers],
            {name: torch.cat(parts).numpy()[order] for name, parts in columns.items()},
        )


def half(logits: Tensor) -> Tensor:
    """Logits (branches, B, classes) -> (B, branches, classes), float16, less the largest of each branch and image.

    Softmax does not change. Rounding is finest next to 0, so that classes that are almost equally likely stay apart.
    """
    shifted = logits - logits.amax(-1, keepdim=True)
    return shifted.transpose(0, 1).clamp(min=-65504).half()  # float16 ends there


def top(fused: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Fused logits (fusions, B, classes) and labels (B,) -> columns of `Fused`: classes, confidences and losses."""
    best = likeliest(fused, TOP)
    log_probabilities = fused.double().log_softmax(-1)
    of_label = log_probabilities[:, torch.arange(len(labels)), labels.clamp(min=0)]
    return {
        "classes": best.transpose(0, 1).int(),
        "confidences": log_probabilities.gather(-1, best).exp().transpose(0, 1).float(),
        "losses": -of_label.transpose(0, 1).float(),
    }


def fitting(images: int, branches: int, classes: int) -> int:
    """For how many of the images logits may be gathered."""
    return min(images, LIMIT // (2 * branches * classes))


def sample(images: int, count: int, seed: int) -> NDArray[np.bool_]:
    """(images,): `count` of the images, drawn by the seed; all if there are not more."""
    chosen = np.random.default_rng(seeds.derived(seed, "predictions")).permutation(images)[:count]
    wanted = np.zeros(images, dtype=np.bool_)
    wanted[chosen] = True
    return wanted
