"""Which images of a class are held out for validation: chosen by the seed and the names alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bandsplit.seeds import derived


def chosen(names: Sequence[str], count: int, seed: int, name: str) -> set[str]:
    """`count` of the images of the class `name`, whatever order they come in."""
    rng = np.random.default_rng(derived(seed, f"held out of {name!a}"))
    return {sorted(names)[index] for index in rng.choice(len(names), count, replace=False)}
