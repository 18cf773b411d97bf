"""Throughput from JPEG files to training batches: python bench/pipeline.py [--images FOLDER]

Compares, on the same files with random resized crop and hflip: our pipeline with the split, the same DALI pipeline with
crop_mirror_normalize instead, torchvision's ImageFolder with v2 transforms in a DataLoader, and FFCV if installed.
Results are in images/s.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from nvidia.dali import fn, pipeline_def
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from bandsplit.config import schema
from bandsplit.data import pipeline
from bandsplit.data.images import ImageFiles
from bandsplit.data.loader import TrainingLoader
from bandsplit.data.pipeline import Shard

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


def ours(files: list[Path], side: int, block: int, share: Shard) -> Subject:
    loader = TrainingLoader(config(side, block), ImageFiles([*map(str, files)], [0] * len(files), ["all"]), [share])

    def step() -> int:
        return len(next(loader))

    return step


def without_split(files: list[Path], side: int, share: Shard) -> Subject:
    """Our pipeline with crop_mirror_normalize instead of the split."""
    run = config(side, 1)
    listed = ImageFiles([*map(str, files)], [0] * len(files), ["all"])

    @pipeline_def(batch_size=share.batch_size, num_threads=share.threads, device_id=None, prefetch_queue_depth=2)
    def graph() -> Any:
        images, mirror, labels = pipeline.augmented(share, run, listed)
        mean, std = list(run.data.mean), list(run.data.std)
        return fn.crop_mirror_normalize(images, mirror=mirror, mean=mean, std=std, output_layout="HWC"), labels

    pipe = graph(enable_checkpointing=True)

    def step() -> int:
        outputs = [torch.from_dlpack(output.as_tensor()) for output in pipe.run()]
        return len(outputs[0])

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


def ffcv_loader(files: list[Path], folder: Path, side: int, batch_size: int, workers: int) -> Subject | None:
    """FFCV on the same JPEG files, stored without re-encoding in its own format; None if FFCV is not installed."""
    try:
        from ffcv.fields import IntField, RGBImageField
        from ffcv.fields.basics import IntDecoder
        from ffcv.fields.rgb_image import IMAGE_MODES, RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage
        from ffcv.writer import DatasetWriter
    except ImportError as error:
        print(f"FFCV is skipped ({error}): apt install libopencv-dev libturbojpeg0-dev pkg-config; pip install ffcv")
        return None

    class StoredJpeg(RGBImageField):
        def encode(self, destination: Any, file: Any, malloc: Any) -> None:
            content = np.fromfile(file, dtype=np.uint8)
            destination["mode"] = IMAGE_MODES["jpg"]
            destination["width"], destination["height"] = Image.open(file).size
            destination["data_ptr"], storage = malloc(content.nbytes)
            storage[:] = content

    container = folder / "images.beton"
    if not container.exists():
        writer = DatasetWriter(str(container), {"image": StoredJpeg(), "label": IntField()}, num_workers=1)
        writer.from_indexed_dataset([(str(file), 0) for file in files])
    data = config(side, 1).data
    image = [
        RandomResizedCropRGBImageDecoder((side, side)),
        RandomHorizontalFlip(),
        NormalizeImage(np.float32(data.mean), np.float32(data.std), np.float32),
        ToTensor(),
        ToTorchImage(),
    ]
    loader = Loader(
        str(container),
        batch_size,
        num_workers=workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        custom_fields={"image": StoredJpeg},
        drop_last=True,
        pipelines={"image": image, "label": [IntDecoder(), ToTensor()]},
    )
    return endless(loader)


def main() -> None:
    parser = common.arguments(__doc__ or "", "bench/results/pipeline.json")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--files", type=int, default=2000)
    options = parser.parse_args()
    files = common.jpeg_files(options.images, options.files)
    share = Shard(0, 1, options.batch, options.threads, None)
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for block, side in ((2, 224), (4, 224), (6, 228)):
            split = f"with the split, s = {block}"
            ffcv = ffcv_loader(files, folder, side, options.batch, options.threads)
            subjects = {
                split: ours(files, side, block, share),
                "crop_mirror_normalize instead": without_split(files, side, share),
                "torchvision + DataLoader": torchvision_loader(files, folder, side, options.batch, options.threads),
                **({"FFCV": ffcv} if ffcv else {}),
            }
            results[f"block {block}"] = rates = common.interleaved(subjects, options.rounds, 1.5, pause=0.7, skip=5)
            title = f"pipeline at {side} x {side}, batch {options.batch}, {options.threads} threads"
            common.print_table(title, rates, split)
    settings = {"batch": options.batch, "threads": options.threads, "rounds": options.rounds, "files": len(files)}
    common.write(options.output, settings, results)


if __name__ == "__main__":
    main()
