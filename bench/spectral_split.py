"""Throughput of the operator alone: python bench/spectral_split.py [--images FOLDER]

Every subject reads the same decoded images from memory. The implementations of the split compute the same float32 bands
("one band": only one). DALI operators run in a pipeline with no other operator. Results are in images/s.

With --gpu, the time of the operator's kernel is compared with that of a copy on the device that reads and writes as
many bytes.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from itertools import product
from typing import Any

import common
import numpy as np
import scipy.fft
import torch
from einops import rearrange
from nvidia.dali import fn, pipeline_def, types
from torch.profiler import ProfilerActivity, profile

from bandsplit.cli import entry
from bandsplit.spectral import native, transforms

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
SIDE = 216  # 2, 4 and 6 divide it
Subject = Callable[[], int]


def dali(images: common.Images, threads: int, operator: Callable[[Any, Any], Any]) -> Subject:
    """A pipeline of one operator that reads the images without a copy; every second image is flipped."""
    flips = np.arange(len(images), dtype=np.int32) % 2

    @pipeline_def(batch_size=len(images), num_threads=threads, device_id=None, prefetch_queue_depth=2)
    def graph() -> Any:
        source = fn.external_source(lambda: images, layout="HWC", no_copy=True)
        mirror = fn.external_source(lambda: flips)
        outputs = operator(source, mirror)
        return tuple(outputs) if isinstance(outputs, list | tuple) else outputs

    pipe = graph()
    pipe.build()

    def step() -> int:
        pipe.run()
        return len(images)

    return step


def split_operator(block: int, bands: list[int] | None = None) -> Callable[[Any, Any], Any]:
    matrix = transforms.transform_matrix("dct2d", block).ravel().tolist()
    groups = {} if bands is None else {"groups": bands, "group_sizes": [1] * len(bands)}
    return lambda images, mirror: fn.spectral_split(
        images, mirror=mirror, block=block, matrix=matrix, mean=MEAN, std=STD, **groups
    )


def crop_mirror_normalize(images: Any, mirror: Any) -> Any:
    return fn.crop_mirror_normalize(images, mirror=mirror, mean=MEAN, std=STD, dtype=types.FLOAT, output_layout="HWC")


def scipy_function(block: int) -> Callable[[Any, Any], Any]:
    """A straightforward implementation: scipy in a python_function, one image at a time."""

    def transform(image: Any, mirror: Any) -> Any:
        flipped = image[:, ::-1] if mirror else image
        x = ((flipped - np.float32(MEAN)) / np.float32(STD)).astype(np.float32)
        blocks = rearrange(x, "(h r) (w s) c -> h w r s c", r=block, s=block)
        return rearrange(scipy.fft.dctn(blocks, axes=(2, 3), norm="ortho"), "h w r s c -> h w (r s c)")

    return lambda images, mirror: fn.python_function(images, mirror, function=transform)


def torch_subjects(images: common.Images, block: int) -> dict[str, Subject]:
    batch = torch.from_numpy(images)
    matrix = torch.from_numpy(transforms.transform_matrix("dct2d", block)).float()
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    flip = (torch.arange(len(batch)) % 2 == 1)[:, None, None, None]
    kernels = rearrange(matrix, "k (r s) -> k 1 r s", r=block).repeat(3, 1, 1, 1)

    def normalized() -> torch.Tensor:
        x = (rearrange(batch, "b h w c -> b c h w") - mean) / std
        return torch.where(flip, x.flip(3), x)

    def unshuffle_matmul() -> int:
        pixels = torch.nn.functional.pixel_unshuffle(normalized(), block)
        torch.einsum("kn,bcnhw->kbchw", matrix, rearrange(pixels, "b (c n) h w -> b c n h w", c=3))
        return len(batch)

    def convolution() -> int:
        torch.nn.functional.conv2d(normalized(), kernels, stride=block, groups=3)
        return len(batch)

    subjects: dict[str, Subject] = {
        "torch pixel_unshuffle + matmul": unshuffle_matmul,
        "torch conv2d, stride s": convolution,
    }
    try:
        import torch_dct
    except ImportError:
        print("torch-dct is skipped: not installed (pip install -e .[bench])")
        return subjects

    def dct_package() -> int:
        torch_dct.dct_2d(rearrange(normalized(), "b c (h r) (w s) -> b c h w r s", r=block, s=block), norm="ortho")
        return len(batch)

    return {**subjects, "torch-dct": dct_package}


def memcpy(images: common.Images) -> Subject:
    """A lower bound: copies half as many bytes as the operator reads and writes, so its total traffic is the same."""
    source = torch.zeros(images.size * 5 // 2, dtype=torch.uint8)
    target = torch.ones_like(source)

    def step() -> int:
        target.copy_(source)
        return len(images)

    return step


def on_gpu(images: common.Images, rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds of the kernel and of a copy, medians over the rounds; bytes that each reads and writes."""
    results = {}
    print("| block | branches | bands | images | kernel us | copy us | GB/s | of the copy |")
    print("|---|---|---|--:|--:|--:|--:|--:|")
    for block, one_each, dtype in product((2, 4, 6), (True, False), (types.FLOAT16, types.FLOAT)):
        source = torch.from_numpy(images).cuda()
        bands = list(range(block * block))
        sizes = [1] * len(bands) if one_each else [len(bands)]
        matrix = transforms.transform_matrix("dct2d", block).ravel().tolist()

        @pipeline_def(batch_size=len(images), num_threads=2, device_id=0)
        def graph(
            source: Any = source, block: int = block, matrix: Any = matrix, sizes: Any = sizes, dtype: Any = dtype
        ) -> Any:
            pixels = fn.external_source(lambda: source, device="gpu", layout="HWC", batch=True, no_copy=True)
            groups = {"groups": list(range(block * block)), "group_sizes": sizes}
            mean = {"mean": MEAN, "std": STD}
            outputs = fn.spectral_split(pixels, mirror=0, block=block, matrix=matrix, dtype=dtype, **groups, **mean)
            return tuple(outputs) if isinstance(outputs, list | tuple) else outputs

        pipe = graph()
        pipe.build()
        moved = images.size * (1 + (2 if dtype == types.FLOAT16 else 4))
        copied = torch.zeros(moved // 2, dtype=torch.uint8, device="cuda")
        target = torch.ones_like(copied)
        for _ in range(5):
            pipe.run()
            target.copy_(copied)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(rounds):
                pipe.run()
                torch.cuda.synchronize()
                target.copy_(copied)
                torch.cuda.synchronize()
        kernels, copies = (
            [event.device_time for event in found.events() if word in event.name] for word in ("Split", "Memcpy DtoD")
        )
        kernel, copy = float(np.median(kernels)), float(np.median(copies))
        each, kind = "one band each" if one_each else "all bands", dtype.name.lower()
        results[f"block {block}, {each}, {kind}"] = {"kernel": kernel, "copy": copy, "bytes": moved}
        print(
            f"| {block} | {each} | {kind} | {len(images)} | {kernel:.0f} | {copy:.0f} | {moved / kernel / 1e3:,.0f} "
            f"| {copy / kernel:.2f} |",
            flush=True,
        )
    return results


def main() -> None:
    parser = common.arguments(__doc__ or "", "bench/results/spectral_split.json")
    parser.add_argument("--batch", type=common.count, default=64)
    parser.add_argument("--gpu", action="store_true", help="the kernel on the first GPU")
    options = parser.parse_args()
    if options.gpu:
        common.require_gpu()
    torch.set_num_threads(options.threads)
    native.load()
    images = common.decoded(common.jpeg_files(options.images, options.batch), SIDE)
    results = on_gpu(images, options.rounds) if options.gpu else on_cpu(images, options)
    settings = {"side": SIDE, "batch": options.batch, "threads": options.threads, "rounds": options.rounds}
    common.write(options.output, settings, results)


def on_cpu(images: common.Images, options: Namespace) -> dict[str, dict[str, list[float]]]:
    results = {}
    for block in (2, 4, 6):
        ours = f"spectral_split, s = {block}"
        subjects = {
            ours: dali(images, options.threads, split_operator(block)),
            "crop_mirror_normalize": dali(images, options.threads, crop_mirror_normalize),
            "memcpy of the same bytes": memcpy(images),
            **torch_subjects(images, block),
            "python_function with scipy": dali(images[:8], options.threads, scipy_function(block)),
        }
        if block == 4:
            subjects["spectral_split, s = 4, one band"] = dali(images, options.threads, split_operator(4, [0]))
        rates = common.interleaved(subjects, options.rounds, seconds=0.3, skip=5)
        common.print_table(
            f"block {block}, {SIDE} x {SIDE}, batch {options.batch}, {options.threads} threads", rates, ours
        )
        results[f"block {block}"] = rates
    return results


if __name__ == "__main__":
    entry.run(main)
