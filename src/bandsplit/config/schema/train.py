"""[train], [parallel], [validation] and [checkpoint]."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
)

from bandsplit.config.schema.base import Table, count_or


class Train(Table):
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    """Images per optimizer step, over all ranks."""
    grad_accum_steps: int = Field(1, ge=1)
    """Parts of a rank's share of the batch, one after the other, to save memory."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 autocast on a GPU, fp32 on a CPU; `tf32`: fp32 with TF32 products on a GPU; `fp16`: autocast with
    loss scaling."""
    clip_norm: float | None = Field(None, gt=0)
    """Norm to which a branch's gradients are clipped; unset: not clipped."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay per step of an EMA of the weights, which is then validated, and saved beside them; unset: no EMA."""
    log_every: int = Field(50, ge=1)
    """Steps between lines of metrics.jsonl."""
    on_nonfinite: Literal["stop", "skip", "lower_lr"] = "stop"
    """What to do about gradients of a branch that are infinite or not a number, which never reach its weights. `stop`:
    end the run, also for such a loss; the last good checkpoint stays. `skip`: leave the step out. `lower_lr`: leave it
    out and halve this branch's learning rate from there on; it alone waits for the device in every step."""


class Parallel(Table):
    """How branches and images are spread over ranks."""

    branch_groups: Annotated[Literal["auto"] | int, count_or("parallel.branch_groups", "auto")] = "auto"
    """Groups of branches that are trained by different ranks; 1: every rank trains all branches (data parallelism);
    "auto": the number that sends the fewest bytes per step."""
    timeout_seconds: int = Field(300, ge=5)
    """Time that ranks wait for each other; then the run ends and names the rank that hangs."""


class Validation(Table):
    every: int = Field(1, ge=1)
    """Epochs between validations; the last epoch is always validated."""
    batch_size: int | None = Field(None, ge=1)
    """Images per rank at once; unset: as in training."""


class Checkpoint(Table):
    every_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints, in addition to those at the end of every epoch; unset: none."""
    every_minutes: float | None = Field(15.0, gt=0)
    """Age of the last checkpoint at which another one is written; unset: at no age."""
    keep: int = Field(2, ge=1)
    """Checkpoints to keep in addition to the best; with 2 there is another if the last is damaged."""
