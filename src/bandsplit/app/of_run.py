"""What a run directory has besides its model: validation images as examples, and a fitted cascade."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from bandsplit.app import uploads
from bandsplit.config import loading
from bandsplit.data import images
from bandsplit.errors import UserError
from bandsplit.inference import preparation
from bandsplit.inference.classifier import Classifier
from bandsplit.inference.description import Description
from bandsplit.models.cascade import Cascade
from bandsplit.models.fusion import MEAN
from bandsplit.runs import checkpoint
from bandsplit.runs.directory import RunDirectory
from bandsplit.runs.fitted import FILE, Fitted, FittedBranch
from bandsplit.runs.restored import digest_of

EXAMPLES = 10


@dataclass(frozen=True, eq=False)
class Example:
    """A validation image of the run."""

    name: str
    """Path relative to the validation images."""
    label: int
    crop: Tensor
    """(3, val_size, val_size)."""


def examples(run: Path, description: Description) -> list[Example]:
    """Some of the run's validation images, spread evenly over the classes; none where the images are not there."""
    data = loading.load(RunDirectory(run).config).data
    if data.kind != "images":
        return []
    try:
        files = images.find(data, ["val"], generate=False)["val"]
    except UserError:
        return []
    if tuple(files.classes) != description.classes:
        return []
    rows = np.argsort(files.labels, kind="stable")
    found = []
    for row in rows[np.linspace(0, len(rows) - 1, min(EXAMPLES, len(rows))).round().astype(int)].tolist():
        name = os.fsdecode(files.names[row].as_py())
        try:
            crop = preparation.prepared(uploads.opened(files.folder / name), description)
        except (UserError, OSError):
            continue
        found.append(Example(name, int(files.labels[row]), crop))
    return found


def cascade(run: Path, which: str, model: Classifier) -> Cascade | None:
    """The cascade in fusion.json of a checkpoint; None if there is none for all of these branches.

    Warns if it was fitted on images prepared in another way; of a model with a fitted fusion, loading it has told that.

    Raises UserError if fusion.json cannot be read or understood.
    """
    directory = RunDirectory(run)
    path = checkpoint.find(directory.checkpoints, which) / FILE
    fitted = Fitted.read(path)
    training = model.description.training
    branches = [
        FittedBranch(training.run, training.seed, training.step, list(bands), digest_of(branch))
        for bands, branch in zip(model.bands, model.branches, strict=True)
    ]
    if fitted is None or fitted.cascade is None or not fitted.is_for(branches):
        return None
    if model.description.fusion == MEAN:
        fitted.tell_other_preparation(loading.load(directory.config).data, path)
    return fitted.cascade
