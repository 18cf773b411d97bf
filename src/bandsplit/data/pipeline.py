"""The DALI graphs from JPEG files to the inputs of every branch, one definition for CPU and GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from loguru import logger
from numpy.typing import NDArray
from nvidia.dali import Pipeline, pipeline_def, types
from nvidia.dali import fn as dali_fn
from nvidia.dali.pipeline import do_not_convert
from nvidia.dali.types import BatchInfo

from bandsplit import seeds
from bandsplit.config.schema import Decoder, RunConfig
from bandsplit.data import augmentation
from bandsplit.data.corruption import corrupted
from bandsplit.data.crops import CENTER, Crop
from bandsplit.data.images import ImageFiles
from bandsplit.data.order import TrainingOrder, ValidationOrder
from bandsplit.spectral import native
from bandsplit.spectral.view import View

fn: Any = dali_fn  # operators are made at run time, ours among them: DALI's stubs do not know them all

# torchvision does not rotate by EXIF either, and ImageNet's published figures are without
_DECODE = {"output_type": types.RGB, "adjust_orientation": False}

# both with DALI's antialiasing, which is on by default
_INTERPOLATION = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


@dataclass(frozen=True)
class Shard:
    """What one rank, or one stream of a rank, reads of a data set."""

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
    """Whether `fn.spectral_split` is there for "cpu" or "gpu", built if need be; warns once if it is not."""
    try:
        native.load()
        if device == "gpu" and not native.has_gpu_kernel():
            raise native.BuildError("there is no nvcc to build its GPU kernel: pip install -e .[nvcc]")
    except native.BuildError as error:
        logger.warning("The spectral split runs in plain torch, which is slower: {}", error)
        return False
    return True


def training(
    config: RunConfig, files: ImageFiles, shard: Shard, checkpoint: bytes | None = None, also: Sequence[View] = ()
) -> Pipeline:
    """An endless stream of batches, in the order of `TrainingOrder`.

    Outputs: the inputs of every branch, those of the views in `also`, and labels (B,), int64.  A checkpoint of
    such a pipeline continues exactly after the last batch that was handed out.
    """
    seed = seeds.derived(config.seed, "augmentation", shard.rank)
    conditionals = augmentation.needs_conditionals(config.augment)
    return _build(_training_graph, shard, config, files, also, seed, checkpoint, conditionals)


def training_order(config: RunConfig, files: ImageFiles, shard: Shard) -> TrainingOrder:
    """Which images the batches of `training` have."""
    repeats = config.augment.repeats
    return TrainingOrder(len(files), shard.batch_size, config.seed, shard.rank, shard.world_size, repeats)


def validation(
    config: RunConfig,
    files: ImageFiles,
    shard: Shard,
    checkpoint: bytes | None = None,
    crops: Sequence[Crop] = CENTER,
) -> Pipeline:
    """This rank's images in the order of `ValidationOrder`, repeated endlessly.

    Each batch comes once for each of the crops, in turn.
    """
    return _build(partial(_validation_graph, crops=crops), shard, config, files, checkpoint=checkpoint)


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
    return pipe


def _training_graph(shard: Shard, config: RunConfig, files: ImageFiles, views: Sequence[View]) -> Any:
    return _finish(*augmented(shard, config, files), shard, views)


def augmented(shard: Shard, config: RunConfig, files: ImageFiles) -> tuple[Any, Any, Any]:
    """The training graph up to the split: uint8 images, whether to mirror each, and labels."""
    data = config.data
    encoded, labels = _read(files, training_order(config, files, shard))
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


def _read(files: ImageFiles, order: TrainingOrder | ValidationOrder) -> tuple[Any, Any]:
    """The content of the files in their order, and labels.

    DALI reads the files, but their order is ours: `readers.file` would hold every name in memory, twice, and would not
    say which files are in a batch.
    """
    names, labels = fn.external_source(
        source=_source(files, order),
        num_outputs=2,
        batch_info=True,
        dtype=[types.UINT8, types.INT64],
        ndim=[1, 0],
    )
    # not mapped: a mapped file that is cut while it is decoded would kill the process (SIGBUS)
    return fn.io.file.read(names, dont_use_mmap=True), labels


@do_not_convert  # type: ignore[untyped-decorator]  # DALI would rewrite it where a graph has conditionals
def _source(files: ImageFiles, order: TrainingOrder | ValidationOrder) -> Callable[[BatchInfo], Any]:
    labels = np.asarray(files.labels)

    def names_and_labels(about: BatchInfo) -> tuple[list[NDArray[np.uint8]], NDArray[np.int64]]:
        indices = order.batch(about.iteration)
        names = [np.frombuffer(os.fsencode(files.paths[i]), dtype=np.uint8) for i in indices.tolist()]
        return names, labels[indices].astype(np.int64)

    return names_and_labels


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


def _validation_graph(
    shard: Shard, config: RunConfig, files: ImageFiles, views: Sequence[View], crops: Sequence[Crop]
) -> Any:
    data = config.data
    order = ValidationOrder(len(files), shard.batch_size, shard.rank, shard.world_size, len(crops))
    encoded, labels = _read(files, order)
    images = fn.decoders.image(encoded, **_decoding(data.decoder, shard))
    images = fn.resize(images, resize_shorter=data.resize_size, interp_type=_INTERPOLATION[data.interpolation])
    x, y, mirror = _turns(crops, shard.batch_size)
    images = fn.crop(images, crop=(data.val_size, data.val_size), crop_pos_x=x, crop_pos_y=y)
    (corruption,) = {crop.corruption for crop in crops}
    if corruption is not None:
        images = corrupted(images, corruption, order.batch, config.seed, data.val_size)
    return _finish(images, mirror, labels, shard, views)


def _turns(crops: Sequence[Crop], batch_size: int) -> Any:
    """Position and mirroring of the images of a batch: the crops take turns, batch by batch."""

    def of_batch(about: BatchInfo) -> Any:
        crop = crops[about.iteration % len(crops)]
        mirror = np.full(batch_size, crop.mirror, dtype=np.int32)
        return np.full(batch_size, crop.x, dtype=np.float32), np.full(batch_size, crop.y, dtype=np.float32), mirror

    numbers = [types.FLOAT, types.FLOAT, types.INT32]
    return fn.external_source(source=of_batch, num_outputs=3, batch_info=True, dtype=numbers, ndim=[0, 0, 0])


def _finish(images: Any, mirror: Any, labels: Any, shard: Shard, views: Sequence[View]) -> Any:
    """One output (h, w, 3·bands) per input of each view, or image, flip and labels if the operator is not available."""
    if shard.device == "gpu":
        labels = labels.gpu()
    if not has_operator(shard.device):
        return images, mirror, labels
    return *(bands for view in views for bands in _split(images, mirror, shard, view)), labels


def _split(images: Any, mirror: Any, shard: Shard, view: View) -> Sequence[Any]:
    split, inputs = view.split, view.inputs
    bands = fn.spectral_split(
        images,
        mirror=mirror,
        block=split.block,
        matrix=view.matrix.ravel().tolist(),
        mean=list(view.mean),
        std=list(view.std),
        groups=[k for bands in inputs for k in bands],
        group_sizes=[len(bands) for bands in inputs],
        dtype=types.FLOAT16 if shard.half else types.FLOAT,
    )
    return bands if isinstance(bands, list | tuple) else [bands]
