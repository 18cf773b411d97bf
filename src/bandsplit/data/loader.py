"""Batches of torch tensors from DALI pipelines, without a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import cycle, islice
from pathlib import Path
from typing import Protocol, TypedDict, cast

import torch
from einops import rearrange
from loguru import logger
from torch import Tensor

from bandsplit.config.schema import RunConfig
from bandsplit.cpus import available_cpus
from bandsplit.data import images, mixing, pipeline
from bandsplit.data.crops import CENTER, Crop
from bandsplit.data.images import ImageFiles, Place
from bandsplit.data.order import Indices, ValidationOrder
from bandsplit.data.pipeline import Shard
from bandsplit.data.recovery import BadImage, Position, RecoveringPipeline
from bandsplit.distributed.ranks import Ranks
from bandsplit.errors import UserError
from bandsplit.spectral import transforms
from bandsplit.spectral.view import View

PADDING, LEFT_OUT = -1, -2
"""Labels of validation images that do not count: repeated to fill a batch, or impossible to decode."""


@dataclass(frozen=True)
class Batch:
    """One batch as the branches see it."""

    inputs: list[Tensor]
    """One tensor (B, 3·bands, h, w) per branch, in channels_last memory format; the same for those of equal bands."""
    labels: Tensor
    """Class indices (B,), int64, or PADDING, LEFT_OUT; with mixup or CutMix class probabilities (B, classes), float32.
    """
    teacher_logits: Tensor | None = None
    """(B, classes), float32; None without a teacher."""

    @property
    def targets(self) -> list[Tensor]:
        return [self.labels] if self.teacher_logits is None else [self.labels, self.teacher_logits]

    def copied(self) -> Batch:
        """The batch in memory of its own, in the same memory formats."""
        teacher_logits = None if self.teacher_logits is None else self.teacher_logits.clone()
        copies = {id(x): x.clone() for x in self.inputs}
        return Batch([copies[id(x)] for x in self.inputs], self.labels.clone(), teacher_logits)

    def __len__(self) -> int:
        return len(self.labels)


class Teacher(Protocol):
    """What distillation needs of a teacher."""

    view: View

    def logits(self, inputs: Sequence[Tensor]) -> Tensor:
        """Inputs of its view, one (B, channels, h, w) per branch -> fused logits (B, classes), float32."""


def open_data(
    config: RunConfig, ranks: Ranks, parts: Sequence[str] = ("train", "val"), signal: Callable[[], int] = lambda: 0
) -> dict[str, ImageFiles]:
    """The images of each part of the data set, the same on every rank; every rank must call it.

    Rank 0 examines files that are new or have changed, and the other ranks read its index. A rank that does not find
    the index, because its node has its own copy of the data, examines that copy.

    Raises UserError as `images.find` does, if too many images cannot be decoded, and if a rank has other images than
    rank 0. Raises Interrupted if a rank receives a signal meanwhile.
    """
    data = config.data
    places = ranks.finish(images.examine(data, parts) if ranks.is_first else None, signal)
    firsts = ranks.from_first(lambda: cast(dict[str, Place], places))
    opened = ranks.each(lambda: {part: images.read_part(data, part, place) for part, place in firsts.items()})
    if ranks.largest([None in opened.values()])[0]:
        own = ranks.finish(images.examine(data, parts) if None in opened.values() else None, signal)
        opened |= {part: place.opened() for part, place in (own or {}).items()}
    files = {part: cast(ImageFiles, each) for part, each in opened.items()}
    ranks.each(partial(_require_same, config, files, firsts))
    if ranks.is_first:
        for part, each in files.items():
            images.log_left_out(getattr(data, part), each)
            if ranks.device.type == "cuda":
                images.log_wrong_on_gpu(getattr(data, part), each)
    ranks.each(partial(images.require_few_bad, data, files))
    return files


def _require_same(config: RunConfig, files: Mapping[str, ImageFiles], firsts: Mapping[str, Place]) -> None:
    """Raises UserError on a rank that has other images than rank 0."""
    for part, mine in files.items():
        if mine.digest != firsts[part].digest:
            raise UserError(
                f"data.root: {config.data.root}: {len(mine)} images in {getattr(config.data, part)}, which differ from "
                f"the {firsts[part].images} of rank 0 in number, name, class or size; every rank needs the same ones"
            )


def shard_of(config: RunConfig, ranks: Ranks, batch_size: int, half: bool) -> Shard:
    """What this rank reads, with `data.threads` DALI threads, or its share of the node's CPUs."""
    threads = config.data.threads or max(1, available_cpus() // ranks.local_world_size)
    return Shard(ranks.rank, ranks.world_size, batch_size, threads, ranks.device.index, half)


class StreamState(TypedDict):
    """Position of a stream of images."""

    size: int
    """Image side in pixels."""
    batches: int
    """Batches delivered so far."""
    pipeline: bytes | None
    """DALI's checkpoint; None at the beginning."""
    bad: list[BadImage]
    """Images of this stream that went bad; each stream has its own list."""


class TrainingLoader:
    """Endless training batches from one or more streams, with mixing and teacher logits; `states` resume them.

    A run keeps the number of streams it started with, one per rank. A stream is a fixed slice of every global batch
    with its own random numbers, so fewer ranks with several streams each see the same images in the same steps.
    """

    def __init__(
        self,
        config: RunConfig,
        files: ImageFiles,
        shards: Sequence[Shard],
        states: Sequence[StreamState] | None = None,
        teacher: Teacher | None = None,
        positions: Path | None = None,
    ) -> None:
        """`positions`: folder for a file with the position of each stream, for a restart after a crash."""
        self._config, self._files, self._shards, self._teacher = config, files, shards, teacher
        self._views = [View.of(config), *([teacher.view] if teacher else [])]
        start: StreamState = {"size": config.image_size_at(0), "batches": 0, "pipeline": None, "bad": []}
        self._build(states or [start] * len(shards))
        self._positions = [Position(positions / f".position_{shard.rank:02d}") for shard in shards if positions]
        for shard, position, pipe in zip(shards, self._positions, self._pipelines, strict=False):
            if position.left_at is not None:
                logger.info(
                    "stream {} ended without notice at batch {}: the images of this batch and of those that were "
                    "prepared ahead are examined first",
                    shard.rank,
                    position.left_at,
                )
                pipe.examine(position.left_at, 1 + config.data.prefetch)

    def _build(self, states: Sequence[StreamState]) -> None:
        self.size = states[0]["size"]
        data = self._config.data.model_copy(update={"image_size": self.size})
        config = self._config.model_copy(update={"data": data})
        self._pipelines: list[RecoveringPipeline] = []  # free the memory of the previous size first
        self._pipelines = [self._stream(config, *each) for each in zip(self._shards, states, strict=True)]
        self._turns = cycle(range(len(states)))

    def _stream(self, config: RunConfig, shard: Shard, state: StreamState) -> RecoveringPipeline:
        also, order = self._views[1:], cache(partial(pipeline.training_order, config, self._files, shard))
        return RecoveringPipeline(
            lambda files, checkpoint: pipeline.training(config, files, shard, checkpoint, also),
            lambda number: order().batch(number),  # only when an image is bad: an order takes memory
            config,
            self._files,
            shard.threads,
            training=True,
            batches=state["batches"],
            checkpoint=state["pipeline"],
            bad=state["bad"],
        )

    def resize(self, size: int) -> None:
        """Changes the image side in pixels from the next step on. Order, crops and augmentation do not change.

        Call it only between steps, when every stream has delivered the same number of batches.
        """
        if size != self.size:
            self._build([{**state, "size": size} for state in self.states()])

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch; streams take turns."""
        turn = next(self._turns)
        shard, pipe = self._shards[turn], self._pipelines[turn]
        number = pipe.batches
        if self._positions:
            self._positions[turn].note(number)
        batch = _next_batch(pipe, self._views, shard)
        inputs, labels = mixing.mix(batch.inputs, batch.labels, self._config, number, shard.rank)
        branches = len(self._config.split.groups)
        teacher_logits = self._teacher.logits(inputs[branches:]) if self._teacher else None
        return Batch(inputs[:branches], labels, teacher_logits)

    def states(self) -> list[StreamState]:
        return [
            {"size": self.size, "batches": pipe.batches, "pipeline": pipe.checkpoint, "bad": pipe.bad}
            for pipe in self._pipelines
        ]

    def bad(self) -> list[tuple[int, BadImage]]:
        """Images that went bad and whose place another one has taken, each with the number of its stream."""
        return [
            (shard.rank, each)
            for shard, pipe in zip(self._shards, self._pipelines, strict=True)
            for each in pipe.bad
            if each["batch"] >= 0
        ]

    def close(self) -> None:
        """Notes that this process ends without a crash."""
        for position in self._positions:
            position.remove()
        self._positions = []


class Streams:
    """The streams of a run, one per rank that it started with, divided evenly among its ranks now.

    Raises UserError if they cannot be divided evenly.
    """

    def __init__(self, config: RunConfig, count: int, ranks: Ranks) -> None:
        if count % ranks.world_size:
            possible = [str(n) for n in range(count, 0, -1) if count % n == 0]
            raise UserError(
                f"this run started on {count} ranks; it can be resumed on {' or '.join(possible)}, not on "
                f"{ranks.world_size}"
            )
        self.count = count
        each = count // ranks.world_size
        self.own = range(ranks.rank * each, (ranks.rank + 1) * each)
        self.batch_size = config.rank_batch_size(count)
        """Images per batch of one stream."""
        self.parts = each * config.grad_accum_steps
        """Batches this rank takes per optimizer step: its streams times grad_accum_steps."""
        self._config, self._ranks = config, ranks

    def loader(
        self,
        files: ImageFiles,
        half: bool,
        states: Sequence[StreamState] | None,
        teacher: Teacher | None,
        positions: Path | None = None,
    ) -> TrainingLoader:
        return TrainingLoader(self._config, files, self.shards(half), states, teacher, positions)

    def shards(self, half: bool) -> list[Shard]:
        """What each of this rank's streams reads."""
        shard = shard_of(self._config, self._ranks, self.batch_size, half)
        threads = max(1, shard.threads // len(self.own))
        return [replace(shard, rank=s, world_size=self.count, threads=threads) for s in self.own]


class ValidationLoader:
    """This rank's share of the validation images, each exactly once per iteration.

    Every rank has the same number of batches of the same size.  Padding has the label PADDING, and an image that cannot
    be decoded LEFT_OUT.
    """

    def __init__(self, config: RunConfig, files: ImageFiles, shard: Shard, crops: Sequence[Crop] = CENTER) -> None:
        """With several crops, each batch comes once for each of them, in their order."""
        self.crops = len(crops)
        self._views, self._shard = [View.of(config)], shard
        self._order = ValidationOrder(len(files), shard.batch_size, shard.rank, shard.world_size, len(crops))
        self._pipeline = RecoveringPipeline(
            lambda files, checkpoint: pipeline.validation(config, files, shard, checkpoint, crops),
            self._order.batch,
            config,
            files,
            shard.threads,
            training=False,
        )

    def __len__(self) -> int:
        """Batches of this rank."""
        return self._order.batches

    def __iter__(self) -> Iterator[Batch]:
        for n in range(self._order.batches):
            batch = _next_batch(self._pipeline, self._views, self._shard)
            batch.labels[self._pipeline.bad_places(n)] = LEFT_OUT
            batch.labels[self._order.own(n) :] = PADDING
            yield batch

    @property
    def left_out(self) -> list[BadImage]:
        """Images of this rank's share that went bad."""
        return [each for each in self._pipeline.bad if each["batch"] >= 0]

    def rows(self, number: int) -> Indices:
        """Indices (B,) of the images of this rank's batch `number`, padding included."""
        return self._order.batch(number)


def _next_batch(pipe: RecoveringPipeline, views: Sequence[View], shard: Shard) -> Batch:
    outputs = pipe.run(torch.cuda.current_stream() if shard.device == "gpu" else None)
    *outputs, labels = [torch.from_dlpack(output.as_tensor()) for output in outputs]
    if pipeline.has_operator(shard.device):
        bands = iter([rearrange(x, "b h w c -> b c h w") for x in outputs])
        of_views = [list(islice(bands, len(view.inputs))) for view in views]
    else:
        images, mirror = outputs
        of_views = [_split_in_torch(images, mirror, view, shard) for view in views]
    inputs = [x for view, found in zip(views, of_views, strict=True) for x in view.of_branches(found)]
    return Batch(inputs, labels.flatten().long())


def _split_in_torch(images: Tensor, mirror: Tensor, view: View, shard: Shard) -> list[Tensor]:
    return transforms.split_images(
        images,
        view.matrix,
        view.split.block,
        view.mean,
        view.std,
        mirror.flatten().to(images.device),
        view.inputs,
        torch.float16 if shard.half else torch.float32,
    )
