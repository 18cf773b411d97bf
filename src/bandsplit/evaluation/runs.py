"""The command `evaluate`: validates one or more runs as one ensemble, fits fusion, and saves predictions."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from bandsplit.data import source
from bandsplit.data.crops import CROPS
from bandsplit.data.source import Images
from bandsplit.distributed.ranks import joined, rank
from bandsplit.errors import UserError
from bandsplit.evaluation import cascade, fitting, report
from bandsplit.evaluation.collector import Gathered
from bandsplit.evaluation.corrupted import evaluate_corrupted, kinds_of
from bandsplit.evaluation.detailed import Evaluation, evaluate_in_detail
from bandsplit.evaluation.evaluate import report_left_out
from bandsplit.evaluation.joined import Joined
from bandsplit.evaluation.predictions import Recorder, Save
from bandsplit.evaluation.report import Results
from bandsplit.evaluation.speed import measure
from bandsplit.models.fusion import MEAN
from bandsplit.paths import require_file
from bandsplit.runs.directory import RunDirectory
from bandsplit.runs.fitted import Fitted
from bandsplit.runs.logs import logged


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    run_dirs: Sequence[Path]
    checkpoint: str = "best"
    """ "best", "last" or a step."""
    overrides: Sequence[str] = ()
    fusion: str | None = None
    """One of `FUSIONS`: whose accuracy is the ensemble's; None: `fusion.method` of the config."""
    fit_fusion: bool = False
    crops: str = "center"
    """A key of `CROPS`."""
    output: Path | None = None
    save: Save | None = None
    cascade: float | None = None
    """Runs the cascade that may lose that much top-1, in percent."""
    data: Path | None = None
    """A data config, whose images are validated instead of the run's."""
    corrupt: str | None = None
    """As `kinds_of` takes it."""
    latency: bool = False

    def check(self) -> None:
        """Raises UserError for what can be known before anything is read."""
        for option, path in (("--output", self.output), ("--save", self.save.path if self.save else None)):
            if path is not None:
                require_file(option, path)
        if self.corrupt is not None:
            kinds_of(self.corrupt)
        if self.data is not None and self.fit_fusion:
            raise UserError(
                f"--data {self.data}: fusion is fitted on images of the run's own data; fit it without --data, "
                "and then name it with --fusion"
            )
        if self.save is not None and self.crops != "center" and not self.save.fused_only:
            raise UserError(
                f"--save {self.save.path}: logits are saved of the center crop only; with --flip or --ten-crop, "
                "--save-fused saves the averaged predictions"
            )
        if self.cascade is not None and self.crops != "center":
            raise UserError(
                f"--cascade {self.cascade:g}: stages are fitted to the center crop, not to --flip or --ten-crop"
            )


def evaluate_runs(request: Request) -> Evaluation:
    """Validates the branches of one or more runs as one ensemble; prints the results and writes what was asked for.

    The first run's config, with the overrides, names the data. Every rank must call it. Raises UserError if a run or
    checkpoint is missing, if the runs differ in data, classes or transform, if a fusion is asked for that was not or
    cannot be fitted, or if the loss is not finite.
    """
    request.check()
    with logged(RunDirectory(request.run_dirs[0]).logs, rank()), joined() as ranks:
        runs = Joined.of(request.run_dirs, request.checkpoint, request.overrides, ranks, request.data)
        files = runs.validation_files()
        truth = runs.truth(files)
        if request.cascade is not None and truth.answers is not None:
            raise UserError(f"--cascade {request.cascade:g}: measured on images with one label each, not with several")
        if request.corrupt is not None:
            source.require_pixels(files)
        _tell_difference(request, runs, files)
        recorder = Recorder(request.save, runs, files, request.crops) if request.save else None
        fusion = request.fusion or runs.config.fusion.method
        fitted, held_out = _fitted(request, runs)
        count = len(runs.branches)
        weights = {name: each.weights for name, each in fitted.fusions.items() if name != MEAN} if fitted else {}
        crops = CROPS[request.crops]
        loader = runs.loader(files, crops)
        began = time.perf_counter()
        evaluation = evaluate_in_detail(
            runs.ensemble, loader, len(files), runs.mesh, runs.precision, weights, recorder, truth
        )
        seconds = time.perf_counter() - began
        report_left_out(evaluation.left_out, loader, runs.config, ranks)
        mean = evaluation.fused[MEAN]
        if not math.isfinite(mean.ece if mean.loss is None else mean.loss):
            raise UserError(f"logits of {runs.first.run_dir} are not finite; try --set train.precision=fp32")
        if recorder is not None:
            recorder.write(evaluation.images, weights, fusion, held_out)
        cascaded = speed = corrupted = None
        if request.cascade is not None and fitted is not None and fitted.cascade is not None:
            cascaded = cascade.run(runs, runs.loader(files), fitted.cascade)
        if request.latency:
            speed = measure(runs, len(files) / seconds, weights.get(fusion, [1 / count] * count))
        if request.corrupt is not None:
            corrupted = evaluate_corrupted(runs, files, kinds_of(request.corrupt), crops, fusion, weights)
        if ranks.is_first:
            results = Results(evaluation, request.crops, fusion, fitted, cascaded, speed, corrupted)
            report.show(results, runs, request.output)
        return evaluation


def _fitted(request: Request, runs: Joined) -> tuple[Fitted | None, Gathered | None]:
    """Fitted fusions, if there are any; and, on rank 0, what they were just fitted on, if it is to be saved."""
    if not request.fit_fusion:
        return fitting.find(runs, request.fusion, request.cascade), None
    held_out = fitting.held_out_logits(runs, request.cascade)
    return fitting.fit(runs, held_out, request.cascade), held_out.gathered if request.save else None


def _tell_difference(request: Request, runs: Joined, files: Images) -> None:
    """Warns where a run is evaluated on other images than it was validated on while it trained."""
    difference = runs.difference(files) if request.data is None and runs.ranks.is_first else ""
    if difference:
        data, run_dir = runs.config.data, runs.first.run_dir
        logger.warning(
            "data.root: {}: images in {} differ from those that {} was validated on: {}",
            data.root,
            data.val,
            run_dir,
            difference,
        )
