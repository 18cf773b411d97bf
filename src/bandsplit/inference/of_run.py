"""The model of a run directory at one of its checkpoints."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from loguru import logger

from bandsplit.commands import command
from bandsplit.errors import UserError
from bandsplit.inference.description import Branch, Description, Network, Training
from bandsplit.models.fusion import FUSIONS, MEAN
from bandsplit.runs.directory import RunDirectory
from bandsplit.runs.files import read_text
from bandsplit.runs.fitted import FILE, Fitted
from bandsplit.runs.metrics import values_of
from bandsplit.runs.restored import Restored
from bandsplit.spectral.view import View


def describe(restored: Restored, fusion: str | None) -> Description:
    """The model of a restored run.  Warns if it is only a part of what was trained (`distillation.residual`).

    Args:
        fusion: how logits are fused; None: `fusion.method` of the config.

    Raises UserError if the fusion was not fitted for this checkpoint.
    """
    config, directory = restored.config, RunDirectory(restored.run_dir)
    view, data = View.of(config), config.data
    method = fusion or config.fusion.method
    if config.distillation is not None and config.distillation.residual:
        both = f"{command('evaluate')} {config.distillation.teacher} {restored.run_dir}"
        logger.warning(
            "{}: trained with distillation.residual = true: its branches are a part of the prediction, and its teacher "
            "is the rest; both together: {}",
            restored.run_dir,
            both,
        )
    return Description(
        classes=tuple(restored.classes),
        names=tuple(directory.readable_names(restored.classes)),
        block=config.split.block,
        matrix=tuple(tuple(row) for row in view.matrix.tolist()),
        mean=data.mean,
        std=data.std,
        image_size=data.image_size,
        val_size=data.val_size,
        resize_size=data.resize_size,
        interpolation=data.interpolation,
        branches=tuple(
            Branch(number, bands, _network(config.model_of(number)))
            for number, bands in zip(config.split.numbers, config.split.groups, strict=True)
        ),
        fusion=method,
        weights=_weights(restored, method),
        training=_training(restored, directory),
    )


def _network(model: Any) -> Network:
    return Network(**{field.name: getattr(model, field.name) for field in fields(Network)})


def _weights(restored: Restored, method: str) -> tuple[float, ...]:
    count = len(restored.config.split.groups)
    if method == MEAN:
        return (1 / count,) * count
    if method not in FUSIONS:
        raise UserError(f"fusion {method!r} given; allowed: {', '.join(FUSIONS)}")
    path = restored.checkpoint / FILE
    fitted = Fitted.read(path)
    if fitted is None or not fitted.is_for(restored.fitted_branches) or method not in fitted.fusions:
        wrong = "no such file" if fitted is None else "it is not fitted for these branches"
        how = f"{command('evaluate')} {restored.run_dir} --checkpoint {restored.step} --fit-fusion"
        raise UserError(f"fusion {method!r}: {path}: {wrong}; fit it with {how}, or use 'mean'")
    fitted.tell_other_preparation(restored.config.data, path)
    return tuple(fitted.fusions[method].weights)


def _training(restored: Restored, directory: RunDirectory) -> Training:
    config = restored.config
    validated = _validation(directory.metrics, restored.step)
    return Training(
        config.name,
        config.seed,
        restored.step,
        validated.get("epoch"),
        validated.get("top1"),
        read_text(directory.config) or "",
        directory.last_launch.get("versions", {}),
    )


def _validation(path: Path, step: int) -> dict[str, Any]:
    """The last validation at this step in metrics.jsonl; {} if there is none."""
    found: dict[str, Any] = {}
    for line in (read_text(path) or "").splitlines():
        values = values_of(line) if '"validation"' in line else None  # none of a line that was cut off
        if values and values.get("event") == "validation" and values.get("step") == step:
            found = values
    return found
