"""Throughput of a validation and of its networks, and the latency of a single image."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bandsplit.evaluation.joined import Joined
from bandsplit.spectral import transforms
from bandsplit.spectral.view import View

_WARM_UP, _LEAST = 3, 10
"""Repetitions before a measurement, and its smallest number of them."""

_SECONDS = 3.0
"""That a measurement takes, if that is enough for `_LEAST` repetitions."""


@dataclass(frozen=True)
class Speed:
    """Images per second of all ranks together, and milliseconds for one image on one rank."""

    images_per_second: float
    """Of the validation: reading, decoding, split, networks and counts."""
    networks_images_per_second: float
    """Of the networks alone, on random inputs."""
    batch_size: int
    """Images per rank of both."""
    latency_ms: float
    """Median from an image (1, H, W, 3), uint8, on the device to its fused logits, split in plain torch included."""
    latency_p95_ms: float
    """95th percentile."""


@torch.inference_mode()
def measure(runs: Joined, images_per_second: float, weights: Sequence[float]) -> Speed:
    """Every rank calls it; the latency is measured on rank 0 while the others wait.

    Args:
        images_per_second: of the validation.
        weights: of the branches in the fused logits.
    """
    ranks, split = runs.ranks, runs.config.split
    view, size = View.of(runs.config), runs.config.data.val_size
    matrix = torch.from_numpy(view.matrix).to(ranks.device, torch.float32)
    fusion = torch.tensor(weights, device=ranks.device)
    dtype = torch.float16 if runs.precision.half_bands else torch.float32

    def fused(inputs: Sequence[Tensor]) -> Tensor:
        with runs.precision.autocast():
            logits: Tensor = torch.tensordot(fusion, runs.ensemble(inputs), dims=1)
        return logits

    def split_and_fused(image: Tensor) -> Tensor:
        return fused(
            transforms.split_images(image, matrix, split.block, view.mean, view.std, groups=split.groups, dtype=dtype)
        )

    runs.ensemble.eval()
    image = torch.randint(0, 256, (1, size, size, 3), dtype=torch.uint8, device=ranks.device)
    side = size // split.block
    inputs = [
        torch.randn(runs.batch_size, 3 * len(group), side, side, device=ranks.device)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for group in split.groups
    ]
    ranks.wait()
    batches = _seconds(lambda: fused(inputs), ranks.synchronize)
    together = ranks.sum(torch.tensor([runs.batch_size / np.mean(batches)], dtype=torch.float64, device=ranks.device))
    latencies = ranks.from_first(lambda: _seconds(lambda: split_and_fused(image), ranks.synchronize))
    median, p95 = (1000 * float(np.percentile(latencies, q)) for q in (50, 95))
    return Speed(images_per_second, float(together), runs.batch_size, median, p95)


def _seconds(work: Callable[[], object], synchronize: Callable[[], None]) -> list[float]:
    """Of each repetition."""
    for _ in range(_WARM_UP):
        work()
    synchronize()
    seconds: list[float] = []
    while len(seconds) < _LEAST or sum(seconds) < _SECONDS:
        began = time.perf_counter()
        work()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds
