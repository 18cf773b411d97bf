"""A trained model as one safetensors file: weights, and the description as JSON in its metadata.

Tensors are named `branches.{i}.{key}`; the metadata key "bandsplit" holds the description.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import safetensors
import torch
from safetensors import SafetensorError
from safetensors.torch import save

from bandsplit.errors import UserError
from bandsplit.inference.classifier import Classifier
from bandsplit.inference.description import Description
from bandsplit.paths import reading_from, replace_bytes

NAME = "model.safetensors"
"""The file in a folder of `save_pretrained`."""

KEY = "bandsplit"

BEYOND = ": its values exceed float16; use float32"

C = TypeVar("C", bound=Classifier)


def write(model: Classifier, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Raises UserError if the file cannot be written, or if a value is not finite in this dtype alone."""
    state = {}
    for key, x in model.state_dict().items():
        whole = x.detach().cpu()
        state[key] = whole.to(dtype if x.is_floating_point() else x.dtype).contiguous()
        if not torch.equal(state[key].isfinite(), whole.isfinite()):
            raise UserError(f"{path}: not written: {key}{BEYOND}")
    content = save(state, metadata={"format": "pt", KEY: model.description.to_json()})
    with replace_bytes(path) as file:
        file.write(content)


def read(path: Path, kind: type[C]) -> C:
    """Raises UserError if the file cannot be read or understood, or its weights do not fit its description."""
    with reading_from(path):
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(KEY)
                if text is None:
                    raise UserError(f"{path}: not written by `bandsplit export`: its metadata have no {KEY!r}")
                description = Description.from_json(text, str(path))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{path}: not a safetensors file, or damaged: {error}") from None
    try:
        return kind(description, {key: x.float() if x.is_floating_point() else x for key, x in tensors.items()})
    except RuntimeError as error:  # one line per tensor
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path}: these weights do not fit the networks of its description: {reason}") from error
