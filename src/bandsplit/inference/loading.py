"""`bandsplit.load`: the model of a run directory or of an exported file."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from bandsplit.errors import UserError
from bandsplit.inference import weights
from bandsplit.inference.classifier import Classifier
from bandsplit.paths import reading_from

C = TypeVar("C", bound=Classifier)

EXPECTED = "a run directory or a safetensors file of `bandsplit export`"


def load(path: str | Path, checkpoint: str | int = "best", fusion: str | None = None) -> Classifier:
    """Loads a trained model, in evaluation mode on the CPU.

    Args:
        path: a run directory, a safetensors file of `bandsplit export`, or a folder of `save_pretrained`.
        checkpoint: of a run: "best", "last" or a step.
        fusion: of a run: one that was fitted, or "mean"; None: `fusion.method` of its config.

    Raises UserError if there is no such model, it is damaged, or the fusion was not fitted for it.
    """
    return load_as(Classifier, path, checkpoint, fusion)


def load_as(kind: type[C], path: str | Path, checkpoint: str | int = "best", fusion: str | None = None) -> C:
    """`load` for a subclass of Classifier."""
    path = Path(path)
    with reading_from(path):
        exported = path / weights.NAME if path.is_dir() and not (path / "config.toml").is_file() else path
        is_file, is_folder = exported.is_file(), path.is_dir()
    if is_file and exported.suffix in (".onnx", ".pt2"):
        raise UserError(f"{exported}: a graph for other tools; expected {EXPECTED}")
    if is_file:
        if checkpoint != "best" or fusion is not None:
            raise UserError(f"{exported}: an exported model has one checkpoint and one fusion; choose them of its run")
        return weights.read(exported, kind)
    if not is_folder:
        raise UserError(f"{path}: no such model; expected {EXPECTED}")
    from bandsplit.inference import of_run
    from bandsplit.runs.restored import Restored

    restored = Restored.of(path, str(checkpoint))
    return kind(of_run.describe(restored, fusion), restored.ensemble.state_dict())
