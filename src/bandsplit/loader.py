"""DALI's stream of outputs as batches of torch tensors, without a copy."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any, TypedDict

import torch
from einops import rearrange
from torch import Tensor

from bandsplit import dataset, pipeline, recipe, spectral
from bandsplit.dataset import Pictures
from bandsplit.errors import UserError
from bandsplit.parallel import Exchange, Mesh, Ranks, Transfer
from bandsplit.pipeline import Share, View
from bandsplit.schema import RunConfig
from bandsplit.trained import Teacher


@dataclass(frozen=True)
class Batch:
    """Inputs: one tensor (B, 3·bands, h, w) in channels_last a branch."""

    inputs: list[Tensor]
    labels: Tensor
    """(B,), int64; -1: no picture.  Where `config.mix` mixes pictures: shares of classes (B, classes), float32."""
    taught: Tensor | None = None
    """Logits of the teacher (B, classes), float32, where there is one."""

    @property
    def targets(self) -> list[Tensor]:
        return [self.labels] if self.taught is None else [self.labels, self.taught]

    def __len__(self) -> int:
        return len(self.labels)


def open_data(config: RunConfig, ranks: Ranks) -> tuple[Pictures, Pictures]:
    """Training and validation pictures, the same on every rank, all of which call it.

    Raises UserError as `dataset.open_data` does, and where a rank finds other pictures than the first one.
    """
    both = ranks.each(partial(dataset.open_data, config.data))
    if ranks.world_size == 1:
        return both
    here = [(len(pictures), pictures.digest) for pictures in both]
    first = ranks.from_first(lambda: here)

    def check() -> None:
        for part, mine, theirs in zip(("training", "validation"), here, first, strict=True):
            if mine != theirs:
                other = ", of other names or classes" if mine[0] == theirs[0] else ""
                raise UserError(
                    f"data.root: {config.data.root}: {mine[0]} {part} pictures, but rank 0 has {theirs[0]}{other}; "
                    "every rank needs the same ones"
                )

    ranks.each(check)
    return both


class UndecodablePicture(UserError):
    """A file that DALI cannot decode."""

    one_rank = True


def share_of(config: RunConfig, ranks: Ranks, batch_size: int, half: bool) -> Share:
    """This rank's share of the pictures."""
    threads = config.data.threads or max(1, (os.cpu_count() or 1) // ranks.local_world_size)
    return Share(ranks.rank, ranks.world_size, batch_size, threads, ranks.device.index, half)


class StreamState(TypedDict):
    """How far a stream of pictures is."""

    size: int
    """Side of its pictures in pixels."""
    batches: int
    """So many have been handed out."""
    pipeline: bytes | None
    """DALI's checkpoint; None: at the beginning."""


class TrainingLoader:
    """Endless training batches, mixed and taught, from one or several streams; `states` continue after the last ones.

    A run has as many streams as it had ranks when it began: a stream is a fixed share of every pass over the data with
    random numbers of its own, so that fewer ranks, with several streams each, see the same pictures in the same steps.
    """

    def __init__(
        self,
        config: RunConfig,
        pictures: Pictures,
        shares: Sequence[Share],
        states: Sequence[StreamState] | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self._config, self._pictures, self._shares, self._teacher = config, pictures, shares, teacher
        self._views = [View.of(config), *([teacher.view] if teacher else [])]
        start: StreamState = {"size": config.image_size_at(0), "batches": 0, "pipeline": None}
        self._build(states or [start] * len(shares))

    def _build(self, states: Sequence[StreamState]) -> None:
        self.size, self._batches = states[0]["size"], [state["batches"] for state in states]
        data = self._config.data.model_copy(update={"image_size": self.size})
        config = self._config.model_copy(update={"data": data})
        self._pipelines: list[Any] = []  # those of another size first give back their memory
        self._pipelines = [
            pipeline.training(config, self._pictures, share, state["pipeline"], self._views[1:])
            for share, state in zip(self._shares, states, strict=True)
        ]
        self._turns = cycle(range(len(states)))

    def resize(self, size: int) -> None:
        """From the next step on pictures have `size` pixels a side; the same ones, cut and augmented as they would be.

        Only between two steps, when all streams have had their turn.
        """
        if size != self.size:
            self._build([{**state, "size": size} for state in self.states()])

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """One of the next stream: they take turns."""
        turn = next(self._turns)
        share, number = self._shares[turn], self._batches[turn]
        batch = _next_batch(self._pipelines[turn], self._views, self._pictures, share)
        self._batches[turn] += 1
        inputs, labels = recipe.mix(batch.inputs, batch.labels, self._config, number, share.rank)
        branches = len(self._config.split.groups)
        taught = self._teacher.logits(inputs[branches:]) if self._teacher else None
        return Batch(inputs[:branches], labels, taught)

    def states(self) -> list[StreamState]:
        return [
            {"size": self.size, "batches": batches, "pipeline": bytes(pipe.checkpoint())}
            for pipe, batches in zip(self._pipelines, self._batches, strict=True)
        ]


class Streams:
    """Streams of pictures: as many as the run had ranks when it began, shared out evenly among those it has now.

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
        """Pictures of a stream at once."""
        self.parts = each * config.train.accumulation
        """Batches of a rank's streams in one optimizer step."""
        self._config, self._ranks = config, ranks

    def loader(
        self, pictures: Pictures, half: bool, states: Sequence[StreamState] | None, teacher: Teacher | None
    ) -> TrainingLoader:
        share = share_of(self._config, self._ranks, self.batch_size, half)
        threads = max(1, share.threads // len(self.own))
        shares = [replace(share, rank=s, world_size=self.count, threads=threads) for s in self.own]
        return TrainingLoader(self._config, pictures, shares, states, teacher)


class ValidationLoader:
    """This rank's part of the validation pictures, each of them exactly once an iteration.

    Every rank has the same number of batches of the same size: what fills them up has the label -1.
    """

    def __init__(self, config: RunConfig, pictures: Pictures, share: Share) -> None:
        mine = slice(share.rank, None, share.world_size)
        self._views, self._share, self._count = [View.of(config)], share, len(pictures.files[mine])
        first = slice(self._count or 1)  # a rank without any pictures fills its batches with the first
        files, labels = pictures.files[mine] or pictures.files, pictures.labels[mine] or pictures.labels
        self._pictures = replace(pictures, files=files[first], labels=labels[first])
        self._batches = math.ceil(len(pictures) / share.world_size / share.batch_size)
        self._pipeline = pipeline.validation(config, self._pictures, share)

    def __iter__(self) -> Iterator[Batch]:
        for n in range(self._batches):
            batch = _next_batch(self._pipeline, self._views, self._pictures, self._share)
            batch.labels[max(0, self._count - n * self._share.batch_size) :] = -1
            yield batch


class Deliveries:
    """Batches as this rank's branches learn or validate them, those of a whole row where branches are spread over it.

    Then the next batch is made and sent while the device works on the one before.
    """

    def __init__(self, batches: Iterable[Batch], mesh: Mesh) -> None:
        self._batches = iter(batches)
        self._exchange = Exchange(mesh) if mesh.branch_groups > 1 else None
        self._under_way: Transfer | None = None

    def __iter__(self) -> Iterator[Batch]:
        while (batch := self._next(ahead=True)) is not None:
            yield batch

    def take(self, count: int, ahead: bool) -> list[Batch]:
        """The next `count` of endless batches; `ahead`: one more is made and sent, and streams are further by one."""
        batches = [self._next(ahead or n + 1 < count) for n in range(count)]
        return [batch for batch in batches if batch is not None]

    def of_own_pictures(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (own branches, B, classes) and labels of a batch -> (all branches, B', classes), labels (B',).

        B' are the pictures of it that this rank has decoded.
        """
        return (logits, labels) if self._exchange is None else self._exchange.give_back(logits, labels)

    def _next(self, ahead: bool) -> Batch | None:
        if self._exchange is None:
            return next(self._batches, None)
        transfer = self._under_way or self._send(self._exchange)
        self._under_way = self._send(self._exchange) if ahead and transfer else None
        if transfer is None:
            return None
        inputs, targets = transfer.wait()
        return Batch(inputs, *targets)

    def _send(self, exchange: Exchange) -> Transfer | None:
        with exchange.on_side_stream():
            batch = next(self._batches, None)
            return exchange.send(batch.inputs, batch.targets) if batch else None


def _next_batch(pipe: Any, views: Sequence[View], pictures: Pictures, share: Share) -> Batch:
    try:
        outputs = pipe.run(torch.cuda.current_stream() if share.device == "gpu" else None)
    except RuntimeError as error:
        culprit = _culprit(str(error), pictures, share)
        if culprit is None:
            raise
        raise UndecodablePicture(f"{culprit}: this picture cannot be read or decoded; mend or remove it") from error
    *images, labels = [torch.from_dlpack(output.as_tensor()) for output in outputs]
    if pipeline.has_operator(share.device):
        inputs = [rearrange(x, "b h w c -> b c h w") for x in images]
    else:
        picture, mirror = images
        inputs = [x for view in views for x in _split_in_torch(picture, mirror, view, share)]
    return Batch(inputs, labels.flatten().long())


def _culprit(error: str, pictures: Pictures, share: Share) -> str | None:
    """The file behind an error of the reader or the decoder, which name it only sometimes."""
    if "fn.decoders" not in error and "fn.readers" not in error:
        return None
    return pipeline.first_undecodable(pictures.files, share.threads)


def _split_in_torch(pictures: Tensor, mirror: Tensor, view: View, share: Share) -> list[Tensor]:
    split = view.split
    return spectral.split_pictures(
        pictures,
        spectral.transform_matrix(split.transform, split.block, split.norm),
        split.block,
        view.mean,
        view.std,
        mirror.flatten().to(pictures.device),
        split.groups,
        torch.float16 if share.half else torch.float32,
    )
