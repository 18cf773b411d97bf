"""Which branches take a step: those that have begun, and whose held-out loss still falls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from loguru import logger

from bandsplit.config.schema import RunConfig
from bandsplit.data.source import AnyValidationLoader
from bandsplit.distributed.mesh import Mesh
from bandsplit.evaluation.evaluate import count_of, outputs, seen
from bandsplit.evaluation.measures import Sums, sum_of_losses
from bandsplit.models.ensemble import Ensemble
from bandsplit.models.precision import Precision


class ActiveBranches:
    """The branches of a run that train, the same on every rank.

    `train.start_epochs` says when each begins. With `train.early_stop_patience` a branch ends, and keeps its weights,
    when so many validations in a row have not lowered its loss on held-out images (Prechelt, *Early Stopping - But
    When?*, 1998).
    """

    def __init__(self, config: RunConfig, is_first: bool = True) -> None:
        """`is_first`: whether this rank logs."""
        self._config, self._is_first, count = config, is_first, len(config.split.numbers)
        starts = config.train.start_epochs
        self._starts = [starts[number] if starts else 0 for number in config.split.numbers]
        if is_first and min(self._starts) > 0:
            logger.info(f"no branch of this run trains before epoch {min(self._starts)} (train.start_epochs)")
        self._lowest = [math.inf] * count
        """Held-out loss of each branch."""
        self._since = [0] * count
        """Validations since then."""
        self.losses: list[float] | None = None
        """Held-out losses of the last validation, if there was one."""
        self.stopped: list[int | None] = [None] * count
        """Step after which a branch has ended; None: it has not."""

    def train(self, k: int, epoch: int) -> bool:
        """Whether branch `k` of the run trains in epoch 0, 1, …"""
        return self.stopped[k] is None and epoch >= self._starts[k]

    def begun(self, epoch: int) -> list[int] | None:
        """Branches of the run that have begun in epoch 0, 1, …; None: all, or none yet."""
        begun = [k for k, start in enumerate(self._starts) if epoch >= start]
        return begun if 0 < len(begun) < len(self._starts) else None

    def count_begun(self, epoch: int) -> int:
        """How many branches of the run have begun in epoch 0, 1, …"""
        return sum(epoch >= start for start in self._starts)

    @property
    def all_stopped(self) -> bool:
        return None not in self.stopped

    def note(self, losses: Sequence[float], step: int, epoch: int) -> None:
        """Takes the held-out losses after a step, and ends the branches whose loss has not fallen for long."""
        self.losses = [*losses]
        for k, loss in enumerate(losses):
            if not self.train(k, epoch):
                continue
            if loss < self._lowest[k]:
                self._lowest[k], self._since[k] = loss, 0
            else:
                self._since[k] += 1
            if self._since[k] == self._config.train.early_stop_patience:
                self.stopped[k] = step
                if self._is_first:
                    logger.info(
                        f"branch {self._config.split.numbers[k]} trains no more after step {step}: its held-out loss "
                        f"has not fallen below {self._lowest[k]:.4f} in {self._since[k]} validations"
                    )

    @property
    def values(self) -> dict[str, Any]:
        """For the line of a validation."""
        if self.losses is None:
            return {}
        known = [loss if math.isfinite(loss) else None for loss in self.losses]
        return {"held_out_loss": known, "stopped_after": self.stopped}

    def state(self) -> dict[str, Any]:
        """For a checkpoint; nothing where no branch can end early."""
        if self._config.train.early_stop_patience is None:
            return {}
        return {"active": {"lowest": [*self._lowest], "since": [*self._since], "stopped": [*self.stopped]}}

    @staticmethod
    def ended(run: dict[str, Any]) -> bool:
        """Whether all branches have stopped in a checkpoint, with `state` among its contents `run`."""
        return "active" in run and None not in run["active"]["stopped"]

    def load(self, run: dict[str, Any]) -> None:
        """`run`: the contents of a checkpoint, with `state` among them."""
        if "active" in run:
            state = run["active"]
            self._lowest, self._since, self.stopped = state["lowest"], state["since"], state["stopped"]


@torch.inference_mode()
def held_out_losses(
    ensemble: Ensemble, batches: AnyValidationLoader, images: int, mesh: Mesh, precision: Precision
) -> list[float]:
    """Mean cross-entropy of every branch over `images` images; every rank must call it, as `evaluate`."""
    sums = Sums()
    for logits, labels in outputs(ensemble, batches, mesh, precision, "held-out images"):
        sums.add(**seen(labels), losses=torch.stack([sum_of_losses(branch, labels) for branch in logits]))
    total = sums.over(mesh.ranks)
    counted = count_of(total, images)
    return [loss / counted for loss in total["losses"]]
