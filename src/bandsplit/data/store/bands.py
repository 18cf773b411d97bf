"""`pack --kind bands`: renders every image once and stores its bands, through the graph and the operator of validation.

Rendering is on the CPU, whose decoder gives the same pixels on every run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange

from bandsplit import __version__, seeds
from bandsplit.config.schema import RunConfig
from bandsplit.data import check
from bandsplit.data.images import ImageFiles
from bandsplit.data.loader import ValidationLoader
from bandsplit.data.pipeline import Shard
from bandsplit.data.recovery import UndecodableImage
from bandsplit.data.store import manifest as stored
from bandsplit.data.store import packing, quantization
from bandsplit.data.store.manifest import Band, BandManifest, BandPart, band_folder, shard_name
from bandsplit.data.store.packing import Chunk, Folder, Record, Source
from bandsplit.data.store.quantization import Floats, Quantizer
from bandsplit.errors import UserError
from bandsplit.spectral import transforms

Dtype = Literal["float16", "uint8"]
Values = npt.NDArray[np.float32]

SAMPLE = 1024
"""Training images from which the ranges of 8 bits are chosen."""

RENDERED_AT_ONCE = 64


@dataclass(frozen=True)
class Rendering:
    """How images become bands; it goes to every worker."""

    config: RunConfig
    bands: tuple[int, ...]
    sides: dict[str, int]
    """Side in pixels of the stored square, by part."""
    root: Path

    @property
    def limits(self) -> tuple[Floats, Floats]:
        """Smallest and largest value that each of the bands can have, (bands, 3)."""
        split, data = self.config.split, self.config.data
        matrix = transforms.transform_matrix(split.transform, split.block, split.norm)[list(self.bands)]
        return quantization.bounds(matrix, data.mean, data.std)

    def shape(self, part: str) -> tuple[int, int, int]:
        """Of one image of one band: (h, w, 3)."""
        side = self.sides[part] // self.config.split.block
        return side, side, 3

    def rendered(
        self, part: str, paths: Sequence[str], bad: dict[int, str]
    ) -> Iterator[tuple[list[int], list[Values]]]:
        """Images in their order, some at a time: their places among the paths, and a (B, h, w, 3) for each band.

        Those that cannot be decoded are left out, and noted as bad with the reason.
        """
        for first in range(0, len(paths), RENDERED_AT_ONCE):
            places = list(range(first, min(first + RENDERED_AT_ONCE, len(paths))))
            try:
                images = self._bands(part, [paths[n] for n in places])
            except UndecodableImage:
                verdicts = check.examine([paths[n] for n in places], 1)
                bad |= {n: verdict.reason for n, verdict in zip(places, verdicts, strict=True) if verdict.reason}
                places = [n for n in places if n not in bad]
                images = self._bands(part, [paths[n] for n in places])
            if places:
                yield places, [np.stack([image[n] for image in images]) for n in range(len(self.bands))]

    def _bands(self, part: str, paths: Sequence[str]) -> list[list[Values]]:
        """The bands (h, w, 3) of every image.  Raises UndecodableImage.

        DALI gets them one by one, none ahead: several that fail together have crashed its decoder.
        """
        if not paths:
            return []
        side = self.sides[part]
        sizes = {"image_size": side, "val_image_size": side}
        data = self.config.data.model_copy(update={**sizes, "prefetch": 1, "on_bad": "error"})
        split = self.config.split.model_copy(
            update={"branches": tuple((k,) for k in self.bands), "only": None, "scale": 0.0}
        )
        config = self.config.model_copy(update={"data": data, "split": split})
        files = ImageFiles(list(paths), [0] * len(paths), ["all"])
        batches = ValidationLoader(config, files, Shard(0, 1, batch_size=1, threads=1, device_id=None))
        return [[rearrange(x, "1 c h w -> h w c").numpy().copy() for x in batch.inputs] for batch in batches]


def pack(
    config: RunConfig,
    parts: Mapping[str, ImageFiles],
    root: Path,
    to: Path,
    dtype: Dtype,
    size: int | None,
    workers: int,
    chunk_images: int | None = None,
) -> BandManifest:
    """Packs the bands that a config's branches read into a band store.

    Args:
        parts: the images of "train" and "val".
        root: folder of the data set, to which the names of images are relative.
        size: side in pixels of the square that is stored of training images; None: the largest within
            `data.resize_size` that leaves as many whole blocks on each side of what is validated.  Of validation
            images, what is validated is stored.
        workers: processes; 0: this one.
        chunk_images: images of a shard; None: as many as are useful.

    Raises UserError if `to` holds something else, the disk is full, or the size does not fit.
    """
    bands = tuple(stored.bands_to_read(config.split, config.data.hflip))
    rendering = Rendering(config, bands, {"train": _side(config, size), "val": config.data.val_size}, root)
    source = Source(parts, root)
    chunks = source.chunks(chunk_images)
    folder = Folder(to)
    with folder.begun(_plan(rendering, source, dtype, len(chunks[0].paths))) as complete:
        if complete:
            manifest = stored.read_manifest(to)
            assert isinstance(manifest, BandManifest)
            return manifest
        image_bytes = {part: math.prod(rendering.shape(part)) * np.dtype(dtype).itemsize for part in parts}
        folder.require_space(len(bands) * sum(image_bytes[part] * len(files) for part, files in parts.items()))
        quantizers = _quantizers(rendering, parts["train"].paths, workers) if dtype == "uint8" else None
        records = folder.packed(partial(_pack_chunk, rendering, to, quantizers), chunks, workers)
        together = list(zip(chunks, records, strict=True))
        about = _write_lists(source, rendering, to, together)
        manifest = BandManifest(
            format=stored.FORMAT,
            kind="bands",
            code_version=__version__,
            data=config.data.name,
            transform=config.split.transform,
            norm=config.split.norm,
            block=config.split.block,
            mean=config.data.mean,
            std=config.data.std,
            resize_size=config.data.resize_size,
            interpolation=config.data.interpolation,
            dtype=dtype,
            classes=source.classes,
            parts=about,
            bands=_described(rendering, quantizers, together),
        )
        folder.finish(manifest)
        return manifest


def _write_lists(
    source: Source, rendering: Rendering, to: Path, together: Sequence[tuple[Chunk, Record]]
) -> dict[str, BandPart]:
    """Writes labels, names and checksums of what was packed; what the manifest says of each part."""
    for k in rendering.bands:
        sums = {f"{chunk.part}/{shard_name(chunk.number)}": record["sha256"][str(k)] for chunk, record in together}
        packing.write_checksums(to / band_folder(k), sums)
    sums, about = {}, {}
    for part, files in source.parts.items():
        own = [(chunk, record) for chunk, record in together if chunk.part == part]
        kept = [chunk.first + place for chunk, record in own for place in record["kept"]]
        labels = packing.npy(np.array(files.labels, dtype=np.int32)[kept])
        names = json.dumps([files.name(n) for n in kept], indent=0) + "\n"
        sums[f"labels/{part}.npy"] = packing.replace(to / f"labels/{part}.npy", labels)
        sums[f"names/{part}.json"] = packing.replace(to / f"names/{part}.json", names.encode())
        about[part] = BandPart(
            images=len(kept),
            side=rendering.sides[part],
            shards=tuple(len(record["kept"]) for _, record in own),
            source_images=len(files),
            source_digest=source.digests[part],
            left_out=source.left_out(part, (record for _, record in own)),
        )
    packing.write_checksums(to, sums)
    return about


def _side(config: RunConfig, size: int | None) -> int:
    """Of the square that is stored of training images."""
    data, block = config.data, config.split.block
    if size is None:
        whole = data.resize_size // block * block
        centered = whole - (whole - data.val_size) % (2 * block)
        if whole < data.image_size:
            raise UserError(
                f"data.image_size: {data.image_size} given; allowed for a band store: at most data.resize_size = "
                f"{data.resize_size}, in whole blocks of {block}"
            )
        return centered if centered >= data.image_size else whole
    if size % block or not data.image_size <= size <= data.resize_size:
        raise UserError(
            f"--size: {size} given; allowed: a multiple of split.block = {block} from data.image_size = "
            f"{data.image_size} to data.resize_size = {data.resize_size}"
        )
    return size


def _plan(rendering: Rendering, source: Source, dtype: Dtype, chunk_images: int) -> dict[str, Any]:
    """All that a store depends on, by the names of the keys and options."""
    config = rendering.config
    return {
        "--kind": "bands",
        "code_version": __version__,
        "--dtype": dtype,
        "--size": rendering.sides["train"],
        "--chunk": chunk_images,
        "bands": rendering.bands,
        "data.name": config.data.name,
        "data.val_image_size": config.data.val_size,
        **{f"data.{key}": getattr(config.data, key) for key in ("resize_size", "interpolation", "mean", "std")},
        **{f"split.{key}": getattr(config.split, key) for key in ("transform", "norm", "block")},
        **source.plan(),
    }


def _pack_chunk(rendering: Rendering, to: Path, quantizers: Mapping[int, Quantizer] | None, chunk: Chunk) -> Record:
    """Writes the shards of a chunk, one a band; in a worker."""
    sums, kept, bad = _Sums(rendering.bands), [], dict[int, str]()
    dtype = np.float16 if quantizers is None else np.uint8
    shape, name = rendering.shape(chunk.part), f"{chunk.part}/{shard_name(chunk.number)}"
    files = [packing.ArrayFile(to / band_folder(k) / name, len(chunk.paths), shape, dtype) for k in rendering.bands]
    try:
        for places, images in rendering.rendered(chunk.part, chunk.paths, bad):
            kept += places
            for n, (k, values) in enumerate(zip(rendering.bands, images, strict=True)):
                if quantizers is None:
                    half = torch.from_numpy(values).half()  # numpy takes several times as long
                    files[n].append(half.numpy())
                    sums.note(n, values, half.float().numpy())
                else:
                    steps, outside = quantizers[k].stored(values)
                    files[n].append(steps)
                    sums.note(n, values, quantizers[k].values(steps))
                    sums.clipped[n] += outside
        checksums = {str(k): file.close() for k, file in zip(rendering.bands, files, strict=True)}
    finally:
        for file in files:
            file.abandon()
    names = packing.names_of((chunk.paths[n] for n in bad), rendering.root)
    return {
        "kept": kept,
        "left_out": [{"name": name, "reason": reason} for name, reason in zip(names, bad.values(), strict=True)],
        "sha256": checksums,
        **sums.as_dict(),
    }


class _Sums:
    """Over the values of every band, by color: (bands, 3)."""

    def __init__(self, bands: Sequence[int]) -> None:
        shape = (len(bands), 3)
        self.total, self.square, self.error = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self.clipped = np.zeros(shape, dtype=np.int64)

    def note(self, n: int, values: Values, restored: Values) -> None:
        self.total[n] += _by_color(values)
        self.square[n] += _by_color(np.square(values))
        self.error[n] += _by_color(np.square(restored - values))

    def as_dict(self) -> dict[str, Any]:
        return {name: values.tolist() for name, values in vars(self).items()}


def _by_color(values: Values) -> Floats:
    """Sums (3,) of (B, h, w, 3), along whole lines first, which is faster than three numbers at a time."""
    lines = rearrange(values, "b h w c -> (b h) (w c)").sum(0, dtype=np.float64)
    by_color: Floats = rearrange(lines, "(w c) -> w c", c=3).sum(0)
    return by_color


def _quantizers(rendering: Rendering, paths: Sequence[str], workers: int) -> dict[int, Quantizer]:
    """The range of every band and color, from a sample that is the same on every run."""
    order = np.random.default_rng(seeds.derived(0, "sample of a store")).permutation(len(paths))
    sample = [paths[n] for n in sorted(order[:SAMPLE].tolist())]
    chunks = [Chunk("train", n, n, sample[n : n + 128], []) for n in range(0, len(sample), 128)]
    counted = [record["counts"] for _, record in packing.worked(partial(_count, rendering), chunks, workers)]
    counts = np.sum(counted, axis=0)
    if not counts.any():
        raise UserError(f"{rendering.root}: none of {len(sample)} training images can be decoded")
    low, high = rendering.limits
    ranges = np.array(
        [
            [quantization.best_range(counts[n, c], low[n, c], high[n, c]) for c in range(3)]
            for n in range(len(rendering.bands))
        ]
    )
    return {k: Quantizer.over(*ranges[n].T) for n, k in enumerate(rendering.bands)}


def _count(rendering: Rendering, chunk: Chunk) -> Record:
    """Histograms (bands, 3, bins) of a part of the sample; in a worker."""
    low, high = rendering.limits
    counts = np.zeros((len(rendering.bands), 3, quantization.BINS), dtype=np.int64)
    for _, images in rendering.rendered(chunk.part, chunk.paths, {}):
        for n, values in enumerate(images):
            counts[n] += quantization.histogram(values, low[n], high[n])
    return {"counts": counts}


def _described(
    rendering: Rendering, quantizers: Mapping[int, Quantizer] | None, together: Sequence[tuple[Chunk, Record]]
) -> dict[int, Band]:
    """Every band with its measured errors, over all images."""
    pixels = sum(len(record["kept"]) * math.prod(rendering.shape(chunk.part)[:2]) for chunk, record in together)
    total, square, error, clipped = (
        np.sum([record[key] for _, record in together], axis=0) / max(1, pixels)
        for key in ("total", "square", "error", "clipped")
    )
    deviation, rmse = np.sqrt(np.maximum(0, square - total**2)), np.sqrt(error)
    low, high = rendering.limits
    bands = {}
    for n, k in enumerate(rendering.bands):
        scale, offset = (np.ones(3), np.zeros(3)) if quantizers is None else (quantizers[k].scale, quantizers[k].offset)
        bands[k] = Band(
            scale=tuple(map(float, scale)),
            offset=tuple(map(float, offset)),
            rmse=tuple(rmse[n].tolist()),
            deviation=tuple(deviation[n].tolist()),
            psnr=_decibels(high[n] - low[n], rmse[n]),
            snr=_decibels(deviation[n], rmse[n]),
            clipped=float(clipped[n].mean()),
        )
    return bands


def _decibels(signal: Floats, noise: Floats) -> float:
    """Of the worst color; at most 200, where there is no error."""
    return round(float((20 * np.log10(np.maximum(signal, 1e-30) / np.maximum(noise, signal * 1e-10 + 1e-30))).min()), 3)
