"""Models of runs that were never trained: the initial weights of a config."""

from __future__ import annotations

from pathlib import Path

import tomli_w

from bandsplit.config import loading
from bandsplit.data import demo
from bandsplit.inference import of_run
from bandsplit.inference.classifier import Classifier
from bandsplit.models.ensemble import Ensemble
from bandsplit.runs.directory import RunDirectory, resolved
from bandsplit.runs.restored import Restored


def restored(config_file: Path, *overrides: str) -> Restored:
    config = loading.load(config_file, overrides)
    ensemble = Ensemble.of(config).eval()
    directory = RunDirectory(config_file.parent)
    directory.config.write_text(tomli_w.dumps(resolved(config)))
    return Restored(config_file.parent, config, ensemble, config_file.parent, 0, list(demo.CLASSES), {})


def classifier(config_file: Path, *overrides: str) -> Classifier:
    run = restored(config_file, *overrides)
    return Classifier(of_run.describe(run, None), run.ensemble.state_dict())
