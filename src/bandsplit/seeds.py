"""Seeds for everything random, from the run's seed and what the numbers are for: never from the clock."""

from __future__ import annotations

import zlib

import numpy as np


def derived(seed: int, purpose: str, index: int = 0) -> int:
    """A seed in 0 .. 2³¹-1 for one purpose ("order", "augmentation", "weights", …) and one rank or branch of it."""
    entropy = [seed, zlib.crc32(purpose.encode()), index]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)
