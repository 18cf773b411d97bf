"""The DALI graphs from JPEG files to the inputs of every branch, one definition for CPU and GPU."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from loguru import logger
from nvidia.dali import Pipeline, pipeline_def, types
from nvidia.dali import fn as dali_fn
from nvidia.dali.pipeline import do_not_convert

from bandsplit import seeds
from bandsplit.config.schema import Decoder, RunConfig
from bandsplit.data import augmentation
from bandsplit.data.images import ImageFiles
from bandsplit.spectral import native, transforms
from bandsplit.spectral.view import View

fn: Any = dali_fn  # operators are made at run time, ours among them: DALI's stubs do not know them all

# torchvision does not rotate by EXIF either, and ImageNet's published figures are without
_DECODE = {"output_type": types.RGB, "adjust_orientation": False}

# both with DALI's antialiasing, which is on by default
_INTERPOLATION = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


@dataclass(frozen=True)
class Shard:
    """What one rank takes of a data set."""

    rank: int
    world_size: int
    batch_size: int
    threads: int
    device_id: int | None
    """GPU of this rank; None: CPU only."""
    half: bool = False
    """Bands as float16 instead of float32."""

    @property
    def device(self) -> str:
        return "cpu" if self.device_id is None else "gpu"


@cache
def has_operator(device: str) -> bool:
    """Whether `fn.spectral_split` is there for "cpu" or "gpu", built if need be; says so once where it is not."""
    try:
        native.load()
        if device == "gpu" and not native.has_gpu_kernel():
            raise native.BuildError("there is no nvcc to build its GPU kernel: pip install bandsplit[nvcc]")
    except native.BuildError as error:
        logger.warning("The spectral split runs in plain torch, which is slower: {}", error)
        return False
    return True


def training(
    config: RunConfig, files: ImageFiles, shard: Shard, checkpoint: bytes | None = None, also: Sequence[View] = ()
) -> Pipeline:
    """An endless stream of batches: every pass over the data is a new shuffle of all images, from the seed.

    Outputs: the inputs of every branch, those of the views that are wanted `also`, and labels.  Ranks take disjoint
    parts of each pass and never wait for each other at its end.  A checkpoint of such a pipeline continues exactly
    after the last batch that was handed out.
    """
    seed = seeds.derived(config.seed, "augmentation", shard.rank)
    conditionals = augmentation.needs_conditionals(config.augment)
    return _build(_training_graph, shard, config, files, also, seed, checkpoint, conditionals)


def validation(config: RunConfig, files: ImageFiles, shard: Shard) -> Pipeline:
    """The images in their order, once; the last batch is filled up by repeating the last image."""
    return _build(_validation_graph, shard, config, files)


def first_undecodable(paths: Sequence[str], threads: int) -> str | None:
    """Decodes the files on the CPU and returns the first one that fails.

    One at a time: DALI's decoder may crash the process when a file fails that it decodes together with others.
    """
    with ThreadPoolExecutor(threads) as pool:
        failed = set(pool.map(_first_failure, [paths[i::threads] for i in range(threads)]))
    return next((path for path in paths if path in failed), None)


def _first_failure(files: Sequence[str]) -> str | None:
    def graph() -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(encoded, device="cpu", **_DECODE)

    pipe = pipeline_def(graph)(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    for file in files:
        try:
            pipe.feed_input("encoded", [np.fromfile(file, dtype=np.uint8)])
            pipe.run()
        except (OSError, RuntimeError):
            return file
    return None


def _build(
    graph: Callable[..., Any],
    shard: Shard,
    config: RunConfig,
    files: ImageFiles,
    also: Sequence[View] = (),
    seed: int = 0,
    checkpoint: bytes | None = None,
    conditionals: bool = False,
) -> Pipeline:
    pipe = pipeline_def(graph, enable_conditionals=conditionals)(
        shard,
        config,
        files,
        [View.of(config), *also],
        batch_size=shard.batch_size,
        num_threads=shard.threads,
        device_id=shard.device_id,
        seed=seed,
        prefetch_queue_depth=config.data.prefetch,
        enable_checkpointing=True,  # also where no state is read: it changes the order of the images
        checkpoint=checkpoint,
    )
    pipe.build()
    for listing in Path(_lists().name).iterdir():
        listing.unlink()  # read by now
    return pipe


def _training_graph(shard: Shard, config: RunConfig, files: ImageFiles, views: Sequence[View]) -> Any:
    return _finish(*augmented(shard, config, files), shard, views)


def augmented(shard: Shard, config: RunConfig, files: ImageFiles) -> tuple[Any, Any, Any]:
    """The training graph up to the split: uint8 images, whether to mirror each, and labels."""
    data = config.data
    order_seed = seeds.derived(config.seed, "order")  # the same on every rank
    order = np.random.default_rng(order_seed).permutation(len(files))  # DALI shuffles only after the first pass
    encoded, labels = fn.readers.file(
        file_list=_listed([files.paths[i] for i in order], [files.labels[i] for i in order]),
        shard_id=shard.rank,
        num_shards=shard.world_size,
        shuffle_after_epoch=True,
        shuffle_after_epoch_seed=order_seed,
        prefetch_queue_depth=data.decoder.read_ahead,
        name="reader",
    )
    if config.augment.repeats > 1:
        # only the first files of every batch are used, so that an epoch has as many steps as without repeats
        indices = repeated_indices(shard.batch_size, config.augment.repeats)
        encoded, labels = (fn.permute_batch(part, indices=indices) for part in (encoded, labels))
    crop = {"random_area": list(data.scale), "random_aspect_ratio": list(data.ratio)}
    resize = {"size": [data.image_size, data.image_size], "interp_type": _INTERPOLATION[data.interpolation]}
    crop_only = shard.device == "cpu" if data.decoder.crop_only is None else data.decoder.crop_only
    if crop_only:
        images = fn.decoders.image_random_crop(encoded, **_decoding(data.decoder, shard), **crop)
        images = fn.resize(images, **resize)
    else:
        images = fn.decoders.image(encoded, **_decoding(data.decoder, shard))
        images = fn.random_resized_crop(images, **resize, **crop)
    mirror = fn.random.coin_flip(probability=data.hflip, dtype=types.INT32)
    return augmentation.augmented(images, config, shard.rank), mirror, labels


def repeated_indices(batch_size: int, repeats: int) -> list[int]:
    """Which of the ceil(batch_size / repeats) files that are used is at each place of a batch, each at most `repeats`
    times.

    Mixup and CutMix pair an image with its neighbor, and the first one with the last.  So copies are placed round by
    round, and no image is paired with its own copy, unless that cannot be avoided: with one file, or with two in a
    batch of odd size.
    """
    files = math.ceil(batch_size / repeats)
    whole_rounds = batch_size - batch_size % files
    # an incomplete last round skips the first file, which it would be paired with
    return [i % files + (i >= whole_rounds) for i in range(batch_size)]


@cache
def _lists() -> tempfile.TemporaryDirectory[str]:
    """A folder of this process, removed when it ends."""
    return tempfile.TemporaryDirectory(prefix="bandsplit-files-")


@do_not_convert  # type: ignore[untyped-decorator]  # DALI would rewrite it where a graph has conditionals
def _listed(paths: Sequence[str], labels: Sequence[int]) -> str:
    """A file that names the images for DALI's reader: faster than a list in memory, and a name may have any bytes.

    The reader takes what is behind the last blank of a line as the label.
    """
    descriptor, name = tempfile.mkstemp(dir=_lists().name)
    with os.fdopen(descriptor, "wb") as file:
        file.writelines(b"%b %d\n" % (os.fsencode(path), label) for path, label in zip(paths, labels, strict=True))
    return name


def _decoding(decoder: Decoder, shard: Shard) -> dict[str, Any]:
    if shard.device == "cpu":
        return {"device": "cpu", **_DECODE}
    return {
        "device": "mixed",
        "hw_decoder_load": decoder.hw_load,
        "jpeg_fancy_upsampling": decoder.fancy_upsampling,
        "device_memory_padding": decoder.device_padding_mib * 2**20,
        "host_memory_padding": decoder.host_padding_mib * 2**20,
        **_DECODE,
    }


def _validation_graph(shard: Shard, config: RunConfig, files: ImageFiles, views: Sequence[View]) -> Any:
    data = config.data
    encoded, labels = fn.readers.file(
        file_list=_listed(files.paths, files.labels),
        pad_last_batch=True,
        stick_to_shard=True,
        prefetch_queue_depth=data.decoder.read_ahead,
        name="reader",
    )
    images = fn.decoders.image(encoded, **_decoding(data.decoder, shard))
    images = fn.resize(images, resize_shorter=data.resize_size, interp_type=_INTERPOLATION[data.interpolation])
    images = fn.crop(images, crop=(data.val_size, data.val_size))
    return _finish(images, fn.zeros(shape=[], dtype=types.INT32), labels, shard, views)


def _finish(images: Any, mirror: Any, labels: Any, shard: Shard, views: Sequence[View]) -> Any:
    """The split into one (h, w, 3·bands) output a branch, or the image and its flip where there is no operator."""
    if shard.device == "gpu":
        labels = labels.gpu()
    if not has_operator(shard.device):
        return images, mirror, labels
    return *(bands for view in views for bands in _split(images, mirror, shard, view)), labels


def _split(images: Any, mirror: Any, shard: Shard, view: View) -> Sequence[Any]:
    split = view.split
    matrix = transforms.transform_matrix(split.transform, split.block, split.norm)
    bands = fn.spectral_split(
        images,
        mirror=mirror,
        block=split.block,
        matrix=matrix.ravel().tolist(),
        mean=list(view.mean),
        std=list(view.std),
        groups=[k for group in split.groups for k in group],
        group_sizes=[len(group) for group in split.groups],
        dtype=types.FLOAT16 if shard.half else types.FLOAT,
    )
    return bands if isinstance(bands, list | tuple) else [bands]
