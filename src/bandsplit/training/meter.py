"""Progress of a run and its measurements: losses, throughput, and checks for non-finite values."""

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
    """How far a run is; part of every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    epoch: float = 0.0
    images: int = 0
    seconds: float = 0.0
    """Wall-clock time of training, without validation and checkpoints."""
    best_step: int = 0
    best_top1: float = -1.0
    best_branches: int = 0
    """Branches that were fused for it; 0 in checkpoints of earlier versions."""
    validation: dict[str, Any] = field(default_factory=dict)
    """Values of the last validation."""

    def advance(self, images: int, steps_per_epoch: int) -> None:
        self.step += 1
        self.epoch = self.step / steps_per_epoch
        self.images += images

    def note_validation(self, accuracy: dict[str, Any], seconds: float, branches: int) -> None:
        """Records a validation of this step, and the step as the best if its top-1 is and its loss is finite.

        `branches`: how many have begun (`train.start_epochs`). With more of them, the best is chosen anew: the
        accuracy is that of another ensemble.
        """
        self.validation = {
            "step": self.step, "epoch": self.epoch, "seconds": round(seconds, 3), "images": self.images, **accuracy
        }  # fmt: skip
        better = (branches, accuracy["top1"]) > (self.best_branches or branches, self.best_top1)
        if better and math.isfinite(accuracy["loss"]):
            self.best_step, self.best_top1, self.best_branches = self.step, accuracy["top1"], branches


class Meter:
    """Losses of all branches, summed on the device since the last "train" line of metrics.jsonl, and throughput."""

    def __init__(self, mesh: Mesh, config: RunConfig) -> None:
        self._mesh, self._config, device = mesh, config, mesh.ranks.device
        self._numbers = config.split.numbers
        """Number of each branch of this run in the full ensemble (see `split.only`)."""
        self._sums = torch.zeros(3, mesh.branches, dtype=torch.float64, device=device)
        """(3, branches): sum of losses, number of steps summed, and number of skipped steps."""
        self._nonfinite = torch.full((2, mesh.branches), _NEVER, dtype=torch.int64, device=device)
        """(2, branches): first step with a non-finite loss, and first with a non-finite gradient; used with "stop"."""

    def start(self, progress: Progress) -> None:
        """Starts measuring throughput."""
        self._images, self._seconds, self._waited = progress.images, progress.seconds, 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts host time inside as data wait; on a CPU this includes mixup, CutMix and the teacher's forward pass."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def note(self, i: int, outcome: Outcome, step: int) -> None:
        """Adds the outcome of a step of this rank's branch `i`. Does not synchronize with the device."""
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
        """Raises UserError on every rank if a branch has non-finite values on any rank. Synchronizes with the device.

        With `train.on_nonfinite = "stop"`, checks all losses and gradients so far. Also checks the state of `learners`
        (all of this rank's, or none) after `step`, so that no checkpoint holds non-finite values.
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
        """Values of a "train" line of metrics.jsonl. Logs an error for skipped steps. Synchronizes with the device."""
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
        """The sums (3, branches) over all ranks, for a checkpoint; every rank must call it."""
        return self._mesh.ranks.sum(self._sums.clone())

    def load(self, state: Tensor) -> None:
        if self._mesh.ranks.is_first:  # only the sum over ranks matters, so the others start from zero
            self._sums.copy_(state)


def _peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this rank in MiB: that of torch's allocator on a GPU, resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**20  # "allocated" leaves out what CUDA graphs hold
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
