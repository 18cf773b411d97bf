"""From JPEG files to training batches: python bench/pipeline.py [--pictures FOLDER]

The same files, random-resized-crop and flip for every subject: our pipeline with the split, the same DALI pipeline
ending in crop_mirror_normalize, torchvision's ImageFolder with v2 transforms in a DataLoader. Rates are pictures a
second.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import torch
from nvidia.dali import fn, pipeline_def
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from bandsplit import pipeline, schema
from bandsplit.dataset import Pictures
from bandsplit.loader import TrainingLoader
from bandsplit.pipeline import Share

Subject = Callable[[], int]


def config(side: int, block: int) -> schema.RunConfig:
    return schema.RunConfig.model_validate(
        {
            "name": "bench",
            "data": {"name": "bench", "root": "unused", "classes": 2, "image_size": side, "resize_size": side},
            "model": {"arch": "resnet18"},
            "split": {"block": block},
            "optim": {"lr": 0.1},
            "train": {"epochs": 1, "batch_size": 64},
        }
    )


def ours(files: list[Path], side: int, block: int, share: Share) -> Subject:
    loader = TrainingLoader(config(side, block), Pictures([*map(str, files)], [0] * len(files), ["all"]), share)

    def step() -> int:
        return len(next(loader))

    return step


def without_split(files: list[Path], side: int, share: Share) -> Subject:
    """Our own graph with crop_mirror_normalize in the place of the split."""
    run = config(side, 1)
    pictures = Pictures([*map(str, files)], [0] * len(files), ["all"])

    @pipeline_def(batch_size=share.batch_size, num_threads=share.threads, device_id=None, prefetch_queue_depth=2)
    def graph() -> Any:
        images, mirror, labels = pipeline.augmented(share, run, pictures)
        mean, std = list(run.data.mean), list(run.data.std)
        return fn.crop_mirror_normalize(images, mirror=mirror, mean=mean, std=std, output_layout="HWC"), labels

    pipe = graph(enable_checkpointing=True)

    def step() -> int:
        outputs = [torch.from_dlpack(output.as_tensor()) for output in pipe.run()]
        return len(outputs[0])

    return step


def torchvision_loader(files: list[Path], folder: Path, side: int, batch_size: int, workers: int) -> Subject:
    for n, file in enumerate(files):
        (folder / "all" / f"{n:06d}.jpg").symlink_to(file.resolve())
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
        ImageFolder(folder, transform),
        batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=True,
    )

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    batches = endless()

    def step() -> int:
        return len(next(batches)[1])

    return step


def main() -> None:
    parser = common.arguments(__doc__ or "", "bench/results/pipeline.json")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--files", type=int, default=2000)
    options = parser.parse_args()
    files = common.jpeg_files(options.pictures, options.files)
    share = Share(0, 1, options.batch, options.threads, None)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "all").mkdir()
        torchvision = torchvision_loader(files, Path(folder), 224, options.batch, options.threads)
        for block, side in ((2, 224), (4, 224), (6, 228)):
            name = f"with the split, s = {block}"
            subjects = {
                name: ours(files, side, block, share),
                "crop_mirror_normalize instead": without_split(files, side, share),
                "torchvision + DataLoader": torchvision,
            }
            rates = common.interleaved(subjects, options.rounds, seconds=1.0)
            common.print_table(
                f"pipeline at {side} x {side}, batch {options.batch}, {options.threads} threads", rates, name
            )
            results[f"block {block}"] = rates
    settings = {"batch": options.batch, "threads": options.threads, "rounds": options.rounds, "files": len(files)}
    common.write(options.output, settings, results)


if __name__ == "__main__":
    main()
