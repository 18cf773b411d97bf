"""The file of `evaluate --save`: what an ensemble predicts for every image, in one NumPy file.

| array | shape | |
|---|---|---|
| `names` | N, bytes | path of each image, relative to `folder` of `about` |
| `labels` | N, int32 | indices into `classes` |
| `classes`, `class_names` | classes, bytes | names, and those that people read |
| `fused_classes` | N × fusions × 5, int32 | of the five largest fused logits, largest first |
| `fused_confidences` | N × fusions × 5, float32 | their probabilities |
| `fused_losses` | N × fusions, float32 | cross-entropy |
| `branch_correct` | N × branches × 2, bool | whether each branch alone is right, within the top 1 and the top 5 |
| `logits` | N × branches × classes, float16 | less the largest of each branch and image; not with `--save-fused` |
| `held_out_labels`, `held_out_logits` | as above, M images | those that fusion was fitted on; with `--fit-fusion` |
| `about` | JSON text | the other fields of `Predictions` |
"""

from __future__ import annotations

import errno
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bandsplit.errors import UserError
from bandsplit.paths import replace_bytes
from bandsplit.runs.files import reading

FORMAT = 2

TOP = 5
"""How many of the largest fused logits are kept."""

_PLAIN = ("fusions", "fusion", "images", "block", "transform", "crops", "folder")
"""Fields that are JSON as they are."""

DAMAGED = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What reading a file can raise that is not one of these."""


@dataclass(frozen=True)
class Branch:
    """Where the logits of a branch come from."""

    run: str
    """Run directory."""
    step: int
    bands: tuple[int, ...]

    @property
    def label(self) -> str:
        """`band 0`, or `bands 0, 1`; at most six of them."""
        return f"band{'s' * (len(self.bands) > 1)} {', '.join(map(str, self.bands[:6]))}{' …' * (len(self.bands) > 6)}"


@dataclass(frozen=True, eq=False)
class Fused:
    """What every fusion predicts for N images; k is 5, or the number of classes where that is less."""

    classes: NDArray[np.int32]
    """(N, fusions, k): of the largest fused logits, largest first."""
    confidences: NDArray[np.float32]
    """(N, fusions, k): their probabilities."""
    losses: NDArray[np.float32]
    """(N, fusions): cross-entropy."""


@dataclass(frozen=True, eq=False)
class Scored:
    """Logits of M images, less the largest of each branch and image."""

    labels: NDArray[np.int32]
    """(M,), class indices."""
    logits: NDArray[np.float16]
    """(M, branches, classes)."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """What an ensemble predicts for N images, in the order of the data set."""

    names: list[str]
    """(N,), relative to `folder`; as os.fsdecode has them."""
    labels: NDArray[np.int32]
    """(N,), indices into `classes`."""
    classes: list[str]
    class_names: list[str]
    """Those that people read, which need not differ from each other."""
    branches: list[Branch]
    fusions: dict[str, list[float]]
    """Weights of the branches, in the order of `fused`."""
    fusion: str
    """One of `fusions`: whose accuracy is the ensemble's."""
    fused: Fused
    branch_correct: NDArray[np.bool_]
    """(N, branches, 2): whether each branch alone is right, within the top 1 and the top 5."""
    logits: NDArray[np.float16] | None
    """(N, branches, classes), less the largest of each branch and image; None if only what is fused was saved."""
    held_out: Scored | None
    """The images that `fusions` was fitted on; None unless it was fitted in the same command."""
    images: int
    """Images that were evaluated: N, or more where a sample of them was saved."""
    block: int
    """Side of the pixel block: its square is the number of bands."""
    transform: str
    crops: str
    """Those that were averaged: "center", "flip" or "ten"."""
    folder: str | None
    """Absolute path of the folder of the images; None where it is not known."""

    def write(self, path: Path) -> None:
        """Writes an .npz file, whole or not at all. Raises UserError if it cannot be written."""
        arrays: dict[str, Any] = {
            "names": _encoded(self.names),
            "labels": self.labels,
            "classes": _encoded(self.classes),
            "class_names": _encoded(self.class_names),
            **{f"fused_{key}": getattr(self.fused, key) for key in ("classes", "confidences", "losses")},
            "branch_correct": self.branch_correct,
        }
        if self.logits is not None:
            arrays["logits"] = self.logits
        if self.held_out is not None:
            arrays |= {"held_out_labels": self.held_out.labels, "held_out_logits": self.held_out.logits}
        about = {
            "format": FORMAT,
            "arrays": list(arrays),
            "branches": [asdict(branch) for branch in self.branches],
            **{key: getattr(self, key) for key in _PLAIN},
        }
        with replace_bytes(path) as file:
            np.savez(file, about=np.array(json.dumps(about)), **arrays)

    @classmethod
    def read(cls, path: Path) -> Predictions:
        """Raises UserError if there is no such file, if it is damaged, and if it holds something else."""
        with reading(path):
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    predictions = cls._from(arrays)
                    predictions._check()
                    return predictions
            except FileNotFoundError:
                raise UserError(f"{path}: no such file") from None
            except (*DAMAGED, OSError) as error:
                if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a place before the file
                    raise
                raise UserError(
                    f"{path}: not the predictions of src/evaluate.py --save, or damaged: {error}"
                ) from error

    @classmethod
    def _from(cls, arrays: Mapping[str, Any]) -> Predictions:
        about = json.loads(str(arrays["about"]))
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}; this version reads format {FORMAT}, so save it anew")
        if lost := sorted({*about["arrays"]} - {*arrays}):
            raise ValueError(f"{lost[0]} is missing")
        held_out = None
        if "held_out_labels" in arrays:
            held_out = Scored(arrays["held_out_labels"], arrays["held_out_logits"])
        return cls(
            _decoded(arrays["names"]),
            arrays["labels"],
            _decoded(arrays["classes"]),
            _decoded(arrays["class_names"]),
            [Branch(b["run"], b["step"], tuple(b["bands"])) for b in about["branches"]],
            about["fusions"],
            about["fusion"],
            Fused(*(arrays[f"fused_{key}"] for key in ("classes", "confidences", "losses"))),
            arrays["branch_correct"],
            arrays.get("logits"),
            held_out,
            about["images"],
            about["block"],
            about["transform"],
            about["crops"],
            about["folder"],
        )

    def _check(self) -> None:
        """Raises ValueError if shapes do not fit each other, or an index is out of its range."""
        images, branches, classes = len(self.names), len(self.branches), len(self.classes)
        top = (images, len(self.fusions), min(TOP, classes))
        expected: list[tuple[str, NDArray[Any], tuple[int, ...], str]] = [
            ("labels", self.labels, (images,), "i"),
            ("fused_classes", self.fused.classes, top, "i"),
            ("fused_confidences", self.fused.confidences, top, "f"),
            ("fused_losses", self.fused.losses, top[:2], "f"),
            ("branch_correct", self.branch_correct, (images, branches, 2), "b"),
        ]
        if self.logits is not None:
            expected.append(("logits", self.logits, (images, branches, classes), "f"))
        if self.held_out is not None:
            labels, logits = self.held_out.labels, self.held_out.logits
            expected.append(("held_out_labels", labels, (len(labels),), "i"))
            expected.append(("held_out_logits", logits, (len(labels), branches, classes), "f"))
        if len(self.class_names) != classes:
            raise ValueError(f"{classes} classes and {len(self.class_names)} names of classes")
        if not images or not branches:
            raise ValueError("no images or no branches in it")
        for name, array, shape, kind in expected:
            if array.shape != shape or array.dtype.kind != kind:
                raise ValueError(f"{name} of shape {array.shape} and type {array.dtype}")
            if kind == "i" and array.size and not 0 <= array.min() <= array.max() < classes:
                raise ValueError(f"{name} that are not indices of {classes} classes")
            if kind == "f" and not np.isfinite(array).all():
                raise ValueError(f"{name} that are not finite")
        if self.fusion not in self.fusions or any(len(weights) != branches for weights in self.fusions.values()):
            raise ValueError("weights of fusions that do not fit the branches")


def _encoded(names: list[str]) -> NDArray[np.bytes_]:
    return np.array([os.fsencode(name) for name in names], dtype=np.bytes_)


def _decoded(names: NDArray[np.bytes_]) -> list[str]:
    return [os.fsdecode(bytes(name)) for name in names]
