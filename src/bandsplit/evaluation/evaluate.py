"""Exact validation: counts of correct predictions of the ensemble and every branch, each image once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from bandsplit.config.schema import RunConfig
from bandsplit.data.feed import BatchFeed
from bandsplit.data.loader import LEFT_OUT, Batch
from bandsplit.data.recovery import too_many
from bandsplit.data.source import AnyValidationLoader
from bandsplit.distributed.mesh import Mesh
from bandsplit.distributed.ranks import Ranks
from bandsplit.evaluation.measures import Sums, count_correct, sum_of_losses
from bandsplit.models.ensemble import Ensemble, fuse
from bandsplit.models.precision import Precision
from bandsplit.progress import followed

Batches = AnyValidationLoader | Sequence[Batch]


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


@torch.inference_mode()
def outputs(
    ensemble: Ensemble, batches: Batches, mesh: Mesh, precision: Precision, what: str = "validating"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (branches, B, classes), float32, and labels (B,) of each batch: all branches, the images of this rank.

    `ensemble` holds this rank's branches. Every rank must have the same number of batches of equal size. `what` names
    the work in the progress that rank 0 shows.
    """
    ensemble.eval()
    feed = BatchFeed(batches, mesh)
    for batch in followed(feed, what, len(batches), "batches", mesh.ranks.is_first):
        with precision.autocast():
            own = ensemble(batch.inputs)
        yield feed.of_own_images(own, batch.labels)


@torch.inference_mode()
def evaluate(
    ensemble: Ensemble,
    batches: Batches,
    images: int,
    mesh: Mesh,
    precision: Precision,
    among: Sequence[int] | None = None,
) -> Accuracy:
    """Accuracy over the batches of all ranks, `images` images in total, of which some may be left out.

    `ensemble` holds this rank's branches. Every rank must have the same number of batches of equal size, with the
    labels of `ValidationLoader`. `among`: the branches of the run that are fused; None: all. Counts and the sum of
    losses stay on the device until one reduction at the end.
    """
    sums = Sums()
    for logits, labels in outputs(ensemble, batches, mesh, precision):
        fused = fuse(logits if among is None else logits[list(among)])
        sums.add(
            **seen(labels),
            correct=count_correct(torch.cat([fused[None], logits]), labels),
            loss=sum_of_losses(fused, labels),
        )
    total = sums.over(mesh.ranks)
    counted = count_of(total, images)
    (top1, top5), *branches = [[100 * count / counted for count in counts] for counts in total["correct"]]
    branch_top1, branch_top5 = ([branch[i] for branch in branches] for i in (0, 1))
    loss = total["loss"] / counted
    return Accuracy(counted, loss, top1, top5, branch_top1, branch_top5, images - counted)


def seen(labels: Tensor) -> dict[str, Tensor]:
    """Numbers of images of a batch that count, and that are left out."""
    return {"counted": (labels >= 0).sum(), "left_out": (labels == LEFT_OUT).sum()}


def count_of(total: Mapping[str, Any], images: int) -> int:
    """How many of the images count; they and those that are left out must be all."""
    found = total["counted"] + total["left_out"]
    assert found == images, f"validated {found:.0f} images of {images}"
    return int(total["counted"])


def report_left_out(
    left_out: int, loader: AnyValidationLoader, config: RunConfig, ranks: Ranks, what: str = "validation"
) -> None:
    """Names the images that a validation has left out; every rank calls it.

    Args:
        left_out: how many they are on all ranks; not 0 if any rank has one.

    Raises TooManyBadImages on every rank where they are more than `data.max_bad`.
    """
    if not left_out:
        return
    bad = sorted({(each["file"], each["reason"]) for part in ranks.gather(loader.left_out) for each in part})
    if len(bad) > config.data.max_bad:
        raise too_many(bad, config.data.max_bad)
    if ranks.is_first:
        named = "".join(f"\n  {file}: {reason}" for file, reason in bad)
        logger.warning("{} {} images cannot be decoded and do not count:{}", len(bad), what, named)
