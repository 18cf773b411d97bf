"""Predictions: the logits of every branch for every image, gathered from all ranks and kept in one NumPy file."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bandsplit import seeds
from bandsplit.data.source import Images
from bandsplit.distributed.ranks import Ranks
from bandsplit.errors import UserError
from bandsplit.paths import replace_bytes
from bandsplit.runs.files import reading

FORMAT = 1

Gathered = tuple[NDArray[np.int64], NDArray[np.float16]] | None
"""Numbers (N,) of images in order, and their logits (N, branches, classes), on rank 0; None on the others."""

LIMIT = 2**33
"""Bytes of logits that are gathered on one rank."""


@dataclass(frozen=True)
class Branch:
    """Where the logits of a branch come from."""

    run: str
    """Run directory."""
    step: int
    bands: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Predictions:
    """Logits of every branch for N images, in the order of the data set."""

    names: list[str]
    """(N,), relative to the folder of the part, or of the data set where that has lists; as os.fsdecode has them."""
    labels: NDArray[np.int32]
    """(N,), indices into `classes`."""
    logits: NDArray[np.float16]
    """(N, branches, classes)."""
    classes: list[str]
    branches: list[Branch]

    def write(self, path: Path) -> None:
        """Writes an .npz file, whole or not at all. Raises UserError if it cannot be written."""
        about = {"format": FORMAT, "branches": [asdict(branch) for branch in self.branches]}
        with replace_bytes(path) as file:
            np.savez(
                file,
                names=np.array([os.fsencode(name) for name in self.names], dtype=np.bytes_),
                labels=self.labels,
                logits=self.logits,
                classes=np.array([os.fsencode(name) for name in self.classes], dtype=np.bytes_),
                about=np.array(json.dumps(about)),
            )

    @classmethod
    def read(cls, path: Path) -> Predictions:
        """Raises UserError if there is no such file, if it is damaged, and if it holds something else."""
        with reading(path):
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    return cls._from(arrays)
            except FileNotFoundError:
                raise UserError(f"{path}: no such file") from None
            except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
                raise UserError(
                    f"{path}: not the predictions of src/evaluate.py --save, or damaged: {error}"
                ) from error

    @classmethod
    def _from(cls, arrays: Any) -> Predictions:
        about = json.loads(str(arrays["about"]))
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}; this version reads format {FORMAT}")
        branches = [Branch(b["run"], b["step"], tuple(b["bands"])) for b in about["branches"]]
        names, classes = ([os.fsdecode(bytes(name)) for name in arrays[key]] for key in ("names", "classes"))
        labels, logits = arrays["labels"], arrays["logits"]
        if logits.shape != (len(names), len(branches), len(classes)) or labels.shape != (len(names),):
            raise ValueError(f"logits of shape {logits.shape} and labels of shape {labels.shape}")
        return cls(names, labels, logits, classes, branches)


class Collector:
    """The logits of this rank's images, kept on the host in float16 until they are gathered."""

    def __init__(self, wanted: NDArray[np.bool_]) -> None:
        """`wanted`: (images,), which images of the data set to keep."""
        self._wanted = wanted
        self._rows: list[NDArray[np.int64]] = []
        self._logits: list[Tensor] = []

    def add(self, rows: NDArray[np.int64], logits: Tensor, labels: Tensor) -> None:
        """A batch: which images of the data set it holds (B,), logits (branches, B, classes) and labels (B,).

        Images with a negative label do not count.
        """
        keep = (labels >= 0).cpu().numpy() & self._wanted[rows]
        self._rows.append(rows[keep])
        half = logits[:, torch.from_numpy(keep).to(logits.device)].clamp(-65504, 65504).half()  # largest of float16
        self._logits.append(half.transpose(0, 1).cpu())

    def gathered(self, ranks: Ranks) -> Gathered:
        """The kept logits of all ranks; every rank calls it."""
        rows = ranks.at_first(torch.from_numpy(np.concatenate(self._rows)))
        logits = ranks.at_first(torch.cat(self._logits).contiguous())
        if not ranks.is_first:
            return None
        numbers = torch.cat(rows).numpy()
        order = np.argsort(numbers)
        return numbers[order], torch.cat(logits).numpy()[order]


def of(
    files: Images, gathered: tuple[NDArray[np.int64], NDArray[np.float16]], branches: Sequence[Branch]
) -> Predictions:
    """Predictions of the images that `Collector.gathered` has returned."""
    rows, logits = gathered
    labels = np.asarray(files.labels, dtype=np.int32)[rows]
    return Predictions([files.name(i) for i in rows.tolist()], labels, logits, files.classes, list(branches))


def fitting(images: int, branches: int, classes: int) -> int:
    """For how many of the images logits may be gathered."""
    return min(images, LIMIT // (2 * branches * classes))


def sample(images: int, count: int, seed: int) -> NDArray[np.bool_]:
    """(images,): `count` of the images, drawn by the seed; all if there are not more."""
    chosen = np.random.default_rng(seeds.derived(seed, "predictions")).permutation(images)[:count]
    wanted = np.zeros(images, dtype=np.bool_)
    wanted[chosen] = True
    return wanted
