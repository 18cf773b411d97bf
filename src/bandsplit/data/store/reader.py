"""Batches from a band store: what `loader` makes of image files, without decoding.

The stored values of a batch are copied into one buffer a band, sent to the device, and become numbers there.  All of it
is done in a thread ahead of the training; on a GPU from pinned memory and on a CUDA stream of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor

from bandsplit import seeds
from bandsplit.config.schema import RunConfig
from bandsplit.data import mixing
from bandsplit.data.crops import CENTER, Crop
from bandsplit.data.loader import PADDING, Batch, StreamState, Teacher
from bandsplit.data.order import TrainingOrder, ValidationOrder
from bandsplit.data.pipeline import Shard
from bandsplit.data.recovery import BadImage
from bandsplit.data.store import memory
from bandsplit.data.store.manifest import StoredImages, bands_to_read, require_view
from bandsplit.data.store.memory import MappedBand
from bandsplit.errors import UserError
from bandsplit.spectral import transforms
from bandsplit.spectral.view import View

J = TypeVar("J")
R = TypeVar("R")

IN_CACHE = 64
"""Images that a CPU converts at once, so that they stay in its cache."""


class BandReader:
    """Reads images of a band store as the inputs of the branches of some views."""

    def __init__(
        self, images: StoredImages, views: Sequence[View], shard: Shard, hflip: float = 0.0, in_memory: bool = False
    ) -> None:
        self._images = images
        self._views = [(view, view.factors) for view in views]
        """With what each band is multiplied by."""
        self._device = torch.device("cpu") if shard.device_id is None else torch.device("cuda", shard.device_id)
        self._dtype = torch.float16 if shard.half else torch.float32
        self._in_memory, manifest, about = in_memory, images.manifest, images.about
        read = sorted({band for view in views for band in bands_to_read(view.split, hflip)})
        shape = manifest.shape(images.part)
        self._bands = {k: MappedBand(images.shards(k), about.shards, shape, manifest.dtype) for k in read}
        if in_memory:
            memory.hold([*self._bands.values()])
        matrix = transforms.transform_matrix(manifest.transform, manifest.block, manifest.norm)
        self._flip = transforms.flip_matrix(matrix) if hflip else np.eye(len(matrix))
        self._lines: dict[tuple[int, int, float], tuple[Tensor, Tensor]] = {}
        on_gpu = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if on_gpu else None  # type: ignore[no-untyped-call]

    def read(
        self,
        indices: npt.NDArray[np.int64],
        side: int,
        corners: npt.NDArray[np.int64] | None = None,
        mirror: npt.NDArray[np.bool_] | None = None,
    ) -> Ahead:
        """Images by number, cut to `side` x `side` values at their corners (top, left) and flipped left to right.

        Without corners the whole stored band, which then has that side.
        """
        stored = self.gather(indices, side, corners)
        labels = torch.from_numpy(self._images.labels[indices].astype(np.int64))
        flipped = np.zeros(len(indices), dtype=bool) if mirror is None else mirror
        if self._stream is None:
            return Ahead(self._inputs(stored, flipped), labels)
        with torch.cuda.stream(self._stream):
            stored = {k: x.to(self._device, non_blocking=True) for k, x in stored.items()}
            labels = labels.pin_memory().to(self._device, non_blocking=True)
            inputs = self._inputs(stored, flipped)
            return Ahead(inputs, labels, self._stream.record_event())

    def gather(
        self, indices: npt.NDArray[np.int64], side: int, corners: npt.NDArray[np.int64] | None = None
    ) -> dict[int, Tensor]:
        """Stored values of every band, (B, side, side, 3), on the host; pinned where they go to a GPU."""
        starts, indices = self._images.about.starts, self._images.stored(indices)
        shards = np.searchsorted(starts, indices, side="right") - 1
        places = list(zip(shards.tolist(), (indices - starts[shards]).tolist(), strict=True))
        where = None if corners is None else [(top, left) for top, left in corners.tolist()]
        if not self._in_memory:
            for band in self._bands.values():
                band.will_need(places)
        dtype = torch.uint8 if self._images.manifest.dtype == "uint8" else torch.float16
        gathered = {}
        for k, band in self._bands.items():
            gathered[k] = torch.empty(len(places), side, side, 3, dtype=dtype, pin_memory=self._stream is not None)
            band.take(places, where, gathered[k].numpy())
        return gathered

    def _inputs(self, stored: Mapping[int, Tensor], flipped: npt.NDArray[np.bool_]) -> list[Tensor]:
        """One (B, 3·bands, h, w) per branch, in channels_last memory format."""
        images, height, width, _ = next(iter(stored.values())).shape
        at_once = images if self._stream is not None else IN_CACHE
        slices = [slice(first, first + at_once) for first in range(0, images, at_once)]
        rows = [self._on_device(torch.from_numpy(np.flatnonzero(flipped[some]))) for some in slices]
        inputs = []
        for view, factors in self._views:
            found = []
            for bands in view.inputs:
                x = torch.empty(images, height, width, len(bands), 3, dtype=self._dtype, device=self._device)
                for some, mirrored in zip(slices, rows, strict=True):
                    for n, k in enumerate(bands):
                        values = {j: values[some] for j, values in stored.items()}
                        self._write(k, float(factors[k]), values, mirrored, x[some, :, :, n])
                found.append(rearrange(x, "b h w i c -> b (i c) h w"))
            inputs += view.of_branches(found)
        return inputs

    def _on_device(self, rows: Tensor) -> Tensor:
        return rows if self._stream is None else rows.pin_memory().to(self._device, non_blocking=True)

    def _write(self, band: int, times: float, stored: Mapping[int, Tensor], rows: Tensor, out: Tensor) -> None:
        """A band of some images, multiplied, into `out` (B, h, w, 3); flipped in `rows`: a sum over flipped bands.

        The first term of the sum, for most transforms the only one, takes its place among the stored values.
        """
        values, (scale, offset) = stored[band], self._tables(band, out.shape[2], times)
        terms = [(int(j), float(self._flip[band, j])) for j in np.flatnonzero(self._flip[band])] if len(rows) else []
        if terms:
            source, factor = terms[0]
            values = _with_rows(values, rows, _mirrored(stored[source].index_select(0, rows)))
            if (source, factor) != (band, 1.0):
                scale, offset = (
                    _with_lines(own, rows, factor * other, len(values))
                    for own, other in zip((scale, offset), self._tables(source, out.shape[2], times), strict=True)
                )
        exact = (
            out if out.is_contiguous() and out.dtype == torch.float32 else torch.empty_like(values, dtype=torch.float32)
        )
        exact.copy_(values)
        torch.addcmul(offset, exact, scale, out=exact)
        for source, factor in terms[1:]:
            scale, offset = self._tables(source, out.shape[2], times)
            term = torch.addcmul(offset, _mirrored(stored[source].index_select(0, rows)).float(), scale)
            exact.index_add_(0, rows, term, alpha=factor)
        if exact is not out:
            out.copy_(exact)

    def _tables(self, band: int, width: int, times: float) -> tuple[Tensor, Tensor]:
        """Scale and offset of a band, multiplied, (1, 1, w, 3): whole lines are faster than three numbers at a time."""
        if (band, width, times) not in self._lines:
            about = self._images.manifest.bands[band]
            scale, offset = (torch.tensor(color, device=self._device) * times for color in (about.scale, about.offset))
            self._lines[band, width, times] = scale.repeat(1, 1, width, 1), offset.repeat(1, 1, width, 1)
        return self._lines[band, width, times]


def _mirrored(values: Tensor) -> Tensor:
    """(B, h, w, 3) from right to left; as bytes, which torch flips several at a time."""
    return values.view(torch.uint8).flip(2).view(values.dtype)


def _with_rows(values: Tensor, rows: Tensor, replaced: Tensor) -> Tensor:
    """A copy of `values` with other rows.  On a CPU row by row: torch's index_copy takes ten times as long there."""
    if values.is_cuda:
        return values.index_copy(0, rows, replaced)
    copy = values.clone()
    into, these = copy.numpy(), replaced.numpy()
    for n, row in enumerate(rows.tolist()):
        into[row] = these[n]
    return copy


def _with_lines(own: Tensor, rows: Tensor, other: Tensor, images: int) -> Tensor:
    """(images, 1, w, 3): a table (1, 1, w, 3), and another one in some rows."""
    return own.repeat(images, 1, 1, 1).index_copy(0, rows, other.repeat(len(rows), 1, 1, 1))


@dataclass
class Ahead:
    """A batch that was prepared ahead."""

    inputs: list[Tensor]
    labels: Tensor
    ready: Any = None
    """Event on the CUDA stream that makes it; None: it is there."""

    def taken(self) -> tuple[list[Tensor], Tensor]:
        """Inputs and labels, for the current stream."""
        if self.ready is not None:
            current = torch.cuda.current_stream(self.labels.device)
            current.wait_event(self.ready)
            for tensor in (*self.inputs, self.labels):
                tensor.record_stream(current)
        return self.inputs, self.labels


def ahead(prepare: Callable[[J], R], jobs: Iterable[J], depth: int, gpu: int | None = None) -> Iterator[R]:
    """Results in the order of the jobs; a thread prepares `depth` of them ahead.

    `gpu`: the current device of the thread; otherwise the first GPU is, and the thread takes memory there.
    """
    pool = ThreadPoolExecutor(1) if gpu is None else ThreadPoolExecutor(1, "", torch.cuda.set_device, (gpu,))
    waiting = iter(jobs)
    try:
        under_way: deque[Future[R]] = deque(pool.submit(prepare, job) for job in islice(waiting, depth))
        while under_way:
            done = under_way.popleft().result()
            under_way.extend(pool.submit(prepare, job) for job in islice(waiting, 1))
            yield done
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class BandLoader:
    """Endless training batches from a band store; as `TrainingLoader`, with the same images in the same steps.

    Crops begin at whole blocks and keep their scale.  What is drawn for a batch depends on the seed, the stream and its
    number alone, so that number is all the state there is.
    """

    def __init__(
        self,
        config: RunConfig,
        images: StoredImages,
        shards: Sequence[Shard],
        states: Sequence[StreamState] | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self._config, self._shards, self._teacher = config, shards, teacher
        views = [View.of(config), *([teacher.view] if teacher else [])]
        self._reader = BandReader(images, views, shards[0], config.data.hflip, config.data.in_memory)
        self.size = config.data.image_size
        self._side = self.size // config.split.block
        self._margin = images.about.side // config.split.block - self._side
        self._orders = [TrainingOrder(len(images), s.batch_size, config.seed, s.rank, s.world_size) for s in shards]
        self._batches = [state["batches"] for state in states] if states else [0] * len(shards)
        self._ahead = ahead(self._prepare, self._jobs(), config.data.prefetch, shards[0].device_id)
        self._turns = self._jobs()

    def _jobs(self) -> Iterator[tuple[int, int]]:
        """Streams, by their place among those of this rank, and the numbers of their batches, in turns."""
        first = tuple(self._batches)
        return ((turn, first[turn] + n) for n in count() for turn in range(len(first)))

    def _prepare(self, job: tuple[int, int]) -> Ahead:
        turn, number = job
        shard, config = self._shards[turn], self._config
        draw = np.random.default_rng(seeds.derived(config.seed, f"crops and flips of batch {number}", shard.rank))
        corners = draw.integers(0, self._margin, (shard.batch_size, 2), endpoint=True)
        mirror = draw.random(shard.batch_size) < config.data.hflip
        return self._reader.read(
            self._orders[turn].batch(number), self._side, corners if self._margin else None, mirror
        )

    def resize(self, size: int) -> None:
        """As `TrainingLoader.resize`; the config refuses sizes that change."""
        assert size == self.size, f"bands of {self.size} x {self.size} pixels cannot become {size} x {size}"

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch; streams take turns."""
        turn, number = next(self._turns)
        inputs, labels = next(self._ahead).taken()
        self._batches[turn] = number + 1
        inputs, labels = mixing.mix(inputs, labels, self._config, number, self._shards[turn].rank)
        branches = len(self._config.split.groups)
        teacher_logits = self._teacher.logits(inputs[branches:]) if self._teacher else None
        return Batch(inputs[:branches], labels, teacher_logits)

    def states(self) -> list[StreamState]:
        return [{"size": self.size, "batches": batches, "pipeline": None, "bad": []} for batches in self._batches]

    def bad(self) -> list[tuple[int, BadImage]]:
        """None: what cannot be decoded was not packed."""
        return []

    def close(self) -> None:
        """As `TrainingLoader.close`."""


class BandValidationLoader:
    """This rank's share of the stored validation images, each exactly once per iteration; as `ValidationLoader`."""

    def __init__(self, config: RunConfig, images: StoredImages, shard: Shard, crops: Sequence[Crop] = CENTER) -> None:
        """With two crops, each batch comes as it is and mirrored.  Raises UserError for crops beside the center."""
        self.crops, self._mirrored = len(crops), [crop.mirror for crop in crops]
        if any((crop.x, crop.y) != (0.5, 0.5) for crop in crops):
            raise UserError("--ten-crop: a band store holds the center alone; evaluate with --set data.kind=images")
        view, hflip = View.of(config), float(any(self._mirrored))
        require_view(images, view.split, view.mean, view.std, hflip)
        self._reader = BandReader(images, [view], shard, hflip, config.data.in_memory)
        self._order = ValidationOrder(len(images), shard.batch_size, shard.rank, shard.world_size, len(crops))
        self._side = config.data.val_size // config.split.block
        self._ahead = partial(ahead, self._prepare, depth=config.data.prefetch, gpu=shard.device_id)
        margin = images.about.side // config.split.block - self._side
        assert margin >= 0, "opened without `require_side`"
        assert margin % 2 == 0, "opened without `require_side`"
        self._corner = margin // 2
        self.left_out: list[BadImage] = []
        """None: what cannot be decoded was not packed."""

    def __len__(self) -> int:
        """Batches of this rank."""
        return self._order.batches

    def __iter__(self) -> Iterator[Batch]:
        for n, read in enumerate(self._ahead(range(self._order.batches))):
            inputs, labels = read.taken()
            labels[self._order.own(n) :] = PADDING
            yield Batch(inputs, labels)

    def _prepare(self, number: int) -> Ahead:
        indices = self.rows(number)
        corners = np.full((len(indices), 2), self._corner) if self._corner else None
        mirror = np.full(len(indices), self._mirrored[number % self.crops])
        return self._reader.read(indices, self._side, corners, mirror)

    def rows(self, number: int) -> npt.NDArray[np.int64]:
        """Indices (B,) of the images of this rank's batch `number`, padding included."""
        return self._order.batch(number)


def bytes_read(images: StoredImages, views: Sequence[View], hflip: float) -> int:
    """Bytes of all bands of a part that views read."""
    read = {band for view in views for band in bands_to_read(view.split, hflip)}
    return len(read) * len(images) * images.manifest.image_bytes(images.part)
