"""Random seeds, derived from the run's seed and a purpose, never from the clock."""

from __future__ import annotations

import zlib

import numpy as np


def derived(seed: int, purpose: str, index: int = 0) -> int:
    """A seed in 0 .. 2³¹-1 for a purpose ("order", "augmentation", "weights", …) and the index of a stream or branch.

    Uses numpy's SeedSequence, so the seeds of different purposes and indices are statistically independent.
    """
    entropy = [seed, zlib.crc32(purpose.encode()), index]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)
