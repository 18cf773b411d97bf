"""One or more restored runs as one ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bandsplit.config import loading
from bandsplit.config.schema import RunConfig
from bandsplit.data import holdout, index, pinned, source
from bandsplit.data.crops import CENTER, Crop
from bandsplit.data.images import ImageFiles
from bandsplit.data.loader import shard_of
from bandsplit.data.source import AnyValidationLoader, Images
from bandsplit.data.store.manifest import bands_of
from bandsplit.distributed.mesh import Mesh
from bandsplit.distributed.ranks import Ranks
from bandsplit.errors import UserError
from bandsplit.evaluation.measures import Truth
from bandsplit.models.ensemble import Ensemble
from bandsplit.models.precision import Precision
from bandsplit.runs.directory import RunDirectory
from bandsplit.runs.initial import tell_what_has_seen_held_out
from bandsplit.runs.predictions import Branch
from bandsplit.runs.restored import Restored


@dataclass(frozen=True)
class Joined:
    """The branches of one or more runs, on this rank's device."""

    runs: list[Restored]
    config: RunConfig
    """The first run's, with the branches of all runs."""
    ensemble: Ensemble
    precision: Precision
    ranks: Ranks
    mesh: Mesh

    @classmethod
    def of(
        cls, run_dirs: Sequence[Path], which: str, overrides: Sequence[str], ranks: Ranks, data: Path | None = None
    ) -> Joined:
        """Every rank must call it.

        Args:
            data: a data config, whose images are validated instead of those of the first run.

        Raises UserError if a run or checkpoint is missing, and if the runs differ in data, classes or transform.
        """
        runs = ranks.each(lambda: [Restored.of(run_dir, which, overrides) for run_dir in run_dirs])
        for run in runs[1:]:
            _require_same_data(runs[0], run)
            run.require_classes(runs[0].classes, str(runs[0].run_dir))
        config = runs[0].config
        groups = tuple(group for run in runs for group in run.config.split.groups)
        whole = config.split.model_copy(update={"branches": groups, "only": None, "sigma": _sigma(runs)})
        config = config.model_copy(update={"split": whole})
        if data is not None:
            path = RunDirectory(run_dirs[0]).config
            other = ranks.each(lambda: loading.load(path, overrides, images=data))
            config = config.model_copy(update={"data": other.data})
        precision = Precision(config.train.precision, ranks.device)
        precision.apply()
        ensemble = Ensemble(branch for run in runs for branch in run.ensemble.branches)
        ensemble = ensemble.to(ranks.device).to(memory_format=torch.channels_last)
        return cls(runs, config, ensemble, precision, ranks, Mesh(ranks, len(groups)))

    @property
    def first(self) -> Restored:
        return self.runs[0]

    @property
    def branches(self) -> list[Branch]:
        return [Branch(str(run.run_dir), run.step, bands) for run in self.runs for bands in run.config.split.groups]

    @property
    def branch_numbers(self) -> list[int]:
        """Of the branches in the full ensemble; their places here where one comes twice, as in joined seeds."""
        numbers = [number for run in self.runs for number in run.config.split.numbers]
        return numbers if len({*numbers}) == len(numbers) else [*range(len(numbers))]

    def validation_files(self) -> Images:
        """The validation images, with labels that are indices into the classes of the runs; every rank calls it."""
        config, first = self.config, self.first
        files = source.open_data(config, self.ranks, ["val"])["val"]
        files = self.ranks.each(partial(source.renumbered, files, first.classes, str(first.run_dir), config.data))
        if not len(files):
            raise UserError(f"data.root: {config.data.root}: no image in {config.data.val} is left to evaluate")
        return files

    def truth(self, files: Images) -> Truth:
        """Which classes are right for images of `validation_files`."""
        answers = files.answers if isinstance(files, ImageFiles) else None
        there = np.zeros(len(self.first.classes), dtype=np.bool_)
        there[np.unique(files.labels) if answers is None else answers.any(0)] = True
        on_device = [
            None if each is None else torch.from_numpy(each).to(self.ranks.device) for each in (answers, there)
        ]
        return Truth(on_device[0], None if there.all() else on_device[1])

    def difference(self, files: Images) -> str:
        """How the validation images differ from those that the first run was validated on; "" if they do not.

        It is known of images with an index, in runs that have kept theirs.
        """
        began = index.read(RunDirectory(self.first.run_dir).data / "val.arrow")
        now = files.index if isinstance(files, ImageFiles) else None
        if began is None or now is None or began.digest == now.digest:
            return ""
        return str(pinned.difference(began, now))

    def held_out_files(self) -> Images:
        """The training images that no run was trained on; every rank calls it.

        Raises UserError if the runs differ in these, or if the images are not those that the first run was trained on.
        """
        for run in self.runs[1:]:
            self._require_same_held_out(run)
        config, first, ranks = self.config, self.first, self.ranks
        began = RunDirectory(first.run_dir).data
        files = source.open_data(config, ranks, ["train"], began=began)["train"]
        if files.digest != first.digests["train"]:
            raise UserError(
                f"data.root: {config.data.root}: the training images are not those that {first.run_dir} was trained "
                f"on, and {began} does not list those, so the held-out ones are unknown"
            )
        if ranks.is_first:
            for run in self.runs:
                tell_what_has_seen_held_out(run.config, files.digest)
        return holdout.split(files, config)[1]

    def _require_same_held_out(self, run: Restored) -> None:
        facts = [
            {
                "seed": each.config.seed,
                "data.holdout": each.config.data.holdout,
                "training images": each.digests["train"],
            }
            for each in (self.first, run)
        ]
        for key, value in facts[0].items():
            if facts[1][key] != value:
                raise UserError(
                    f"{run.run_dir}: {key}: {facts[1][key]!r}, but {self.first.run_dir} has {value!r}: one was trained "
                    "on images that the other held out, and fusion is fitted on images that no branch was trained on"
                )

    def loader(self, files: Images, crops: Sequence[Crop] = CENTER) -> AnyValidationLoader:
        """This rank's share of images, prepared as validation images are."""
        shard = shard_of(self.config, self.ranks, self.batch_size, self.precision.half_bands)
        return self.ranks.each(partial(source.validation_loader, self.config, files, shard, crops))

    @property
    def batch_size(self) -> int:
        """Images per batch of this rank."""
        config = self.config
        parts = self.ranks.world_size * config.grad_accum_steps  # need not divide the batch
        return config.validation.batch_size or max(1, config.train.batch_size // parts)


def _sigma(runs: Sequence[Restored]) -> tuple[float, ...] | None:
    """σ of every band, each from the runs that read it; None: the first run has none.

    Raises UserError where two runs that read a band differ.
    """
    first = runs[0].config.split
    if first.sigma is None or not first.scale:
        return first.sigma
    sigma, known = list(first.sigma), dict[int, Restored]()
    for run in runs:
        for band in bands_of(run.config.split):
            own = (run.config.split.sigma or first.sigma)[band]
            if band in known and sigma[band] != own:
                raise UserError(
                    f"{run.run_dir}: split.sigma: {own} for band {band}, but {known[band].run_dir} has {sigma[band]}; "
                    "runs are joined into one ensemble only where they agree"
                )
            sigma[band], known[band] = own, run
    return tuple(sigma)


def _require_same_data(one: Restored, other: Restored) -> None:
    """Raises UserError if two runs read different data or preprocess, normalize or transform images differently."""
    for table, keys in (
        ("data", ("name", "classes", "image_size", "val_image_size", "resize_size", "interpolation", "mean", "std")),
        ("split", ("block", "transform", "norm", "scale")),
    ):
        for key in keys:
            a, b = (getattr(getattr(run.config, table), key) for run in (one, other))
            if a != b:
                raise UserError(
                    f"{other.run_dir}: {table}.{key}: {b!r}, but {one.run_dir} has {a!r}; runs are joined into one "
                    "ensemble only where they agree"
                )
