"""Held-out images: training images that a run does not train on, on which fusion is fitted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from bandsplit import seeds
from bandsplit.config.schema import RunConfig
from bandsplit.errors import UserError


class Taking(Protocol):
    """Images of a part of a data set, of which some can be taken."""

    @property
    def labels(self) -> Sequence[int] | NDArray[np.int32]: ...
    @property
    def classes(self) -> list[str]: ...
    def taken(self: F, rows: NDArray[np.int64]) -> F: ...


F = TypeVar("F", bound=Taking)


def split(files: F, config: RunConfig) -> tuple[F, F]:
    """The training images of a run, and those that are held out (`data.holdout`), both in the order of `files`.

    A function of the list of images and the run's seed, the same on every rank. Both parts keep the whole index.
    Raises UserError as `held_out` does.
    """
    if config.data.holdout is None:
        return files, files.taken(np.zeros(0, dtype=np.int64))
    out = held_out(files.labels, files.classes, config.data.holdout, config.seed)
    return files.taken(np.flatnonzero(~out)), files.taken(np.flatnonzero(out))


def held_out(
    labels: Sequence[int] | NDArray[np.int32], classes: Sequence[str], holdout: int | float, seed: int
) -> NDArray[np.bool_]:
    """(N,), which images are held out.

    Args:
        labels: (N,), indices into `classes`.
        holdout: a number of images of each class, or a fraction of them, which is rounded.

    Raises UserError if a class has not more images than this number, and if no image is held out.
    """
    labels = np.asarray(labels)
    images = np.bincount(labels, minlength=len(classes))
    spent = np.flatnonzero((images > 0) & (images <= holdout))
    if isinstance(holdout, int) and len(spent):
        raise UserError(
            f"data.holdout: {holdout} given, but class {classes[spent[0]]} has only {images[spent[0]]} images"
        )
    share = holdout if isinstance(holdout, int) else np.rint(holdout * images).astype(np.int64)
    counts = np.minimum(share, np.maximum(images - 1, 0))  # each class keeps one to train on
    if not counts.any():
        raise UserError(f"data.holdout: {holdout} given, which is no image of any class")
    draw = np.random.default_rng(seeds.derived(seed, "holdout")).random(len(labels))
    order = np.lexsort((draw, labels))  # class by class, shuffled within each
    place = np.arange(len(labels)) - (np.cumsum(images) - images)[labels[order]]
    out = np.zeros(len(labels), dtype=np.bool_)
    out[order[place < counts[labels[order]]]] = True
    return out
