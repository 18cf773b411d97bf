"""Exact validation: counts of correct predictions of the ensemble and every branch, each image once."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor
from torch.nn.functional import cross_entropy

from bandsplit.config.schema import RunConfig
from bandsplit.data import source
from bandsplit.data.feed import BatchFeed
from bandsplit.data.loader import LEFT_OUT, Batch, shard_of
from bandsplit.data.recovery import too_many
from bandsplit.data.source import AnyValidationLoader
from bandsplit.distributed.mesh import Mesh
from bandsplit.distributed.ranks import Ranks, joined, rank
from bandsplit.errors import UserError
from bandsplit.models.ensemble import Ensemble, fuse
from bandsplit.models.precision import Precision
from bandsplit.runs.directory import RunDirectory
from bandsplit.runs.files import replace_text
from bandsplit.runs.logs import logged
from bandsplit.runs.restored import Restored


@dataclass(frozen=True)
class Accuracy:
    """Accuracies in percent over the validation set; `loss` is the mean cross-entropy of the fused logits."""

    val_images: int
    loss: float
    top1: float
    top5: float
    branch_top1: list[float]
    branch_top5: list[float]
    left_out: int = 0
    """Images that could not be decoded, and are not among the `val_images`."""

    def as_dict(self) -> dict[str, Any]:
        """`left_out` only where there are such images."""
        values = asdict(self)
        return values if self.left_out else {key: value for key, value in values.items() if key != "left_out"}


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (..., B, classes) and labels (B,) -> (..., 2): correct within the top 1 and the top 5."""
    top = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels[:, None]
    return torch.stack([top[..., 0].sum(-1), top.any(-1).sum(-1)], dim=-1)


@torch.inference_mode()
def evaluate(ensemble: Ensemble, batches: Iterable[Batch], images: int, mesh: Mesh, precision: Precision) -> Accuracy:
    """Accuracy over the batches of all ranks, `images` images in total, of which some may be left out.

    `ensemble` holds this rank's branches. Every rank must have the same number of batches of equal size, with the
    labels of `ValidationLoader`. Counts and the sum of losses stay on the device until one reduction at the end.
    """
    ensemble.eval()
    device, feed = mesh.ranks.device, BatchFeed(batches, mesh)
    counts = torch.zeros(1 + mesh.branches, 2, dtype=torch.int64, device=device)
    seen = torch.zeros(2, dtype=torch.int64, device=device)
    loss = torch.zeros(1, dtype=torch.float64, device=device)
    for batch in feed:
        with precision.autocast():
            own = ensemble(batch.inputs)
        logits, labels = feed.of_own_images(own, batch.labels)
        fused = fuse(logits)
        counts += count_correct(torch.cat([fused[None], logits]), labels)
        loss += cross_entropy(fused.double(), labels.clamp(min=-1), reduction="sum", ignore_index=-1)
        seen += torch.stack([(labels >= 0).sum(), (labels == LEFT_OUT).sum()])
    totals = mesh.ranks.sum(torch.cat([counts.flatten().double(), seen.double(), loss]))
    *correct, total, left_out, loss_sum = totals.tolist()
    assert total + left_out == images, f"validated {total + left_out:.0f} images of {images}"
    percent = [100 * c / total for c in correct]
    return Accuracy(int(total), loss_sum / total, percent[0], percent[1], percent[2::2], percent[3::2], int(left_out))


def report_left_out(accuracy: Accuracy, loader: AnyValidationLoader, config: RunConfig, ranks: Ranks) -> None:
    """Names the images that a validation has left out; every rank calls it.

    Raises TooManyBadImages on every rank where they are more than `data.max_bad`.
    """
    if not accuracy.left_out:
        return
    bad = sorted({(each["file"], each["reason"]) for part in ranks.gather(loader.left_out) for each in part})
    if len(bad) > config.data.max_bad:
        raise too_many(bad, config.data.max_bad)
    if ranks.is_first:
        named = "".join(f"\n  {file}: {reason}" for file, reason in bad)
        logger.warning("{} validation images cannot be decoded and do not count:{}", len(bad), named)


def evaluate_runs(
    run_dirs: Sequence[Path], which: str, overrides: Sequence[str] = (), output: Path | None = None
) -> Accuracy:
    """Validates the branches of one or more runs at a checkpoint ("best", "last" or a step) as one ensemble.

    Prints the accuracy and writes it to `output` as JSON. The first run's config, with `overrides`, names the data.
    Raises UserError if a run or checkpoint is missing, if the runs differ in data, classes or transform, or if the
    loss is not finite.
    """
    if output is not None and not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")
    with logged(RunDirectory(run_dirs[0]).logs, rank()), joined() as ranks:
        runs = ranks.each(lambda: [Restored.of(run_dir, which, overrides) for run_dir in run_dirs])
        for run in runs[1:]:
            _require_same_data(runs[0], run)
            run.require_classes(runs[0].classes, str(runs[0].run_dir))
        config = runs[0].config
        groups = tuple(group for run in runs for group in run.config.split.groups)
        whole = config.split.model_copy(update={"branches": groups, "only": None})
        config = config.model_copy(update={"split": whole})
        precision = Precision(config.train.precision, ranks.device)
        precision.apply()
        ensemble = Ensemble(branch for run in runs for branch in run.ensemble.branches)
        ensemble = ensemble.to(ranks.device).to(memory_format=torch.channels_last)
        files = source.open_data(config, ranks, ["val"])["val"]
        classes, by = runs[0].classes, str(runs[0].run_dir)
        files = ranks.each(partial(source.renumbered, files, classes, by, config.data.root))
        parts = ranks.world_size * config.train.grad_accum_steps  # need not divide the batch
        batch_size = config.validation.batch_size or max(1, config.train.batch_size // parts)
        loader = source.validation_loader(config, files, shard_of(config, ranks, batch_size, precision.half_bands))
        accuracy = evaluate(ensemble, loader, len(files), Mesh(ranks, len(groups)), precision)
        report_left_out(accuracy, loader, config, ranks)
        if not math.isfinite(accuracy.loss):
            raise UserError(f"the loss of {run_dirs[0]} is {accuracy.loss}; try --set train.precision=fp32")
        if ranks.is_first:
            _report(accuracy, runs, output)
        return accuracy


def _require_same_data(one: Restored, other: Restored) -> None:
    """Raises UserError if two runs read different data or preprocess, normalize or transform images differently."""
    for table, keys in (
        ("data", ("name", "classes", "image_size", "val_image_size", "resize_size", "interpolation", "mean", "std")),
        ("split", ("block", "transform", "norm")),
    ):
        for key in keys:
            a, b = (getattr(getattr(run.config, table), key) for run in (one, other))
            if a != b:
                raise UserError(
                    f"{other.run_dir}: {table}.{key}: {b!r}, but {one.run_dir} has {a!r}; runs are joined into one "
                    "ensemble only where they agree"
                )


def _report(accuracy: Accuracy, runs: Sequence[Restored], output: Path | None) -> None:
    for run in runs:
        print(f"{run.config.name}, step {run.step}, {run.run_dir}")
    without = f" ({accuracy.left_out} left out, which cannot be decoded)" * bool(accuracy.left_out)
    print(f"{accuracy.val_images} images{without}: loss {accuracy.loss:.4f}")
    print(f"{'ensemble':>24}  top-1 {accuracy.top1:6.2f} %  top-5 {accuracy.top5:6.2f} %")
    groups = [group for run in runs for group in run.config.split.groups]
    for group, top1, top5 in zip(groups, accuracy.branch_top1, accuracy.branch_top5, strict=True):
        bands = f"band{'s' * (len(group) > 1)} {', '.join(map(str, group[:6]))}{' …' * (len(group) > 6)}"
        print(f"{bands:>24}  top-1 {top1:6.2f} %  top-5 {top5:6.2f} %")
    if output is not None:
        steps = runs[0].step if len(runs) == 1 else [run.step for run in runs]
        replace_text(output, json.dumps({"step": steps, **accuracy.as_dict()}, indent=2) + "\n")
