"""The command `evaluate`: validates one or more runs as one ensemble, fits fusion, and saves predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bandsplit.data.crops import CROPS
from bandsplit.data.source import Images
from bandsplit.distributed.ranks import joined, rank
from bandsplit.errors import UserError
from bandsplit.evaluation import fitting, predictions, report
from bandsplit.evaluation.detailed import Evaluation, evaluate_in_detail
from bandsplit.evaluation.evaluate import report_left_out
from bandsplit.evaluation.joined import Joined
from bandsplit.evaluation.predictions import Collector
from bandsplit.models.fusion import MEAN
from bandsplit.runs.directory import RunDirectory
from bandsplit.runs.logs import logged


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    run_dirs: Sequence[Path]
    checkpoint: str = "best"
    """ "best", "last" or a step."""
    overrides: Sequence[str] = ()
    fusion: str = MEAN
    """One of `FUSIONS`: whose accuracy is the ensemble's."""
    fit_fusion: bool = False
    crops: str = "center"
    """A key of `CROPS`."""
    output: Path | None = None
    save: Path | None = None
    save_sample: int | None = None

    def check(self) -> None:
        """Raises UserError for what can be known before anything is read."""
        for option, path in (("--output", self.output), ("--save", self.save)):
            if path is not None and not path.parent.is_dir():
                raise UserError(f"{option} {path}: there is no folder {path.parent}")
        if self.save is not None and self.crops != "center":
            raise UserError(
                f"--save {self.save}: logits are saved of the center crop only, not with --flip or --ten-crop"
            )


def evaluate_runs(request: Request) -> Evaluation:
    """Validates the branches of one or more runs as one ensemble; prints the results and writes what was asked for.

    The first run's config, with the overrides, names the data. Every rank must call it. Raises UserError if a run or
    checkpoint is missing, if the runs differ in data, classes or transform, if a fusion is asked for that was not or
    cannot be fitted, or if the loss is not finite.
    """
    request.check()
    with logged(RunDirectory(request.run_dirs[0]).logs, rank()), joined() as ranks:
        runs = Joined.of(request.run_dirs, request.checkpoint, request.overrides, ranks)
        files = runs.validation_files()
        collector = _collector(request, runs, files) if request.save else None
        needed = None if request.fusion == MEAN else request.fusion
        fitted = fitting.fit(runs) if request.fit_fusion else fitting.find(runs, needed)
        weights = {name: each.weights for name, each in fitted.fusions.items() if name != MEAN} if fitted else {}
        loader = runs.loader(files, CROPS[request.crops])
        evaluation = evaluate_in_detail(
            runs.ensemble, loader, len(files), runs.mesh, runs.precision, weights, collector
        )
        report_left_out(evaluation.left_out, loader, runs.config, ranks)
        loss = evaluation.fused[MEAN].loss
        if not math.isfinite(loss):
            raise UserError(f"the loss of {runs.first.run_dir} is {loss}; try --set train.precision=fp32")
        if collector is not None and request.save is not None:
            gathered = collector.gathered(ranks)
            ranks.from_first(partial(_save, request.save, files, gathered, runs))
        if ranks.is_first:
            report.show(evaluation, runs, request.crops, request.fusion, fitted, request.output)
        return evaluation


def _collector(request: Request, runs: Joined, files: Images) -> Collector:
    """Raises UserError if the logits do not fit into memory."""
    branches, classes = len(runs.branches), len(runs.first.classes)
    wanted = min(request.save_sample or len(files), len(files))
    fits = predictions.fitting(wanted, branches, classes)
    if fits < wanted:
        raise UserError(
            f"--save {request.save}: the logits of {wanted:,} images, {branches} branches and {classes:,} classes take "
            f"{2 * wanted * branches * classes / 2**30:,.0f} GiB, and at most {predictions.LIMIT / 2**30:.0f} GiB are "
            f"kept in memory; save a sample of the images with --save-sample {fits}"
        )
    return Collector(predictions.sample(len(files), wanted, runs.config.seed))


def _save(path: Path, files: Images, gathered: predictions.Gathered, runs: Joined) -> None:
    assert gathered is not None
    predictions.of(files, gathered, runs.branches).write(path)
