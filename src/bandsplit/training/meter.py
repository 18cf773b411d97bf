"""How far a run is, and what it measures of itself on the way."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from bandsplit.config.schema import RunConfig
from bandsplit.distributed.mesh import Mesh
from bandsplit.errors import UserError
from bandsplit.runs.metrics import Stopwatch
from bandsplit.training import schedules

_NEVER = torch.iinfo(torch.int64).max


@dataclass
class Progress:
    """How far a run is; part of every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    epoch: float = 0.0
    images: int = 0
    seconds: float = 0.0
    """Of training, validation and checkpoints not counted."""
    best_step: int = 0
    best_top1: float = -1.0
    validation: dict[str, Any] = field(default_factory=dict)
    """The last validation."""

    def advance(self, images: int, steps_per_epoch: int) -> None:
        self.step += 1
        self.epoch = self.step / steps_per_epoch
        self.images += images

    def note_validation(self, accuracy: dict[str, Any], seconds: float) -> None:
        """Keeps the accuracy of this step, also as the best where its top-1 is, unless its loss is not finite."""
        self.validation = {
            "step": self.step, "epoch": self.epoch, "seconds": round(seconds, 3), "images": self.images, **accuracy
        }  # fmt: skip
        if accuracy["top1"] > self.best_top1 and math.isfinite(accuracy["loss"]):
            self.best_step, self.best_top1 = self.step, accuracy["top1"]


class Meter:
    """Losses of all branches since the last line of metrics, on the device, and the speed."""

    def __init__(self, mesh: Mesh, numbers: Sequence[int]) -> None:
        self._numbers = numbers
        """Which branch of the whole ensemble each branch of this run is."""
        self._mesh, device = mesh, mesh.ranks.device
        self._sums = torch.zeros(2, mesh.branches, dtype=torch.float64, device=device)
        """Losses, and how many steps they are of."""
        self._nonfinite = torch.full((mesh.branches,), _NEVER, dtype=torch.int64, device=device)
        """First step of each branch with a loss that is not finite."""

    def start(self, progress: Progress) -> None:
        """Begins to measure the speed; on resuming, the losses go on from the checkpoint."""
        self._images, self._seconds, self._waited = progress.images, progress.seconds, 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the host's time inside as waiting; on a CPU that includes mixing and what a teacher computes."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def note(self, i: int, loss: Tensor | None, step: int, lr: float) -> None:
        """Loss of one of this rank's branches in a step; None: it was left out."""
        k = self._mesh.own[i]
        if loss is None:
            if self._mesh.replica == 0:
                logger.error(
                    f"branch {self._numbers[k]}: gradients of step {step} are not finite (learning rate {lr:.3g}); "
                    "the step was left out"
                )
            return
        self._sums[0, k] += loss
        self._sums[1, k] += 1
        self._nonfinite[k].clamp_(max=torch.where(loss.isfinite(), _NEVER, step))

    def require_finite(self, config: RunConfig, steps_per_epoch: int) -> None:
        """Raises UserError where a loss was not finite on any rank since the run began; waits for the device."""
        first = self._mesh.ranks.smallest(self._nonfinite.clone()).tolist()
        k = min(range(len(first)), key=first.__getitem__)
        if first[k] != _NEVER:
            lr = schedules.lr_at(first[k] - 1, steps_per_epoch, config)
            number = self._numbers[k]
            raise UserError(
                f"branch {number}: the loss of step {first[k]} is not finite (learning rate {lr:.3g}); the last good "
                "checkpoint is kept. A lower optim.lr or a longer schedule.warmup_epochs may help, "
                'or train.on_nonfinite = "skip" or "lower_lr"'
            )

    def line(self, progress: Progress, watch: Stopwatch) -> dict[str, Any]:
        """Values of a "train" line; waits for the device."""
        sums, counts = self._mesh.ranks.sum(self._sums).tolist()
        branch_loss = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
        known = [loss for loss in branch_loss if loss is not None]
        seconds = watch.seconds
        spent = seconds - self._seconds
        line = {
            "step": progress.step,
            "epoch": progress.epoch,
            "seconds": round(seconds, 3),
            "images": progress.images,
            "loss": sum(known) / len(known) if known else None,
            "branch_loss": branch_loss,
            "images_per_second": round((progress.images - self._images) / spent, 2),
            "data_wait": round(self._waited / spent, 4),
            "peak_memory_mib": round(_peak_memory_mib(self._mesh.ranks.device), 1),
        }
        self._sums.zero_()
        self._images, self._seconds, self._waited = progress.images, seconds, 0.0
        return line

    def state(self) -> Tensor:
        """Sums over all ranks."""
        return self._mesh.ranks.sum(self._sums.clone())

    def load(self, state: Tensor) -> None:
        if self._mesh.ranks.is_first:  # the others go on from nothing: only sums over ranks count
            self._sums.copy_(state)


def _peak_memory_mib(device: torch.device) -> float:
    """Of this rank: on a GPU the tensors' memory, on a CPU the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
