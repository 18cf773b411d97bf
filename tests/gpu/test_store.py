"""Batches from a band store on the GPU, against those on the CPU, which tests/data/test_store.py tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bandsplit.data.pipeline import Shard
from bandsplit.data.store.reader import BandLoader, ahead
from tests.data.test_store import Packed, bands, from_store, packed, parts_of

__all__ = ["packed"]  # the fixture

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("keys", [(), ("split.transform=dct1d", "split.norm=none")], ids=["dct2d", "dct1d"])
def test_batches_are_those_of_the_cpu(
    config_file: Path, packed: Packed, dtype: bands.Dtype, half: bool, keys: tuple[str, ...]
) -> None:
    config = from_store(config_file, packed(dtype, *keys), *keys)
    train = parts_of(config)[0]
    on_cpu, on_gpu = (BandLoader(config, train, [Shard(0, 1, 12, 1, device, half)]) for device in (None, 0))
    for _ in range(20):
        expected, batch = next(on_cpu), next(on_gpu)
        assert batch.labels.tolist() == expected.labels.tolist()
        for x, y in zip(batch.inputs, expected.inputs, strict=True):
            assert x.is_cuda
            assert x.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(x.cpu(), y, rtol=1e-3 if half else 1e-5, atol=1e-3 if half else 1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_thread_that_reads_takes_no_memory_of_another_gpu() -> None:
    """Its current device is the rank's own."""
    assert [*ahead(lambda _: torch.cuda.current_device(), [0, 1], 1, gpu=1)] == [1, 1]
