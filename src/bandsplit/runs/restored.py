"""Restored runs: the branches of a run at a checkpoint, for validation or as a teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from loguru import logger
from torch import Tensor, nn

from bandsplit.config import loading
from bandsplit.config.schema import Distillation, RunConfig
from bandsplit.data.images import require_same_classes
from bandsplit.errors import UserError
from bandsplit.models.ensemble import Ensemble, fuse
from bandsplit.models.precision import Precision
from bandsplit.paths import expanded
from bandsplit.runs import checkpoint
from bandsplit.runs.directory import RunDirectory, flatten, resolved
from bandsplit.runs.fitted import FittedBranch
from bandsplit.spectral.view import View

TRAINED = ("model.", "branch", "split.", "data.classes", "data.mean", "data.std", "data.holdout", "seed")
"""Prefixes of config keys that the weights of a run depend on, or the choice of the images that it was not trained on.
"""


@dataclass(frozen=True)
class Restored:
    """A run's branches at one of its checkpoints."""

    run_dir: Path
    config: RunConfig
    ensemble: Ensemble
    checkpoint: Path
    step: int
    classes: list[str]
    """Class names in the order of the logits."""
    digests: dict[str, str]
    """Of the images of each part ("train", "val") that it was trained and validated on."""

    @classmethod
    def of(cls, run_dir: Path, which: str, overrides: Sequence[str] = ()) -> Restored:
        """Loads a run at a checkpoint ("best", "last" or a step), with EMA weights if there are any.

        Branches that had not begun by then (`train.start_epochs`) are left out, as in the run's own validations.

        Raises UserError if the run or checkpoint does not exist, if the checkpoint is damaged, and if `overrides`
        change a key of TRAINED.
        """
        directory = RunDirectory(run_dir)
        if not directory.holds_run:
            raise UserError(f"{run_dir}: not a run directory: it has no {directory.config.name}")
        config = loading.load(directory.config, overrides)
        if overrides:
            _require_same_networks(loading.load(directory.config), config, run_dir)
        folder = checkpoint.find(directory.checkpoints, which)
        run = checkpoint.read_run(folder)
        config = _without_unbegun(config, run["progress"]["epoch"], folder)
        ensemble, state = Ensemble.of(config), checkpoint.read_ensemble(folder, config.split.numbers)
        try:
            ensemble.load_state_dict(state)
        except RuntimeError as error:  # one line per tensor
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"{folder}: these weights do not fit the networks of the config: {reason}") from error
        return cls(run_dir, config, ensemble, folder, run["progress"]["step"], run["classes"], run["data"])

    @property
    def fitted_branches(self) -> list[FittedBranch]:
        """The branches as fusion.json names them."""
        config, branches = self.config, self.ensemble.branches
        return [
            FittedBranch(config.name, config.seed, self.step, list(bands), digest_of(branch))
            for bands, branch in zip(config.split.groups, branches, strict=True)
        ]

    def require_classes(self, found: Sequence[str], where: str) -> None:
        """Raises UserError if its class names differ from those `found` in `where`."""
        require_same_classes(self.classes, str(self.run_dir), found, where)


class Teacher:
    """A restored ensemble, frozen, whose fused logits are distilled."""

    def __init__(self, restored: Restored, precision: Precision) -> None:
        self._precision = precision
        self.name = f"{restored.config.name}, step {restored.step}, {restored.run_dir}"
        self.config = restored.config
        self.view = View.of(restored.config)
        """Its split and normalization."""
        ensemble = restored.ensemble.to(precision.device).to(memory_format=torch.channels_last)
        self._ensemble = ensemble.eval().requires_grad_(False)

    @classmethod
    def of(cls, config: RunConfig, classes: Sequence[str], precision: Precision) -> Teacher | None:
        """The teacher of a config, None without distillation. `classes`: class names of the training data.

        Raises UserError if there is no such run, or if it does not fit the images or classes of this config.
        """
        if config.distillation is None:
            return None
        run_dir = teachers_directory(config.distillation)
        try:
            restored = Restored.of(run_dir, str(config.distillation.checkpoint))
            _require_fit(restored.config, config)
            restored.require_classes(classes, "the data of this run")
        except UserError as error:
            raise UserError(f"distillation.teacher: {error}") from error
        return cls(restored, precision)

    @cached_property
    def digest(self) -> str:
        """Of its weights; only the rank that writes checkpoints asks for it."""
        return digest_of(self._ensemble)

    @torch.no_grad()
    def logits(self, inputs: Sequence[Tensor]) -> Tensor:
        """Inputs of the teacher's branches, (B, channels, h, w) each -> fused logits (B, classes), float32."""
        with self._precision.autocast():
            return fuse(self._ensemble(inputs))


def _without_unbegun(config: RunConfig, epoch: float, folder: Path) -> RunConfig:
    """The config with the branches alone that have taken a step in so many epochs."""
    numbers, starts = config.split.numbers, config.train.start_epochs
    begun = tuple(number for number in numbers if not starts or starts[number] < epoch)
    if not begun or len(begun) == len(numbers):
        return config
    left = [number for number in numbers if number not in begun]
    which = f"branch {left[0]}" if len(left) == 1 else f"branches {', '.join(map(str, left))}"
    logger.warning("{}: left out: {}, not begun yet (train.start_epochs)", folder, which)
    return config.with_values({"split": {"only": begun}})


def digest_of(networks: nn.Module) -> str:
    """BLAKE2b over the values of all parameters and buffers, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for value in networks.state_dict().values():
        digest.update(value.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def teachers_directory(distillation: Distillation) -> Path:
    return expanded(distillation.teacher, "distillation.teacher")


def teachers_config(config: RunConfig) -> RunConfig | None:
    """The config of a run's teacher; None without one, and if it is not there yet.

    Raises UserError if it does not fit the images or classes of this config.
    """
    if config.distillation is None:
        return None
    directory = RunDirectory(teachers_directory(config.distillation))
    if not directory.holds_run:
        return None
    try:
        teacher = loading.load(directory.config)
        _require_fit(teacher, config)
    except UserError as error:
        raise UserError(f"distillation.teacher: {error}") from error
    return teacher


def _require_same_networks(own: RunConfig, config: RunConfig, run_dir: Path) -> None:
    """Raises UserError if overrides change a key of TRAINED; data and preprocessing may change."""
    was, now = (flatten(resolved(each)) for each in (own, config))
    for key in sorted({*was, *now}):
        if key.startswith(TRAINED) and was.get(key) != now.get(key):
            raise UserError(
                f"--set {key}: {now.get(key)!r} given, but the networks of {run_dir} were trained with {was.get(key)!r}"
            )


def _require_fit(teacher: RunConfig, config: RunConfig) -> None:
    if teacher.data.classes != config.data.classes:
        raise UserError(f"{teacher.name} has {teacher.data.classes} classes, but data.classes is {config.data.classes}")
    sizes = {config.image_size_at(epoch) for epoch in range(config.train.epochs)}
    for size in sorted(sizes):
        if size % teacher.split.block:
            raise UserError(
                f"{teacher.name} splits into blocks of {teacher.split.block} pixels, which do "
                f"not divide training images of {size} x {size}"
            )
        models = [teacher.model_of(number) for number in teacher.split.numbers]
        if size != teacher.data.image_size and any(model.takes_one_size for model in models):
            raise UserError(
                f"the networks of {teacher.name} take images of {teacher.data.image_size} x "
                f"{teacher.data.image_size} alone, but training images are {size} x {size}"
            )
