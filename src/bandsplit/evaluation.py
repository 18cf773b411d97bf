"""Exact validation: counts of correct pictures of the ensemble and of every branch, each picture once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bandsplit import parallel
from bandsplit.ensemble import Ensemble, fuse
from bandsplit.errors import UserError
from bandsplit.loader import Batch, Deliveries, ValidationLoader, open_data, share_of
from bandsplit.parallel import Mesh
from bandsplit.recipe import Precision
from bandsplit.runlog import replace_text
from bandsplit.trained import Trained


@dataclass(frozen=True)
class Accuracy:
    """Percentages over all pictures of the validation set; `loss` is the mean cross-entropy of the fused logits."""

    pictures: int
    loss: float
    top1: float
    top5: float
    branch_top1: list[float]
    branch_top5: list[float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (..., B, classes) and labels (B,) -> (..., 2): pictures right within the first and the first five."""
    top = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels[:, None]
    return torch.stack([top[..., 0].sum(-1), top.any(-1).sum(-1)], dim=-1)


@torch.inference_mode()
def evaluate(ensemble: Ensemble, batches: Iterable[Batch], pictures: int, mesh: Mesh, precision: Precision) -> Accuracy:
    """Accuracy over the batches of all ranks, which together have to be `pictures` pictures.

    `ensemble` holds this rank's branches; every rank has equally many batches of equal size.  Counts and the sum of
    losses stay on the device until one reduction at the end.
    """
    ensemble.eval()
    device, deliveries = mesh.ranks.device, Deliveries(batches, mesh)
    counts = torch.zeros(1 + mesh.branches, 2, dtype=torch.int64, device=device)
    seen = torch.zeros(1, dtype=torch.int64, device=device)
    loss = torch.zeros(1, dtype=torch.float64, device=device)
    for batch in deliveries:
        with precision.autocast():
            own = ensemble(batch.inputs)
        logits, labels = deliveries.of_own_pictures(own, batch.labels)
        fused = fuse(logits)
        counts += count_correct(torch.cat([fused[None], logits]), labels)
        loss += cross_entropy(fused.double(), labels, reduction="sum", ignore_index=-1)
        seen += (labels >= 0).sum()
    totals = mesh.ranks.sum(torch.cat([counts.flatten().double(), seen.double(), loss]))
    *correct, total, loss_sum = totals.tolist()
    assert total == pictures, f"validated {total:.0f} pictures of {pictures}"
    percent = [100 * c / pictures for c in correct]
    return Accuracy(pictures, loss_sum / pictures, percent[0], percent[1], percent[2::2], percent[3::2])


def evaluate_runs(
    run_dirs: Sequence[Path], which: str, overrides: Sequence[str] = (), output: Path | None = None
) -> Accuracy:
    """Validates the branches of one or several runs at a checkpoint ("best", "last" or a step) as one ensemble.

    Prints the accuracy and writes it as JSON. Pictures come from where the first run's config says, or `overrides`.
    Raises UserError where there is no such run or checkpoint, or where the runs saw different data or bands.
    """
    with parallel.ranks() as ranks:
        runs = ranks.each(lambda: [Trained.of(run_dir, which, overrides) for run_dir in run_dirs])
        for run in runs[1:]:
            _require_same_data(runs[0], run)
        config = runs[0].config
        groups = tuple(group for run in runs for group in run.config.split.groups)
        joined = config.split.model_copy(update={"branches": groups, "only": None})
        config = config.model_copy(update={"split": joined})
        precision = Precision(config.train.precision, ranks.device)
        precision.apply()
        ensemble = Ensemble(branch for run in runs for branch in run.ensemble.branches)
        ensemble = ensemble.to(ranks.device).to(memory_format=torch.channels_last)
        _, pictures = open_data(config, ranks)
        parts = ranks.world_size * config.train.accumulation  # need not divide: validation takes any number of ranks
        batch_size = config.validation.batch_size or max(1, config.train.batch_size // parts)
        loader = ValidationLoader(config, pictures, share_of(config, ranks, batch_size, precision.half_bands))
        accuracy = evaluate(ensemble, loader, len(pictures), Mesh(ranks, len(groups)), precision)
        if ranks.is_first:
            _report(accuracy, runs, output)
        return accuracy


def _require_same_data(one: Trained, other: Trained) -> None:
    """Branches of one ensemble see the same validation pictures, cut, normalised and transformed alike."""
    for table, keys in (
        ("data", ("name", "classes", "image_size", "val_image_size", "resize_size", "mean", "std")),
        ("split", ("block", "transform", "norm")),
    ):
        for key in keys:
            a, b = (getattr(getattr(run.config, table), key) for run in (one, other))
            if a != b:
                raise UserError(
                    f"{other.run_dir}: {table}.{key}: {b!r}, but {one.run_dir} has {a!r}; runs are joined into one "
                    "ensemble only where they agree"
                )


def _report(accuracy: Accuracy, runs: Sequence[Trained], output: Path | None) -> None:
    for run in runs:
        print(f"{run.config.name}, step {run.step}, {run.run_dir}")
    print(f"{accuracy.pictures} pictures: loss {accuracy.loss:.4f}")
    print(f"{'ensemble':>24}  top-1 {accuracy.top1:6.2f} %  top-5 {accuracy.top5:6.2f} %")
    groups = [group for run in runs for group in run.config.split.groups]
    for group, top1, top5 in zip(groups, accuracy.branch_top1, accuracy.branch_top5, strict=True):
        bands = f"band{'s' * (len(group) > 1)} {', '.join(map(str, group[:6]))}{' …' * (len(group) > 6)}"
        print(f"{bands:>24}  top-1 {top1:6.2f} %  top-5 {top5:6.2f} %")
    if output is not None:
        steps = runs[0].step if len(runs) == 1 else [run.step for run in runs]
        replace_text(output, json.dumps({"step": steps, **accuracy.as_dict()}, indent=2) + "\n")
