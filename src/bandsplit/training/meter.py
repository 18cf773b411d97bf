"""Progress of a run, and what it measures of itself: losses, speed, and whether numbers are finite."""

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
from bandsplit.training.learner import Learner, Outcome

_NEVER = torch.iinfo(torch.int64).max


@dataclass
class Progress:
    """Part of every checkpoint."""

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

    def __init__(self, mesh: Mesh, config: RunConfig) -> None:
        self._mesh, self._config, device = mesh, config, mesh.ranks.device
        self._numbers = config.split.numbers
        """Which branch of the whole ensemble each branch of this run is."""
        self._sums = torch.zeros(3, mesh.branches, dtype=torch.float64, device=device)
        """Losses, steps that they are of, and steps that were left out."""
        self._nonfinite = torch.full((2, mesh.branches), _NEVER, dtype=torch.int64, device=device)
        """First step with a loss, and with a gradient, that is not finite, where that ends the run."""

    def start(self, progress: Progress) -> None:
        """Starts to measure the speed."""
        self._images, self._seconds, self._waited = progress.images, progress.seconds, 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the host's time inside as waiting; on a CPU that includes mixing and the teacher's forward pass."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def note(self, i: int, outcome: Outcome, step: int) -> None:
        """Outcome of a step of this rank's branch i; the host does not wait for it."""
        k, (loss, taken, failed) = self._mesh.own[i], outcome
        if self._config.train.on_nonfinite == "stop":
            self._sums[0, k] += loss
            self._sums[1, k] += 1
            for first, wrong in zip(self._nonfinite[:, k], (~loss.isfinite(), failed), strict=True):
                first.clamp_(max=torch.where(wrong, step, _NEVER))
        else:
            counts = taken & loss.isfinite()
            self._sums[0, k] += torch.where(counts, loss, 0)
            self._sums[1, k] += counts
            self._sums[2, k] += failed

    def require_finite(self, step: int, steps_per_epoch: int, learners: Sequence[Learner] = ()) -> None:
        """Raises UserError on every rank where numbers of a branch are not finite on any rank; waits for the device.

        Checks losses and gradients since the run began, with `train.on_nonfinite = "stop"`, and what a checkpoint of
        `learners` would hold: this rank's, after `step`, or none.
        """
        state = torch.full_like(self._nonfinite[:1], _NEVER)
        for i, learner in enumerate(learners):
            state[0, self._mesh.own[i]] = torch.where(learner.finite(), _NEVER, step)
        found = self._mesh.ranks.smallest(torch.cat([self._nonfinite, state])).tolist()
        first, row, k = min((first, row, k) for row, steps in enumerate(found) for k, first in enumerate(steps))
        if first == _NEVER:
            return
        what = ("the loss of", "the gradient of", "the state (weights, running statistics, optimizer) after")[row]
        lr = schedules.lr_at(first - 1, steps_per_epoch, self._config)
        skipping = ', or train.on_nonfinite = "skip" or "lower_lr"' if row < 2 else ""
        raise UserError(
            f"branch {self._numbers[k]}: {what} step {first} is not finite (learning rate {lr:.3g}); the last good "
            f"checkpoint is kept. A lower optim.lr or a longer schedule.warmup_epochs may help{skipping}"
        )

    def line(self, progress: Progress, watch: Stopwatch) -> dict[str, Any]:
        """Values of a "train" line, and an error in the log for steps that were left out; waits for the device."""
        sums, counts, left_out = self._mesh.ranks.sum(self._sums).tolist()
        if self._mesh.ranks.is_first:
            for k in filter(left_out.__getitem__, range(self._mesh.branches)):
                logger.error(self._left_out(k, left_out[k], counts[k], progress.step))
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

    def _left_out(self, k: int, left_out: float, taken: float, step: int) -> str:
        replicas = self._mesh.replicas
        lowered = ", and each halved the learning rate" * (self._config.train.on_nonfinite == "lower_lr")
        return (
            f"branch {self._numbers[k]}: {left_out / replicas:.0f} of {(left_out + taken) / replicas:.0f} steps up to "
            f"step {step} were left out, since their gradients were not finite{lowered}"
        )

    def state(self) -> Tensor:
        """Sums over all ranks."""
        return self._mesh.ranks.sum(self._sums.clone())

    def load(self, state: Tensor) -> None:
        if self._mesh.ranks.is_first:  # the others start from zero: only sums over ranks matter
            self._sums.copy_(state)


def _peak_memory_mib(device: torch.device) -> float:
    """Of this rank: on a GPU the tensors' memory, on a CPU the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
