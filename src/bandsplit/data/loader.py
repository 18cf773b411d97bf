"""DALI's stream of outputs as batches of torch tensors, without a copy."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any, Protocol, TypedDict

import torch
from einops import rearrange
from torch import Tensor

from bandsplit.config.schema import RunConfig
from bandsplit.data import images, mixing, pipeline
from bandsplit.data.images import ImageFiles
from bandsplit.data.pipeline import Shard
from bandsplit.distributed.ranks import Ranks
from bandsplit.errors import UserError
from bandsplit.spectral import transforms
from bandsplit.spectral.view import View


@dataclass(frozen=True)
class Batch:
    """Inputs: one tensor (B, 3·bands, h, w) in channels_last a branch."""

    inputs: list[Tensor]
    labels: Tensor
    """(B,), int64; -1: no image.  Where `config.mix` mixes images: shares of classes (B, classes), float32."""
    teacher_logits: Tensor | None = None
    """Logits of the teacher (B, classes), float32, where there is one."""

    @property
    def targets(self) -> list[Tensor]:
        return [self.labels] if self.teacher_logits is None else [self.labels, self.teacher_logits]

    def __len__(self) -> int:
        return len(self.labels)


class Teacher(Protocol):
    """Anything with logits to distil from."""

    view: View

    def logits(self, inputs: Sequence[Tensor]) -> Tensor:
        """Inputs as its view has them, (B, channels, h, w) each -> (B, classes), float32."""


def open_data(config: RunConfig, ranks: Ranks) -> tuple[ImageFiles, ImageFiles]:
    """Training and validation images, the same on every rank, all of which call it.

    Raises UserError as `images.open_data` does, and where a rank finds other images than the first one.
    """
    both = ranks.each(partial(images.open_data, config.data))
    if ranks.world_size == 1:
        return both
    here = [(len(files), files.digest) for files in both]
    first = ranks.from_first(lambda: here)

    def check() -> None:
        for part, mine, theirs in zip(("training", "validation"), here, first, strict=True):
            if mine != theirs:
                other = ", of other names or classes" if mine[0] == theirs[0] else ""
                raise UserError(
                    f"data.root: {config.data.root}: {mine[0]} {part} images, but rank 0 has {theirs[0]}{other}; "
                    "every rank needs the same ones"
                )

    ranks.each(check)
    return both


class UndecodableImage(UserError):
    """A file that DALI cannot decode."""

    one_rank = True


def shard_of(config: RunConfig, ranks: Ranks, batch_size: int, half: bool) -> Shard:
    """This rank's shard of the images."""
    threads = config.data.threads or max(1, (os.cpu_count() or 1) // ranks.local_world_size)
    return Shard(ranks.rank, ranks.world_size, batch_size, threads, ranks.device.index, half)


class StreamState(TypedDict):
    """How far a stream of images is."""

    size: int
    """Side of its images in pixels."""
    batches: int
    """So many have been handed out."""
    pipeline: bytes | None
    """DALI's checkpoint; None: at the beginning."""


class TrainingLoader:
    """Endless training batches from one or several streams, with mixing and teacher logits; `states` resume them.

    A run has as many streams as it had ranks when it began: a stream is a fixed shard of every pass over the data with
    random numbers of its own, so that fewer ranks, with several streams each, see the same images in the same steps.
    """

    def __init__(
        self,
        config: RunConfig,
        files: ImageFiles,
        shards: Sequence[Shard],
        states: Sequence[StreamState] | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self._config, self._files, self._shards, self._teacher = config, files, shards, teacher
        self._views = [View.of(config), *([teacher.view] if teacher else [])]
        start: StreamState = {"size": config.image_size_at(0), "batches": 0, "pipeline": None}
        self._build(states or [start] * len(shards))

    def _build(self, states: Sequence[StreamState]) -> None:
        self.size, self._batches = states[0]["size"], [state["batches"] for state in states]
        data = self._config.data.model_copy(update={"image_size": self.size})
        config = self._config.model_copy(update={"data": data})
        self._pipelines: list[Any] = []  # those of another size first give back their memory
        self._pipelines = [
            pipeline.training(config, self._files, shard, state["pipeline"], self._views[1:])
            for shard, state in zip(self._shards, states, strict=True)
        ]
        self._turns = cycle(range(len(states)))

    def resize(self, size: int) -> None:
        """From the next step on images have `size` pixels a side; the same ones, cut and augmented as they would be.

        Only between two steps, when all streams have had their turn.
        """
        if size != self.size:
            self._build([{**state, "size": size} for state in self.states()])

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """One of the next stream: they take turns."""
        turn = next(self._turns)
        shard, number = self._shards[turn], self._batches[turn]
        batch = _next_batch(self._pipelines[turn], self._views, self._files, shard)
        self._batches[turn] += 1
        inputs, labels = mixing.mix(batch.inputs, batch.labels, self._config, number, shard.rank)
        branches = len(self._config.split.groups)
        teacher_logits = self._teacher.logits(inputs[branches:]) if self._teacher else None
        return Batch(inputs[:branches], labels, teacher_logits)

    def states(self) -> list[StreamState]:
        return [
            {"size": self.size, "batches": batches, "pipeline": bytes(pipe.checkpoint())}
            for pipe, batches in zip(self._pipelines, self._batches, strict=True)
        ]


class Streams:
    """Streams of images: as many as the run had ranks when it began, shared out evenly among those it has now.

    Raises UserError where that cannot be.
    """

    def __init__(self, config: RunConfig, count: int, ranks: Ranks) -> None:
        if count % ranks.world_size:
            possible = [str(n) for n in range(count, 0, -1) if count % n == 0]
            raise UserError(
                f"this run began on {count} ranks; it can go on with {' or '.join(possible)}, not with "
                f"{ranks.world_size}"
            )
        self.count = count
        each = count // ranks.world_size
        self.own = range(ranks.rank * each, (ranks.rank + 1) * each)
        self.batch_size = config.rank_batch_size(count)
        """Images of a stream at once."""
        self.parts = each * config.train.grad_accum_steps
        """Batches of a rank's streams in one optimizer step."""
        self._config, self._ranks = config, ranks

    def loader(
        self, files: ImageFiles, half: bool, states: Sequence[StreamState] | None, teacher: Teacher | None
    ) -> TrainingLoader:
        shard = shard_of(self._config, self._ranks, self.batch_size, half)
        threads = max(1, shard.threads // len(self.own))
        shards = [replace(shard, rank=s, world_size=self.count, threads=threads) for s in self.own]
        return TrainingLoader(self._config, files, shards, states, teacher)


class ValidationLoader:
    """This rank's part of the validation images, each of them exactly once an iteration.

    Every rank has the same number of batches of the same size: what fills them up has the label -1.
    """

    def __init__(self, config: RunConfig, files: ImageFiles, shard: Shard) -> None:
        mine = slice(shard.rank, None, shard.world_size)
        self._views, self._share, self._count = [View.of(config)], shard, len(files.paths[mine])
        first = slice(self._count or 1)  # a rank without any images fills its batches with the first
        paths, labels = files.paths[mine] or files.paths, files.labels[mine] or files.labels
        self._files = replace(files, paths=paths[first], labels=labels[first])
        self._batches = math.ceil(len(files) / shard.world_size / shard.batch_size)
        self._pipeline = pipeline.validation(config, self._files, shard)

    def __iter__(self) -> Iterator[Batch]:
        for n in range(self._batches):
            batch = _next_batch(self._pipeline, self._views, self._files, self._share)
            batch.labels[max(0, self._count - n * self._share.batch_size) :] = -1
            yield batch


def _next_batch(pipe: Any, views: Sequence[View], files: ImageFiles, shard: Shard) -> Batch:
    try:
        outputs = pipe.run(torch.cuda.current_stream() if shard.device == "gpu" else None)
    except RuntimeError as error:
        culprit = _culprit(str(error), files, shard)
        if culprit is None:
            raise
        raise UndecodableImage(f"{culprit}: this image cannot be read or decoded; mend or remove it") from error
    *outputs, labels = [torch.from_dlpack(output.as_tensor()) for output in outputs]
    if pipeline.has_operator(shard.device):
        inputs = [rearrange(x, "b h w c -> b c h w") for x in outputs]
    else:
        images, mirror = outputs
        inputs = [x for view in views for x in _split_in_torch(images, mirror, view, shard)]
    return Batch(inputs, labels.flatten().long())


def _culprit(error: str, files: ImageFiles, shard: Shard) -> str | None:
    """The file behind an error of the reader or the decoder, which name it only sometimes."""
    if "fn.decoders" not in error and "fn.readers" not in error:
        return None
    return pipeline.first_undecodable(files.paths, shard.threads)


def _split_in_torch(images: Tensor, mirror: Tensor, view: View, shard: Shard) -> list[Tensor]:
    split = view.split
    return transforms.split_images(
        images,
        transforms.transform_matrix(split.transform, split.block, split.norm),
        split.block,
        view.mean,
        view.std,
        mirror.flatten().to(images.device),
        split.groups,
        torch.float16 if shard.half else torch.float32,
    )
