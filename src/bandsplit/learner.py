"""What one branch does in a step, by itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from bandsplit import recipe
from bandsplit.parallel import Mesh
from bandsplit.recipe import Precision
from bandsplit.schema import RunConfig


class Learner:
    """One branch, its optimizer and its loss scale; independent of all others."""

    def __init__(self, branch: nn.Module, config: RunConfig, precision: Precision, mesh: Mesh) -> None:
        self.optimizer = recipe.optimizer(branch.parameters(), config.optim)
        self.lr_factor = 1.0
        """Below 1 where `train.on_nonfinite = "lower_lr"` has lowered the learning rate."""
        self._module, self._branch = branch, mesh.replicate(branch)
        self._precision = precision
        self._scaler = precision.scaler()
        self._on_nonfinite = config.train.on_nonfinite

    def step(self, inputs: Sequence[Tensor], labels: Sequence[Tensor], lr: float) -> Tensor | None:
        """One optimizer step over the parts of a batch, (B, channels, h, w) each; returns the mean loss, a scalar.

        Activations and gradients of this branch are gone when it returns.  None: gradients were not finite and
        nothing has changed, as `train.on_nonfinite` wants it.
        """
        buffers = [buffer.clone() for buffer in self._module.buffers()] if self._on_nonfinite != "stop" else []
        for group in self.optimizer.param_groups:
            group["lr"] = lr * self.lr_factor
        mean_loss = torch.zeros((), device=inputs[0].device)
        for i, (x, y) in enumerate(zip(inputs, labels, strict=True)):
            with self._reducing_gradients(i == len(inputs) - 1):
                with self._precision.autocast():
                    loss = cross_entropy(self._branch(x), y) / len(inputs)
                self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            mean_loss += loss.detach()
        left_out = self._on_nonfinite != "stop" and not self._gradients_are_finite()
        if left_out:
            for buffer, before in zip(self._module.buffers(), buffers, strict=True):
                buffer.copy_(before)
            if self._on_nonfinite == "lower_lr":
                self.lr_factor /= 2
        else:
            self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return None if left_out else mean_loss

    def _gradients_are_finite(self) -> bool:
        """The same on every rank, after gradients were averaged; waits for the device."""
        self._scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self._module.parameters() if p.grad is not None]
        return bool(torch.nn.utils.get_total_norm(gradients).isfinite())

    def _reducing_gradients(self, last: bool) -> AbstractContextManager[None]:
        """Gradients travel between ranks once a step: with the last part."""
        branch = self._branch
        return nullcontext() if last or not isinstance(branch, DistributedDataParallel) else branch.no_sync()

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "lr_factor": self.lr_factor,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self.lr_factor = state["lr_factor"]
