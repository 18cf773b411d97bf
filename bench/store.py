"""Training batches from a band store, from packed and from original JPEGs: python bench/store.py [--images FOLDER]

One band of sub16 in batches of 512: from a band store in memory, in the page cache and on a disk that has none of it
cached; DALI on JPEGs resized once and on the originals; torchvision with a DataLoader on the originals. Whole images,
all bands of sub16 or RGB: DALI on JPEGs packed at 224; FFCV on the same files, and on a .beton file that it writes with
max_resolution = 224. Beside them a memcpy of the batch that is handed over. Sizes of whole data sets are calculated
from the measured bytes of an image.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import common
import ffcv_peer
import numpy as np
import pipeline as peers
import torch

from bandsplit.cli import entry
from bandsplit.config import schema
from bandsplit.data.images import ImageFiles
from bandsplit.data.loader import TrainingLoader
from bandsplit.data.pipeline import Shard
from bandsplit.data.store import bands
from bandsplit.data.store.images import Encoding, resized
from bandsplit.data.store.manifest import StoredImages, read_manifest
from bandsplit.data.store.reader import BandLoader, BandReader
from bandsplit.spectral.view import View

Subject = Callable[[], int]

SETS = {"ImageNet-1K": 1_281_167, "ImageNet-21K (fall 2011)": 14_197_122, "ImageNet-21K (winter 2021)": 13_153_500}
"""Numbers of images."""

TYPES = {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32}


def config(side: int, block: int, stored: int, branches: object = ((0,),)) -> schema.RunConfig:
    """Reads band 0 alone, unless `branches` says otherwise."""
    return schema.RunConfig.model_validate(
        {
            "name": "bench",
            "data": {
                "name": "bench",
                "root": "unused",
                "classes": 2,
                "image_size": side,
                "resize_size": stored,
            },
            "model": {"arch": "resnet18"},
            "split": {"block": block, "branches": branches},
            "optim": {"lr": 0.1},
            "train": {"epochs": 1, "batch_size": 512},
        }
    )


def stored(run: schema.RunConfig, listed: ImageFiles, to: Path, dtype: bands.Dtype, workers: int) -> StoredImages:
    few = ImageFiles(listed.paths[:1], listed.labels[:1], listed.classes)
    manifest = bands.pack(run, {"train": listed, "val": few}, Path("/"), to, dtype, run.data.resize_size, workers)
    assert read_manifest(to) == manifest
    return StoredImages(to, "train", manifest, manifest.classes)


def training(run: schema.RunConfig, found: StoredImages, share: Shard, in_memory: bool) -> Subject:
    data = run.data.model_copy(update={"kind": "bands", "in_memory": in_memory})
    loader = BandLoader(run.model_copy(update={"data": data}), found, [share])
    return lambda: len(next(loader))


def handed_over(run: schema.RunConfig, found: StoredImages, share: Shard, convert: bool) -> Subject:
    """Whole stored images, neither cropped nor flipped, in the calling thread: what goes to a GPU, or converted."""
    reader = BandReader(found, [View.of(run)], share, in_memory=True)
    side, draw = found.manifest.shape("train")[0], np.random.default_rng(0)

    def step() -> int:
        indices = draw.integers(0, len(found), share.batch_size)
        reader.read(indices, side) if convert else reader.gather(indices, side)
        return share.batch_size

    return step


def memcpy(values: int, dtype: torch.dtype, batch_size: int) -> Subject:
    """Copies as many values as a batch has into new memory, each time from another place."""
    sources = torch.randint(0, 255, (8, values), dtype=torch.uint8).to(dtype)
    turn = count()

    def step() -> int:
        torch.empty(values, dtype=dtype).copy_(sources[next(turn) % len(sources)])
        return batch_size

    return step


def jpegs(run: schema.RunConfig, listed: ImageFiles, share: Shard) -> Subject:
    loader = TrainingLoader(run, listed, [share])
    return lambda: len(next(loader))


def cold(run: schema.RunConfig, found: StoredImages, share: Shard, rounds: int) -> list[float]:
    """Images a second of batches whose images are not in the page cache."""
    rates = []
    copy = found.root.with_name(f"{found.root.name}-cold")  # pages that others have mapped stay in the cache
    shutil.copytree(found.root, copy)
    found = dataclasses.replace(found, root=copy)
    for n in range(rounds):
        for path in found.shards(0):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        reader = BandReader(found, [View.of(run)], share)
        indices = np.random.default_rng(n).permutation(len(found))[: share.batch_size]
        began = time.perf_counter()
        reader.read(indices, found.manifest.shape("train")[0])
        rates.append(len(indices) / (time.perf_counter() - began))
        del reader
    return rates


def packed_jpegs(listed: ImageFiles, to: Path, side: int) -> tuple[ImageFiles, float]:
    """JPEGs with a shorter side of at most `side`, and the bytes of one."""
    encoding = Encoding(side, 90, "bilinear", Path("/"))
    to.mkdir()
    paths = []
    for n, path in enumerate(listed.paths):
        (to / f"{n:06d}.jpg").write_bytes(resized(Path(path), encoding))
        paths.append(str(to / f"{n:06d}.jpg"))
    return ImageFiles(paths, listed.labels, listed.classes), mean_bytes(paths)


def mean_bytes(paths: list[str]) -> float:
    return float(np.mean([Path(path).stat().st_size for path in paths]))


def main() -> None:
    parser = common.arguments(__doc__ or "", "bench/results/store.json")
    parser.add_argument("--batch", type=common.count, default=512)
    parser.add_argument("--files", type=common.count, default=2000)
    ffcv_peer.add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    files = common.files_of(options)
    listed = ImageFiles([*map(str, files)], [0] * len(files), ["all"])
    share = Shard(0, 1, options.batch, options.threads, None)
    whole, cropped = config(224, 4, 224), config(224, 4, 256)
    values = options.batch * 3 * 56 * 56
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small, small_bytes = packed_jpegs(listed, folder / "packed160", 160)
        packed, packed_bytes = packed_jpegs(listed, folder / "packed224", 224)
        stores = {
            "uint8, 224 stored": (whole, stored(whole, listed, folder / "u8", "uint8", options.threads)),
            "float16, 224 stored": (whole, stored(whole, listed, folder / "f16", "float16", options.threads)),
            "uint8, 256 stored": (cropped, stored(cropped, listed, folder / "u8crop", "uint8", options.threads)),
        }
        sub36 = stored(config(336, 6, 336), listed, folder / "sub36", "uint8", options.threads)
        containers = {
            "RGB: FFCV, packed at 224": ([Path(path) for path in packed.paths], None),
            "RGB: FFCV, .beton of 224": (files, 224),
        }
        ffcv = ffcv_peer.started(options, containers, folder, whole.data)
        original = "DALI, original JPEGs"
        subjects = {
            **{f"memcpy of {n}": memcpy(values, t, options.batch) for n, t in TYPES.items()},
            **{f"gathered: {n}": handed_over(r, s, share, False) for n, (r, s) in list(stores.items())[:2]},
            **{f"as float32: {n}": handed_over(r, s, share, True) for n, (r, s) in list(stores.items())[:2]},
            **{f"memory: {n}": training(r, s, share, True) for n, (r, s) in stores.items()},
            **{f"page cache: {n}": training(r, s, share, False) for n, (r, s) in stores.items()},
            "DALI, JPEGs packed at 160": jpegs(whole, small, share),
            "DALI, JPEGs packed at 224": jpegs(whole, packed, share),
            original: jpegs(whole, listed, share),
            "torchvision + DataLoader, originals": peers.torchvision_loader(
                files, folder, 224, options.batch, options.threads
            ),
            "all bands: DALI, packed at 224": jpegs(config(224, 4, 224, "all"), packed, share),
            **ffcv,
        }
        rates = common.interleaved(subjects, options.rounds, 1.5, pause=0.3, skip=3)
        ffcv_peer.stop(ffcv)
        for name, (run, found) in stores.items():
            rates[f"cold: {name}"] = cold(run, found, share, options.rounds)
        results["img/s"] = rates
        common.print_table(f"one band of sub16, batch {options.batch}, {options.threads} threads", rates, original)
        ours = "all bands: DALI, packed at 224"
        same = {name: rates[name] for name in (ours, *ffcv)}
        common.print_table("as many values from the same images", same, ours)
        results["ms a batch"] = {name: options.batch / float(np.median(rate)) * 1e3 for name, rate in rates.items()}
        sizes = {
            "original JPEGs, all bands": mean_bytes(list(listed.paths)),
            "JPEGs packed at 160, all bands": small_bytes,
            "JPEGs packed at 224, all bands": packed_bytes,
            **{name: peer.image_bytes for name, peer in ffcv.items()},
            "sub16 at 224, uint8, a band": on_disk(stores["uint8, 224 stored"][1]),
            "sub16 at 224, float16, a band": on_disk(stores["float16, 224 stored"][1]),
            "sub16 at 256, uint8, a band": on_disk(stores["uint8, 256 stored"][1]),
            "sub36 at 336, uint8, a band": on_disk(sub36),
        }
        results["bytes an image"] = sizes
    print(f"\n| {'':<32} | bytes an image | {' | '.join(f'GB, {each}' for each in SETS)} |")
    print(f"|{'-' * 34}|{'-' * 15}:|{'|'.join('-' * (len(each) + 5) + ':' for each in SETS)}|")
    for name, size in sizes.items():
        whole_sets = " | ".join(f"{size * images / 1e9:>{len(each) + 4},.1f}" for each, images in SETS.items())
        print(f"| {name:<32} | {size:>14,.0f} | {whole_sets} |")
    settings = {"batch": options.batch, "threads": options.threads, "rounds": options.rounds, "files": len(files)}
    common.write(options.output, settings, results)


def on_disk(found: StoredImages) -> float:
    """Bytes of an image in a band's files, their headers included."""
    return sum(path.stat().st_size for path in found.shards(0)) / len(found)


if __name__ == "__main__":
    entry.run(main)
