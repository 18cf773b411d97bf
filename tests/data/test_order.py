"""Which images make up which batch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from bandsplit.data import order
from bandsplit.data.order import TrainingOrder, ValidationOrder


@pytest.mark.parametrize("streams", [1, 2, 3, 6])
def test_a_step_has_the_same_images_for_any_number_of_streams(streams: int) -> None:
    alone = TrainingOrder(23, 6, seed=4)
    shared = [TrainingOrder(23, 6 // streams, 4, stream, streams) for stream in range(streams)]
    for step in range(20):
        expected = alone.batch(step)
        assert np.array_equal(np.concatenate([part.batch(step) for part in shared]), expected)


@pytest.mark.parametrize("batch_size", [1, 4, 23, 24, 60])
def test_every_image_comes_once_per_pass(batch_size: int) -> None:
    """Also where a batch spans two passes, or holds more than one."""
    batches = TrainingOrder(23, batch_size, seed=0)
    seen = np.concatenate([batches.batch(n) for n in range(23 * 4)])
    for one_pass in seen[: len(seen) // 23 * 23].reshape(-1, 23):
        assert sorted(one_pass) == list(range(23))
    assert not np.array_equal(seen[:23], seen[23:46])
    assert not np.array_equal(seen[:23], np.arange(23))


def test_any_batch_can_be_asked_for_at_once() -> None:
    one_by_one = TrainingOrder(1000, 7, seed=1, stream=1, streams=2)
    batches = [one_by_one.batch(n) for n in range(500)]
    for n in (499, 3, 250, 71):
        assert np.array_equal(TrainingOrder(1000, 7, seed=1, stream=1, streams=2).batch(n), batches[n])


def test_passes_of_one_seed_and_of_other_seeds_are_independent() -> None:
    """Kendall's tau of two shuffles of 400 is 0 ± 0.033."""
    from scipy.stats import kendalltau

    passes = [TrainingOrder(400, 400, seed).batch(n) for seed in range(3) for n in range(3)]
    for i, first in enumerate(passes):
        for second in passes[:i]:
            assert abs(kendalltau(first, second).statistic) < 5 * 0.034


@pytest.mark.parametrize(
    ("count", "batch_size", "world_size"), [(23, 6, 1), (23, 5, 2), (3, 8, 3), (2, 2, 5), (8, 4, 2)]
)
def test_validation_gives_each_image_once(count: int, batch_size: int, world_size: int) -> None:
    orders = [ValidationOrder(count, batch_size, rank, world_size) for rank in range(world_size)]
    assert len({each.batches for each in orders}) == 1
    for again in (0, 1):
        numbers = [(each, again * each.batches + n, n) for each in orders for n in range(each.batches)]
        seen = Counter(i for each, n, within in numbers for i in each.batch(n)[: each.own(within)].tolist())
        assert seen == Counter(range(count))
        assert all(len(each.batch(n)) == batch_size for each, n, _ in numbers)


def test_copies_are_neighbors_only_where_it_cannot_be_avoided() -> None:
    for batch_size in range(1, 65):
        for repeats in range(2, 9):
            places = order.repeated_indices(batch_size, repeats)
            counts = Counter(places)
            files = len(counts)
            assert counts.keys() == set(range(-(-batch_size // repeats)))
            assert max(counts.values()) <= repeats
            pairs = sum(a == b for a, b in zip(places, places[-1:] + places, strict=False))
            unavoidable = batch_size if files == 1 else batch_size % 2 if files == 2 else 0
            assert pairs == unavoidable, (batch_size, repeats)


def test_repeated_batches_of_validation_come_in_a_row() -> None:
    for rank in range(3):
        once, thrice = (ValidationOrder(23, 4, rank, 3, repeats) for repeats in (1, 3))
        assert thrice.batches == 3 * once.batches
        for n in range(2 * thrice.batches):
            assert np.array_equal(thrice.batch(n), once.batch(n // 3))
        for n in range(thrice.batches):
            assert thrice.own(n) == once.own(n // 3)
