"""`--save`: what is recorded of each batch of an evaluation, and written to one file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bandsplit.data import class_names
from bandsplit.data.images import ImageFiles, Paths
from bandsplit.data.source import Images
from bandsplit.data.store.manifest import StoredImages
from bandsplit.errors import UserError
from bandsplit.evaluation import collector
from bandsplit.evaluation.collector import Collector, Gathered
from bandsplit.evaluation.joined import Joined
from bandsplit.evaluation.measures import are_correct, averaged
from bandsplit.models.fusion import MEAN
from bandsplit.runs.predictions import Fused, Predictions, Scored


@dataclass(frozen=True)
class Save:
    """Where predictions are saved, and which."""

    path: Path
    sample: int | None = None
    """How many of the images; None: all."""
    fused_only: bool = False
    """Without the logits of the branches."""


class Recorder:
    """Records the predictions of this rank's images, and writes those of all ranks."""

    def __init__(self, save: Save, runs: Joined, files: Images, crops: str) -> None:
        """Every rank makes one.

        Raises UserError if the logits do not fit into memory, where images have several labels, and if the readable
        names of the classes cannot be read.
        """
        if isinstance(files, ImageFiles) and files.answers is not None:
            raise UserError(
                f"--save {save.path}: predictions are saved with one label for each image, not with several"
            )
        count = min(save.sample or len(files), len(files))
        if not save.fused_only:
            _require_fitting(save.path, count, len(runs.branches), len(runs.first.classes))
        self._save, self._runs, self._files, self._crops = save, runs, files, crops
        self._names = runs.ranks.from_first(partial(class_names.readable, files.classes, runs.config.data))
        self._collector = Collector(collector.sample(len(files), count, runs.config.seed))

    def add(self, rows: NDArray[np.int64], logits: Tensor, fused: Mapping[str, Tensor], labels: Tensor) -> None:
        """A batch.

        Args:
            rows: (B,), which images of the data set it holds.
            logits: (branches, crops, B, classes).
            fused: (B, classes) of every fusion.
            labels: (B,); images with a negative label do not count.
        """
        columns = collector.top(torch.stack(list(fused.values())), labels)
        columns["branch_correct"] = are_correct(averaged(logits), labels).transpose(0, 1)
        if not self._save.fused_only:
            columns["logits"] = collector.half(logits[:, 0])
        self._collector.add(rows, labels, **columns)

    def write(
        self, images: int, fusions: Mapping[str, Sequence[float]], fusion: str, held_out: Gathered | None
    ) -> None:
        """Writes the file; every rank calls it, after the last batch.  Raises UserError if it cannot be written.

        Args:
            images: how many were evaluated, recorded or not.
            fusions: weights of those that were recorded, in their order, without the mean.
            fusion: whose accuracy is the ensemble's.
            held_out: what fusion was fitted on, on rank 0, if it was in this command.
        """
        gathered = self._collector.gathered(self._files, self._runs.ranks)
        self._runs.ranks.from_first(partial(self._write, gathered, images, fusions, fusion, held_out))

    def _write(
        self,
        gathered: Gathered | None,
        images: int,
        fusions: Mapping[str, Sequence[float]],
        fusion: str,
        held_out: Gathered | None,
    ) -> None:
        assert gathered is not None
        runs, files, columns = self._runs, self._files, gathered.columns
        mean = [1 / len(runs.branches)] * len(runs.branches)
        Predictions(
            [files.name(i) for i in gathered.rows.tolist()],
            gathered.labels,
            files.classes,
            self._names,
            runs.branches,
            {MEAN: mean, **{name: list(weights) for name, weights in fusions.items()}},
            fusion,
            Fused(
                cast(NDArray[np.int32], columns["classes"]),
                cast(NDArray[np.float32], columns["confidences"]),
                cast(NDArray[np.float32], columns["losses"]),
            ),
            cast(NDArray[np.bool_], columns["branch_correct"]),
            cast(NDArray[np.float16] | None, columns.get("logits")),
            _scored(held_out) if held_out and not self._save.fused_only else None,
            images,
            runs.config.split.block,
            runs.config.split.transform,
            self._crops,
            _folder(files),
        ).write(self._save.path)


def _require_fitting(path: Path, images: int, branches: int, classes: int) -> None:
    fits = collector.fitting(images, branches, classes)
    if fits < images:
        size = 2 * images * branches * classes / 2**30
        raise UserError(
            f"--save {path}: the logits of {images:,} images, {branches} branches and {classes:,} classes take "
            f"{math.ceil(size):,} GiB, and at most {collector.LIMIT / 2**30:.0f} GiB are kept in memory; save a sample "
            f"of the images with --save-sample {fits}, or what is fused alone with --save-fused"
        )


def _scored(held_out: Gathered) -> Scored:
    return Scored(held_out.labels, cast(NDArray[np.float16], held_out.columns["logits"]))


def _folder(files: Images) -> str | None:
    """What the names of images are relative to; a band store does not know it."""
    if isinstance(files, StoredImages):
        return None
    return str(files.paths.folder) if isinstance(files.paths, Paths) else "/"
