"""Where batches come from: image files or a band store, as `data.kind` says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from loguru import logger
from numpy.typing import NDArray

from bandsplit.config.schema import Data, RunConfig
from bandsplit.data import images, loader, pinned
from bandsplit.data.crops import CENTER, Crop
from bandsplit.data.images import ImageFiles
from bandsplit.data.loader import Streams, StreamState, Teacher, TrainingLoader, ValidationLoader
from bandsplit.data.pipeline import Shard
from bandsplit.data.store import manifest, memory, reader
from bandsplit.data.store.manifest import StoredImages
from bandsplit.data.store.reader import BandLoader, BandValidationLoader
from bandsplit.distributed.ranks import Ranks
from bandsplit.errors import UserError
from bandsplit.spectral.view import View

Images = ImageFiles | StoredImages
AnyTrainingLoader = TrainingLoader | BandLoader
AnyValidationLoader = ValidationLoader | BandValidationLoader


@dataclass(frozen=True)
class Listed:
    """What is known of a part before its images are examined."""

    labels: NDArray[np.int32]
    """(N,), indices into `classes`."""
    classes: list[str]
    passed_over: tuple[str, ...]


def listed(config: RunConfig) -> dict[str, Listed]:
    """Both parts, on this rank, where nothing is to be generated or written.  Raises UserError as `open_data` does."""
    if config.data.kind == "images":
        found = images.find(config.data, ("train", "val"), generate=False)
        return {part: Listed(each.labels, each.classes, each.passed_over) for part, each in found.items()}
    return {
        part: Listed(s.labels, s.classes, s.passed_over) for part, s in open_store(config, ("train", "val")).items()
    }


def open_data(
    config: RunConfig,
    ranks: Ranks,
    parts: Sequence[str] = ("train", "val"),
    began: Path | None = None,
    signal: Callable[[], int] = lambda: 0,
) -> dict[str, Images]:
    """The images of each part ("train", "val"), the same on every rank; every rank calls it.

    Args:
        began: the folder of a run that resumes with the images that it began with.
        signal: which signal has been received; 0: none.

    Raises UserError if they are missing, do not fit the config or differ between ranks, and Interrupted if a signal is
    received while images are examined.
    """
    if config.data.kind == "images":
        files = loader.open_data(config, ranks, parts, signal)
        if began is not None:
            files = ranks.each(partial(pinned.as_began, began, files, config.data))
        return dict(files)
    stored = ranks.each(partial(open_store, config, parts))
    _require_same_store(stored, ranks)
    return dict(stored)


def renumbered(files: Images, classes: Sequence[str], by: str, data: Data) -> Images:
    """The images of `data` with labels that are indices into the classes that `by` was trained on.

    Raises UserError if the images are of other classes.
    """
    if isinstance(files, StoredImages):
        return files.renumbered(classes, by, data.root)
    numbers = data.labels == "numbers"
    if numbers and data.classes not in (None, len(classes)):
        raise UserError(
            f"data.classes: {data.root} numbers {data.classes} classes, but {by} was trained on {len(classes)}, which "
            "have other numbers"
        )
    return files.renumbered(classes, by, data.root, numbers)


def keep(folder: Path, parts: Mapping[str, Images]) -> None:
    """Writes the list of the images of a new run into its directory; a band store has its own."""
    pinned.keep(folder, {part: files for part, files in parts.items() if isinstance(files, ImageFiles)})


def open_store(config: RunConfig, parts: Sequence[str]) -> dict[str, StoredImages]:
    """Parts of the band store of a config.  Raises UserError if it is not there, or not as the config says."""
    view, needed = View.of(config), 0
    stored = manifest.open_store(config.data, parts)
    for part, each in stored.items():
        hflip = config.data.hflip if part == "train" else 0.0
        manifest.require_view(each, view.split, view.mean, view.std, hflip)
        manifest.require_side(config, part, each)
        needed += reader.bytes_read(each, [view], hflip)
    if config.data.in_memory:
        memory.require_memory(needed)
    return stored


def _require_same_store(parts: Mapping[str, StoredImages], ranks: Ranks) -> None:
    """Logs what was left out; raises UserError on a rank that has another store than rank 0."""
    stores = [each.manifest for each in parts.values()]
    first = ranks.from_first(lambda: stores)

    def check() -> None:
        if stores != first:
            root = next(iter(parts.values())).root
            raise UserError(
                f"data.root: {root}: another {manifest.MANIFEST} than rank 0 has; every rank needs the same"
            )

    ranks.each(check)
    if ranks.is_first:
        for each in parts.values():
            for told in each.passed_over:
                logger.info("{}: {}", each.part, told)


def require_teacher(train: Images, config: RunConfig, teacher: Teacher | None) -> None:
    """Raises UserError if a teacher needs other bands than those of the store that its student reads."""
    if teacher is not None and isinstance(train, StoredImages):
        view = teacher.view
        manifest.require_view(train, view.split, view.mean, view.std, config.data.hflip, of="the teacher's ")


def training_loader(
    config: RunConfig,
    streams: Streams,
    train: Images,
    half: bool,
    states: Sequence[StreamState] | None,
    teacher: Teacher | None,
    positions: Path | None = None,
) -> AnyTrainingLoader:
    """The batches of this rank's streams; arguments as of `TrainingLoader`."""
    if isinstance(train, StoredImages):
        return BandLoader(config, train, streams.shards(half), states, teacher)
    return streams.loader(train, half, states, teacher, positions)


def require_pixels(files: Images) -> None:
    """Raises UserError if there are none to corrupt."""
    if isinstance(files, StoredImages):
        raise UserError("--corrupt: a band store holds no pixels; evaluate with --set data.kind=images")


def validation_loader(
    config: RunConfig, files: Images, shard: Shard, crops: Sequence[Crop] = CENTER
) -> AnyValidationLoader:
    """This rank's share of images, prepared as validation images are.

    Raises UserError if a band store lacks what the crops show.
    """
    if isinstance(files, StoredImages):
        if any(crop.corruption for crop in crops):
            require_pixels(files)
        return BandValidationLoader(config, files, shard, crops)
    return ValidationLoader(config, files, shard, crops)
