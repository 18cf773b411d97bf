"""Models on the Hugging Face Hub: `save_pretrained`, `from_pretrained`, `push_to_hub` (pip install -e .[hub])."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download

from bandsplit.errors import UserError
from bandsplit.inference import loading, weights
from bandsplit.inference.classifier import Classifier


class HubClassifier(Classifier, PyTorchModelHubMixin, library_name="bandsplit", pipeline_tag="image-classification"):
    """A `Classifier` with the methods of the Hub.

    A saved folder holds the file of `bandsplit export --format safetensors`, and the description once more as
    config.json, by which the Hub counts downloads.
    """

    @classmethod
    def load(cls, path: str | Path, checkpoint: str | int = "best", fusion: str | None = None) -> Self:
        """As `bandsplit.load`."""
        return loading.load_as(cls, path, checkpoint, fusion)

    def _save_pretrained(self, save_directory: Path) -> None:
        weights.write(self, Path(save_directory) / weights.NAME)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, map_location: str = "cpu", **options: Any) -> Self:
        file = Path(model_id) / weights.NAME
        if not Path(model_id).is_dir():
            keys = ("revision", "cache_dir", "force_download", "local_files_only", "token")
            file = Path(hf_hub_download(model_id, weights.NAME, **{key: options[key] for key in keys}))
        if not file.is_file():
            raise UserError(f"{file}: no such file; expected a folder of save_pretrained")
        return weights.read(file, cls).to(map_location)
