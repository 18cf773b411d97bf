"""DALI's stream of outputs as batches of torch tensors, without a copy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from bandsplit import pipeline, spectral
from bandsplit.dataset import Pictures
from bandsplit.errors import UserError
from bandsplit.parallel import Ranks
from bandsplit.pipeline import Share
from bandsplit.schema import RunConfig


@dataclass(frozen=True)
class Batch:
    """Inputs: one tensor (B, 3·bands, h, w) in channels_last a branch.  Labels: (B,), int64."""

    inputs: list[Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Batch:
        return Batch([x[:count] for x in self.inputs], self.labels[:count])


class UndecodablePicture(UserError):
    """A file that DALI cannot decode."""

    one_rank = True


def share_of(config: RunConfig, ranks: Ranks, batch_size: int, half: bool) -> Share:
    threads = config.data.threads or max(1, (os.cpu_count() or 1) // ranks.local_world_size)
    return Share(ranks.rank, ranks.world_size, batch_size, threads, ranks.device.index, half)


class TrainingLoader:
    """Endless training batches of this rank; `state` continues after the last one that was handed out."""

    def __init__(self, config: RunConfig, pictures: Pictures, share: Share, state: bytes | None = None) -> None:
        self._config, self._pictures, self._share = config, pictures, share
        self._pipeline = pipeline.training(config, pictures, share, state)

    def __next__(self) -> Batch:
        return _next_batch(self._pipeline, self._config, self._pictures, self._share)

    def state(self) -> bytes:
        return bytes(self._pipeline.checkpoint())


class ValidationLoader:
    """This rank's part of the validation pictures, each of them exactly once an iteration."""

    def __init__(self, config: RunConfig, pictures: Pictures, share: Share) -> None:
        mine = slice(share.rank, None, share.world_size)
        self._config, self._share = config, share
        self._pictures = replace(pictures, files=pictures.files[mine], labels=pictures.labels[mine])
        self._pipeline = pipeline.validation(config, self._pictures, share) if len(self._pictures) else None

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self._pictures), self._share.batch_size):
            batch = _next_batch(self._pipeline, self._config, self._pictures, self._share)
            yield batch.first(len(self._pictures) - start)  # the last batch is filled up with repetitions


def _next_batch(pipe: Any, config: RunConfig, pictures: Pictures, share: Share) -> Batch:
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
        inputs = _split_in_torch(picture, mirror, config, share)
    return Batch(inputs, labels.flatten().long())


def _culprit(error: str, pictures: Pictures, share: Share) -> str | None:
    """The file behind an error of the reader or the decoder, which name it only sometimes."""
    if "fn.decoders" not in error and "fn.readers" not in error:
        return None
    return pipeline.first_undecodable(pictures.files, share.threads)


def _split_in_torch(pictures: Tensor, mirror: Tensor, config: RunConfig, share: Share) -> list[Tensor]:
    split, data = config.split, config.data
    return spectral.split_pictures(
        pictures,
        spectral.transform_matrix(split.transform, split.block, split.norm),
        split.block,
        data.mean,
        data.std,
        mirror.flatten().to(pictures.device),
        split.groups,
        torch.float16 if share.half else torch.float32,
    )
