"""Throughput from JPEG files to training batches: python bench/pipeline.py [--images FOLDER]

Compares, on the same files with random resized crop and hflip: our pipeline with the split, the same DALI pipeline with
crop_mirror_normalize instead, torchvision's ImageFolder with v2 transforms in a DataLoader, and FFCV with
--ffcv-python, in whose .beton the files are stored as they are. Results are in images/s.

With --gpu, both pipelines decode on the GPU, for each of several parts of the batch that its hardware decoder takes
(data.decoder.hw_load); the others stay on the CPU.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import common
import ffcv_peer
import torch
from nvidia.dali import fn, pipeline_def, types
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from bandsplit.cli import entry
from bandsplit.config import schema
from bandsplit.data import pipeline
from bandsplit.data.images import ImageFiles
from bandsplit.data.loader import TrainingLoader
from bandsplit.data.pipeline import Shard

Subject = Callable[[], int]

HW_LOADS = (0.0, 0.25, 0.5, 0.65, 0.9)


def config(side: int, block: int, hw_load: float = 0.65) -> schema.RunConfig:
    return schema.RunConfig.model_validate(
        {
            "name": "bench",
            "data": {
                "name": "bench",
                "root": "unused",
                "classes": 2,
                "image_size": side,
                "resize_size": side,
                "decoder": {"hw_load": hw_load},
            },
            "model": {"arch": "resnet18"},
            "split": {"block": block},
            "optim": {"lr": 0.1},
            "train": {"epochs": 1, "batch_size": 64},
        }
    )


def ours(files: list[Path], side: int, block: int, share: Shard, hw_load: float = 0.65) -> Subject:
    listed = ImageFiles([*map(str, files)], [0] * len(files), ["all"])
    loader = TrainingLoader(config(side, block, hw_load), listed, [share])

    def step() -> int:
        batch = next(loader)
        if share.device == "gpu":
            torch.cuda.synchronize()
        return len(batch)

    return step


def without_split(files: list[Path], side: int, share: Shard, hw_load: float = 0.65) -> Subject:
    """Our pipeline with crop_mirror_normalize instead of the split."""
    run = config(side, 1, hw_load)
    dtype = types.FLOAT16 if share.half else types.FLOAT
    listed = ImageFiles([*map(str, files)], [0] * len(files), ["all"])

    @pipeline_def(
        batch_size=share.batch_size, num_threads=share.threads, device_id=share.device_id, prefetch_queue_depth=2
    )
    def graph() -> Any:
        images, mirror, labels = pipeline.augmented(share, run, listed)
        mean, std = list(run.data.mean), list(run.data.std)
        normalized = fn.crop_mirror_normalize(
            images, mirror=mirror, mean=mean, std=std, dtype=dtype, output_layout="HWC"
        )
        return normalized, labels.gpu() if share.device == "gpu" else labels

    pipe = graph(enable_checkpointing=True)

    def step() -> int:
        outputs = pipe.run(torch.cuda.current_stream()) if share.device == "gpu" else pipe.run()
        tensors = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        if share.device == "gpu":
            torch.cuda.synchronize()
        return len(tensors[0])

    return step


def torchvision_loader(files: list[Path], folder: Path, side: int, batch_size: int, workers: int) -> Subject:
    links = folder / "images" / "all"
    if not links.exists():
        links.mkdir(parents=True)
        for n, file in enumerate(files):
            (links / f"{n:06d}.jpg").symlink_to(file.resolve())
    data = config(side, 1).data
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(side),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32),
            v2.Normalize(data.mean, data.std),
        ]
    )
    loader = DataLoader(
        ImageFolder(links.parent, transform),
        batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=True,
    )

    return endless(loader)


def endless(loader: Iterable[Any]) -> Subject:
    def all_batches() -> Iterator[Any]:
        while True:
            yield from loader

    batches = all_batches()

    def step() -> int:
        return len(next(batches)[0])

    return step


def on_gpu(files: list[Path], options: Namespace) -> dict[str, dict[str, list[float]]]:
    share = Shard(0, 1, options.batch, options.threads, 0, half=True)
    results = {}
    for block, side in ((2, 224), (4, 224), (6, 228)):
        split = f"with the split, s = {block}"
        for load in HW_LOADS if block == 4 else [0.65]:
            subjects = {
                split: ours(files, side, block, share, load),
                "crop_mirror_normalize instead": without_split(files, side, share, load),
            }
            rates = common.interleaved(subjects, options.rounds, 0.7, pause=0.3, skip=5)
            title = f"pipeline on the GPU at {side} x {side}, batch {options.batch}, {options.threads} threads"
            common.print_table(f"{title}, hw_load {load}", rates, split)
            results[f"block {block}, hw_load {load}"] = rates
    return results


def on_cpu(files: list[Path], options: Namespace) -> dict[str, dict[str, list[float]]]:
    share = Shard(0, 1, options.batch, options.threads, None)
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for block, side in ((2, 224), (4, 224), (6, 228)):
            split = f"with the split, s = {block}"
            ffcv = ffcv_peer.started(options, {"FFCV": (files, None)}, folder, config(side, 1).data)
            subjects = {
                split: ours(files, side, block, share),
                "crop_mirror_normalize instead": without_split(files, side, share),
                "torchvision + DataLoader": torchvision_loader(files, folder, side, options.batch, options.threads),
                **ffcv,
            }
            drained = 2 * options.threads + 1  # batches that the workers of a DataLoader prepare
            rates = common.interleaved(subjects, options.rounds, 1.5, pause=0.7, skip=max(5, drained))
            results[f"block {block}"] = rates
            title = f"pipeline at {side} x {side}, batch {options.batch}, {options.threads} threads"
            common.print_table(title, rates, split)
            ffcv_peer.stop(ffcv)
    return results


def main() -> None:
    parser = common.arguments(__doc__ or "", "bench/results/pipeline.json")
    parser.add_argument("--batch", type=common.count, default=64)
    parser.add_argument("--files", type=common.count, default=2000)
    parser.add_argument("--gpu", action="store_true", help="decode and split on the first GPU")
    ffcv_peer.add_option(parser)
    options = parser.parse_args()
    if options.gpu:
        common.require_gpu()
    files = common.files_of(options)
    results = on_gpu(files, options) if options.gpu else on_cpu(files, options)
    settings = {"batch": options.batch, "threads": options.threads, "rounds": options.rounds, "files": len(files)}
    common.write(options.output, settings, results)


if __name__ == "__main__":
    entry.run(main)
