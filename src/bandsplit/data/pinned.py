"""The images that a run began with: kept in its directory, and compared with the data that it resumes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from loguru import logger
from numpy.typing import NDArray

from bandsplit.config.schema import Data
from bandsplit.data import index
from bandsplit.data.images import ImageFiles, Paths, require_same_classes
from bandsplit.data.index import Index
from bandsplit.errors import UserError
from bandsplit.paths import writing_to


@dataclass(frozen=True)
class Difference:
    """How the images found now differ from those that a run began with: phrase -> names."""

    gone: list[str]
    changed: list[str]
    """Other size, content or class, or no longer decodable."""
    new: list[str]

    def __str__(self) -> str:
        kinds = (("gone", self.gone), ("changed", self.changed), ("new", self.new))
        return ", ".join(f"{len(names):,} {kind} (such as {names[0]!r})" for kind, names in kinds if names)


def difference(began: Index, now: Index) -> Difference:
    """Compares by name; by content if both have a checksum, else by size in bytes."""
    rows = np.flatnonzero(began.good)
    names = began.names.take(pa.array(rows))
    here = _positions(names, now.names)
    found = here >= 0
    before, after = rows[found], here[found]
    sums = [one.column("checksum")[at] for one, at in ((began, before), (now, after))]
    same = (
        (began.column("bytes")[before] == now.column("bytes")[after])
        & ((sums[0] == sums[1]) | (sums[0] == 0) | (sums[1] == 0))
        & (np.array(began.classes)[began.column("label")[before]] == np.array(now.classes)[now.column("label")[after]])
        & now.good[after]
    )
    new = now.good & (_positions(now.names, began.names) < 0)
    return Difference(
        [began.named(i) for i in rows[~found].tolist()],
        [began.named(i) for i in before[~same].tolist()],
        [now.named(i) for i in np.flatnonzero(new).tolist()],
    )


def _positions(names: pa.LargeBinaryArray, among: pa.LargeBinaryArray) -> NDArray[np.int64]:
    """Where each name is among others; -1: nowhere."""
    return np.asarray(pc.fill_null(pc.index_in(names, value_set=among), -1).to_numpy(), dtype=np.int64)


def keep(folder: Path, parts: Mapping[str, ImageFiles]) -> None:
    """Writes the indexes of a new run into a folder of its run directory."""
    for part, files in parts.items():
        if files.index is not None:
            with writing_to(folder):
                folder.mkdir(exist_ok=True)
            index.write(files.index, folder / f"{part}.arrow", compressed=True)


def as_began(folder: Path, now: Mapping[str, ImageFiles], data: Data) -> dict[str, ImageFiles]:
    """The images of a run that resumes: those that it began with, in their order.

    Images that are gone are handled during training as `data.on_bad` says, new ones are not used; both are logged.

    Args:
        folder: where `keep` has written.
        now: the images found now.

    Raises UserError if classes differ, if more than `data.max_bad` images differ or more than a tenth are gone or
    changed, and if one differs and `data.on_bad` is "error".
    """
    return {part: _as_began(folder, part, files, data) for part, files in now.items()}


def _as_began(folder: Path, part: str, now: ImageFiles, data: Data) -> ImageFiles:
    began = index.read(folder / f"{part}.arrow")
    if began is None or began.digest == now.digest:
        return now
    require_same_classes(began.classes, str(folder.parent), now.classes, data.root)
    assert now.index is not None
    assert isinstance(now.paths, Paths)
    name, count = getattr(data, part), int(began.good.sum())
    differ = difference(began, now.index)
    missed = len(differ.gone) + len(differ.changed)
    allowed = data.max_bad if data.on_bad == "replace" else 0
    if missed + len(differ.new) > allowed or missed > count / 10:
        raise UserError(
            f"data.root: {data.root}: {len(now):,} images in {name}, not the {count:,} that {folder.parent} began "
            f"with: {differ}. Restore them; a run resumes with its own list if at most data.max_bad = {allowed} images "
            "differ and at most a tenth are gone or changed"
        )
    if missed or differ.new:
        logger.warning(
            f"{name}: {differ} since the run began. It resumes with its own list: new images are not used, and one "
            f"that cannot be read is {'replaced by another image of its class' if part == 'train' else 'left out'}"
        )
    else:
        logger.info(
            f"{name}: images that the run began without have been removed or repaired, or the order is another. It "
            "resumes with its own list"
        )
    return ImageFiles.of(began, now.paths.folder)
