"""Which images make up which batch: a function of the seed and the batch number alone."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bandsplit import seeds

Indices = NDArray[np.int64]


class TrainingOrder:
    """An endless sequence of shuffled passes over `count` images, dealt to equal streams in chunks of a batch.

    Batch b of stream s of n takes places (b·n + s)·B to (b·n + s + 1)·B of the sequence, for a batch size B per stream.
    So step b takes the same images however many streams share the global batch n·B, every image comes once per pass,
    and a batch may span two passes.  With `repeats` a batch holds each of its first ceil(B / repeats) images up to that
    many times and skips the others, so that an epoch has as many steps as without.
    """

    def __init__(self, count: int, batch_size: int, seed: int, stream: int = 0, streams: int = 1, repeats: int = 1):
        self._count, self._batch_size, self._seed = count, batch_size, seed
        self._stream, self._streams = stream, streams
        self._slots = np.array(repeated_indices(batch_size, repeats)) if repeats > 1 else np.arange(batch_size)
        self._pass = lru_cache(2)(self._shuffled)

    def batch(self, number: int) -> Indices:
        """Indices (B,) of the images of a batch, which is counted from 0."""
        places = (number * self._streams + self._stream) * self._batch_size + self._slots
        passes, offsets = np.divmod(places, self._count)
        indices = np.empty(self._batch_size, dtype=np.int64)
        for number in np.unique(passes).tolist():
            indices[passes == number] = self._pass(number)[offsets[passes == number]]
        return indices

    def _shuffled(self, number: int) -> NDArray[np.int32]:
        return np.random.default_rng(seeds.derived(self._seed, "order", number)).permutation(
            np.arange(self._count, dtype=np.int32)
        )


class ValidationOrder:
    """The images in their order, every n-th to each of n ranks, with equally many batches on every rank.

    What is missing in the last batches is filled up by repeating this rank's last image. Each batch comes `repeats`
    times in a row.
    """

    def __init__(self, count: int, batch_size: int, rank: int = 0, world_size: int = 1, repeats: int = 1):
        self._own = np.arange(rank, count, world_size)
        self._padded = self._own if len(self._own) else np.zeros(1, dtype=np.int64)
        self._batch_size, self._repeats = batch_size, repeats
        self.batches = math.ceil(count / world_size / batch_size) * repeats

    def batch(self, number: int) -> Indices:
        """Indices (B,) of the images of a batch, padding included; beyond the last batch it begins again."""
        first = number % self.batches // self._repeats * self._batch_size
        return self._padded[np.minimum(np.arange(first, first + self._batch_size), len(self._padded) - 1)]

    def own(self, number: int) -> int:
        """How many images of a batch are no padding."""
        return min(max(0, len(self._own) - number // self._repeats * self._batch_size), self._batch_size)


def repeated_indices(batch_size: int, repeats: int) -> list[int]:
    """Which of the first ceil(B / repeats) images is at each place of a batch of B, each at most `repeats` times.

    Mixup and CutMix pair an image with its neighbor, and the first one with the last.  So copies are placed round by
    round, and no image is paired with its own copy, unless that cannot be avoided: with one image, or with two in a
    batch of odd size.
    """
    images = math.ceil(batch_size / repeats)
    whole_rounds = batch_size - batch_size % images
    # an incomplete last round skips the first image, which it would be paired with
    return [i % images + (i >= whole_rounds) for i in range(batch_size)]
