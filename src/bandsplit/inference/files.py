"""Predictions for image files: single files by Pillow in float32, folders by DALI as in validation."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomli
import torch
from pydantic import ValidationError

from bandsplit import __version__
from bandsplit.config.schema import RunConfig
from bandsplit.cpus import available_cpus
from bandsplit.data.folders import SUFFIXES, identity, is_hidden
from bandsplit.data.images import ImageFiles
from bandsplit.errors import UserError
from bandsplit.inference.classifier import Classifier, Prediction
from bandsplit.inference.description import Description
from bandsplit.inference.preparation import prepared
from bandsplit.models.precision import Precision
from bandsplit.paths import reading_from


@dataclass(frozen=True)
class Outcome:
    """What came of a file."""

    file: str
    prediction: Prediction | None
    reason: str = ""
    """Why there is no prediction."""


def in_folder(folder: Path) -> list[str]:
    """The images at any depth below a folder, in sorted order, but for hidden entries and links to a folder above.

    Raises UserError if it has none, and if a folder cannot be read.
    """
    found = []
    with reading_from(folder):
        above = {os.fspath(folder): frozenset(identity(each.stat()) for each in folder.resolve().parents)}
        for where, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
            within = above.pop(where) | {identity(Path(where).stat())}
            below = {name: os.path.join(where, name) for name in sorted(folders) if not is_hidden(name)}  # noqa: PTH118
            folders[:] = [name for name, path in below.items() if identity(Path(path).stat()) not in within]
            above |= {below[name]: within for name in folders}
            found += [
                os.path.join(where, name)  # noqa: PTH118
                for name in sorted(names)
                if name.lower().endswith(SUFFIXES) and not is_hidden(name)
            ]
    if not found:
        raise UserError(f"{folder}: no images in this folder ({' '.join(SUFFIXES)})")
    return found


def _raise(error: OSError) -> None:
    raise error


def by_pillow(model: Classifier, files: Sequence[str], k: int, batch_size: int) -> Iterator[Outcome]:
    """One outcome per file, in order."""
    for first in range(0, len(files), batch_size):
        some = files[first : first + batch_size]
        crops, wrong = [], {}
        for place, file in enumerate(some):  # a file may be there twice
            try:
                crops.append(prepared(Path(file), model.description))
            except UserError as error:
                wrong[place] = str(error).removeprefix(f"{file}: ")
        predictions = iter(model.predict_prepared(crops, k))
        for place, file in enumerate(some):
            yield Outcome(file, None, wrong[place]) if place in wrong else Outcome(file, next(predictions))


def has_dali() -> bool:
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def by_dali(model: Classifier, files: Sequence[str], k: int, batch_size: int) -> Iterator[Outcome]:
    """One outcome per file, in order, prepared by the pipeline of validation and in its precision.

    Raises UserError if this version of bandsplit does not understand the config of the model.
    """
    from bandsplit.data.loader import LEFT_OUT, PADDING, ValidationLoader
    from bandsplit.data.pipeline import Shard
    from bandsplit.data.recovery import TooManyBadImages

    device = model.weights.device
    images = ImageFiles(files, [0] * len(files), list(model.classes))
    config = _config(model.description, len(files))
    precision = Precision(config.train.precision, device)
    precision.apply()
    model.branches.to(memory_format=torch.channels_last)
    shard = Shard(0, 1, min(batch_size, len(files)), available_cpus(), device.index, precision.half_bands)
    done = 0
    try:
        loader = ValidationLoader(config, images, shard)
        for number, batch in enumerate(loader):
            reasons = {each["file"]: each["reason"] for each in loader.left_out}
            with torch.inference_mode(), precision.autocast():
                logits = model.logits_of(batch.inputs)
            predictions = model.predictions(logits, k)
            for row, label, prediction in zip(
                loader.rows(number).tolist(), batch.labels.tolist(), predictions, strict=True
            ):
                if label == PADDING:
                    break
                file, bad = files[row], label == LEFT_OUT
                done += 1
                yield Outcome(file, None, reasons[file]) if bad else Outcome(file, prediction)
    except TooManyBadImages as error:  # not one is good
        reasons = dict(error.bad)
        yield from (Outcome(file, None, reasons[file]) for file in files[done:])


def _config(description: Description, files: int) -> RunConfig:
    """The config of the run, with the branches of the model."""
    try:
        config = RunConfig.model_validate(tomli.loads(description.training.config))
    except (ValidationError, tomli.TOMLDecodeError) as error:
        versions = description.training.versions.get("bandsplit"), __version__
        raise UserError(
            f"the config of run {description.training.run}, by bandsplit {versions[0]}, is not understood by "
            f"bandsplit {versions[1]}: {error}"
        ) from None
    split = {"branches": tuple(branch.bands for branch in description.branches), "only": None}
    return config.with_values({"split": split, "data": {"on_bad": "replace", "max_bad": files}})
