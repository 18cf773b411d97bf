"""A trained model as a graph of other tools: ONNX, and torch.export's .pt2; from images to fused logits.

Input `images` (B, 3, val_size, val_size), float32, RGB from 0 to 1, with any B; output `logits` (B, classes), float32.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from bandsplit.errors import UserError
from bandsplit.inference.classifier import Classifier
from bandsplit.inference.weights import BEYOND, KEY
from bandsplit.paths import writing_to

BATCHES = (1, 2, 7)
"""Numbers of images that a written graph is compared with the model for."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2}
"""How much logits may differ from the model's in float32, as a part of the largest, or of 1 if that is larger."""

IN_ONE_FILE = 2**31 - 2**24
"""Bytes of weights beyond which an ONNX graph has them in a file of its own, as protobuf ends at 2 GB."""

Graph = Callable[[Tensor], Tensor]


def write_onnx(model: Classifier, path: Path, dtype: torch.dtype, in_one_file: int = IN_ONE_FILE) -> float:
    """Writes an ONNX graph, and FILE.data beside it if its weights have more bytes than `in_one_file`.

    The metadata has the class names as JSON ("classes", "names") and the description ("bandsplit"). Returns by how much
    the logits of onnxruntime differ at most. Raises UserError if a package is missing, if the file cannot be written,
    or if the logits differ.
    """
    onnxruntime, _, _ = (_needed(name) for name in ("onnxruntime", "onnx", "onnxscript"))
    with _quiet():
        program = torch.onnx.export(
            _in(dtype, model),
            (_images(model, 2),),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"],
            output_names=["logits"],
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    about = model.description
    lists = {"classes": json.dumps(about.classes), "names": json.dumps(about.names)}
    program.model.metadata_props.update({**lists, KEY: about.to_json()})
    weights = sum(x.numel() * dtype.itemsize for x in model.state_dict().values() if x.is_floating_point())
    with _replaced(path) as written:
        program.save(written, external_data=weights > in_one_file)
        session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
        differs = _checked(model, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), dtype, path)
    earlier = path.with_name(f"{path.name}.data")  # of an earlier export
    if weights <= in_one_file and os.path.lexists(earlier):  # which a name that is too long does not
        with writing_to(path):
            earlier.unlink(missing_ok=True)
    return differs


def write_torch(model: Classifier, path: Path, dtype: torch.dtype) -> float:
    """Writes a graph that `torch.export.load` reads, with the description as its extra file "bandsplit".

    Returns by how much its logits differ at most. Raises UserError if the file cannot be written, or if they differ.
    """
    with _quiet():
        program = torch.export.export(
            _in(dtype, model), (_images(model, 2),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    with _replaced(path) as written:
        torch.export.save(program, written, extra_files={KEY: model.description.to_json()})
        return _checked(model, torch.export.load(written).module(), dtype, path)


def _needed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--format onnx: {name} cannot be imported ({error}); pip install -e .[onnx]") from None


def _in(dtype: torch.dtype, model: Classifier) -> Classifier:
    """A copy whose branches have this dtype."""
    copied = copy.deepcopy(model).cpu()
    copied.branches.to(dtype)
    return copied


def _images(model: Classifier, batch: int) -> Tensor:
    size = model.description.val_size
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def _checked(model: Classifier, graph: Graph, dtype: torch.dtype, path: Path) -> float:
    """The largest difference of logits; raises UserError if it is too large."""
    largest = 0.0
    for batch in BATCHES:
        images = _images(model, batch)
        wanted = model(images.to(model.weights.device)).cpu()
        differs = (graph(images) - wanted).abs().max().item()
        if not differs <= TOLERANCE[dtype] * max(1.0, wanted.abs().max().item()):
            beyond = BEYOND if math.isnan(differs) and wanted.isfinite().all() else ""
            raise UserError(f"{path}: not written: with {batch} images its logits differ by {differs:.2g}{beyond}")
        largest = max(largest, differs)
    return largest


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A file to write in a new folder; at the end it and what is beside it take their places, the file itself last."""
    with writing_to(path), TemporaryDirectory(prefix=".", dir=path.parent) as folder:
        yield Path(folder, path.name)
        for each in sorted(Path(folder).iterdir(), key=lambda each: each.name == path.name):
            each.replace(path.parent / each.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own libraries."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
