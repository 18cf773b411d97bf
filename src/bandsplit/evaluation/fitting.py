"""Fusion and cascade fitted on the held-out images of a run, and found again beside its checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
from loguru import logger
from numpy.typing import NDArray

from bandsplit.commands import command
from bandsplit.config.schema import RunConfig
from bandsplit.errors import UserError
from bandsplit.evaluation import collector
from bandsplit.evaluation.collector import Collector, Gathered
from bandsplit.evaluation.evaluate import outputs, report_left_out
from bandsplit.evaluation.joined import Joined
from bandsplit.models import cascade, fusion
from bandsplit.models.cascade import Cascade
from bandsplit.models.fusion import MEAN, Fusion
from bandsplit.runs.fitted import FILE, Fitted, FittedBranch, HeldOut, preparation

T = TypeVar("T")

_Fit = tuple[dict[str, Fusion], Cascade | None]


def path_of(runs: Joined) -> Path:
    """Beside the checkpoint of the first run; a file of its own for each set of joined runs."""
    if len(runs.runs) == 1:
        return runs.first.checkpoint / FILE
    names = json.dumps([[run.config.name, run.config.seed, run.step, run.config.split.groups] for run in runs.runs])
    own = hashlib.blake2b(names.encode(), digest_size=4).hexdigest()
    return (runs.first.checkpoint / FILE).with_stem(f"fusion-{own}")


def find(runs: Joined, method: str | None, loss: float | None = None) -> Fitted | None:
    """The fusions that were fitted for these branches, None if there are none; every rank calls it.

    Args:
        method: the fusion that must be among them; None: that of the config.
        loss: what the cascade that must be among them was fitted for; None: none is needed.

    Raises UserError if the file cannot be read, and if it does not have what is needed.
    """
    return runs.ranks.from_first(partial(_find, runs, method, loss))


def _find(runs: Joined, method: str | None, loss: float | None) -> Fitted | None:
    needed = method or runs.config.fusion.method
    path = path_of(runs)
    earlier = path.with_name(FILE)  # of joined runs too in earlier versions
    path = earlier if earlier.exists() and not path.exists() else path
    fitted = Fitted.read(path)
    wrong = _missing(fitted, runs, needed, loss)
    if wrong is None:
        assert fitted is not None
        fitted.tell_other_preparation(runs.config.data, path)
        return fitted
    if needed == MEAN and loss is None:
        return None
    asked, option = f"--fusion {method}" if method else f"fusion.method = {needed!r}", ""
    if loss is not None:
        asked, option = f"--cascade {loss:g}", f" --cascade {loss:g}"
    dirs = " ".join(str(run.run_dir) for run in runs.runs)
    how = f"fit it with {command('evaluate')} {dirs} --fit-fusion{option}"
    raise UserError(f"{asked}: {path}: {wrong}; {how if _has_holdout(runs) else _NO_HOLDOUT}")


def _missing(fitted: Fitted | None, runs: Joined, needed: str, loss: float | None) -> str | None:
    """What the file lacks; None if nothing."""
    if fitted is None:
        return "no such file"
    if not fitted.is_for(_branches(runs)):
        return "it was fitted for other branches"
    if needed not in fitted.fusions:
        return f"it has no fusion {needed!r}"
    if loss is None:
        return None
    if fitted.cascade is None:
        return "it has no cascade"
    return None if fitted.cascade.loss == loss else f"its cascade is for a loss of {fitted.cascade.loss:g}"


_NO_HOLDOUT = (
    "fusion is fitted on training images that the run was not trained on, and this run held none out: train one with "
    "--set data.holdout=COUNT (per class) or a fraction"
)


def _has_holdout(runs: Joined) -> bool:
    return runs.config.data.holdout is not None


def _branches(runs: Joined) -> list[FittedBranch]:
    return [branch for run in runs.runs for branch in run.fitted_branches]


@dataclass(frozen=True, eq=False)
class HeldOutLogits:
    """Logits of held-out images, gathered on rank 0."""

    gathered: Gathered | None
    """None on the other ranks."""
    of: int
    """All held-out images."""


def held_out_logits(runs: Joined, loss: float | None = None) -> HeldOutLogits:
    """Logits of the held-out images, or of a sample where those of all do not fit into memory; every rank calls it.

    Raises UserError if the runs have no held-out images in common, or too few for a cascade that may lose `loss`.
    """
    if not _has_holdout(runs):
        raise UserError(f"--fit-fusion: {runs.first.run_dir}: {_NO_HOLDOUT}")
    files, config = runs.held_out_files(), runs.config
    if runs.ranks.is_first:
        for warning in what_knows_held_out([run.config for run in runs.runs]):
            logger.warning(warning)
    count = collector.fitting(len(files), len(runs.branches), len(runs.first.classes))
    if loss is not None:
        cascade.most_lost(count, loss)
    kept, loader = Collector(collector.sample(len(files), count, config.seed)), runs.loader(files)
    of_held_out = outputs(runs.ensemble, loader, runs.mesh, runs.precision, "held-out images")
    for number, (logits, labels) in enumerate(of_held_out):
        kept.add(loader.rows(number), labels, logits=collector.half(logits))
    report_left_out(runs.ranks.largest([len(loader.left_out)])[0], loader, config, runs.ranks, "held-out")
    return HeldOutLogits(kept.gathered(files, runs.ranks), len(files))


def what_knows_held_out(configs: Sequence[RunConfig]) -> list[str]:
    """Warnings about the configs of runs in which held-out images had a part, or may have had one."""
    warnings = []
    if any(config.train.early_stop_patience is not None for config in configs):
        warnings.append(
            "train.early_stop_patience: held-out images, on which fusion and cascades are fitted, also decided when "
            "branches stopped: expect a slightly lower accuracy on other images than on these"
        )
    begun = {config.model_of(number).init_from for config in configs for number in config.split.numbers}
    if public := begun & {"torchvision", "timm"}:
        warnings.append(
            f"model.init_from: {', '.join(sorted(map(repr, public)))}: such weights were trained on ImageNet, and on "
            "the held-out images too if these are from there: fusion and cascades fitted on them are then too sure of "
            "themselves"
        )
    return warnings


def fit(runs: Joined, held_out: HeldOutLogits, loss: float | None = None) -> Fitted:
    """Fits all fusions on the held-out images and writes them beside the checkpoint; every rank calls it.

    Raises UserError if the logits are not finite.

    Args:
        loss: top-1 in percent that a cascade may lose, which is then fitted too; None: no cascade.
    """
    ranks, gathered = runs.ranks, held_out.gathered
    found = ranks.finish(_in_thread(partial(_fit, gathered, runs, loss)) if gathered else None)

    def written() -> Fitted:
        assert gathered is not None
        assert found is not None
        holdout = runs.config.data.holdout
        assert holdout is not None
        config, path = runs.config, path_of(runs)
        digest = runs.first.digests["train"]
        fitted_on = HeldOut(len(gathered.rows), held_out.of, holdout, config.seed, digest, preparation(config.data))
        fitted = Fitted(_branches(runs), fitted_on, *found)
        if loss is None:
            fitted = _with_earlier_cascade(fitted, path)
        fitted.write(path)
        return fitted

    return ranks.from_first(written)


def _with_earlier_cascade(fitted: Fitted, path: Path) -> Fitted:
    """With the cascade that was fitted before, if that is the same for these weights; otherwise it is told."""
    with suppress(UserError):
        earlier = Fitted.read(path)
        if earlier is not None and earlier.cascade is not None:
            alike = earlier.is_for(fitted.branches) and earlier.held_out.are_those_of(fitted.held_out)
            before, now = (each.fusions["learned"].weights for each in (earlier, fitted))
            if alike and np.allclose(before, now, rtol=0.01, atol=0.001):  # logits differ between devices
                return replace(fitted, cascade=earlier.cascade)
            logger.warning("{}: its cascade was fitted for other weights or images; --cascade fits it anew", path)
    return fitted


def _fit(held_out: Gathered, runs: Joined, loss: float | None) -> _Fit:
    logits, labels = cast(NDArray[np.float16], held_out.columns["logits"]), held_out.labels
    if not np.isfinite(logits).all():
        raise UserError(f"logits of {runs.first.run_dir} are not finite; try --set train.precision=fp32")
    fusions = fusion.fit(logits, labels)
    if loss is None:
        return fusions, None
    return fusions, cascade.fit(logits, labels, np.array(fusions["learned"].weights), loss)


def _in_thread(work: Callable[[], T]) -> Generator[None, None, T]:
    """Yields every second until `work` is done, so that other ranks are told that this one is still working."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        while True:
            try:
                return future.result(timeout=1)
            except TimeoutError:
                yield
