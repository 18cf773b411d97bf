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
    """Images an optimizer step, over all ranks."""
    grad_accum_steps: int = Field(1, ge=1)
    """Parts into which a rank's share of the batch is cut to save memory."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 autocast on a GPU, fp32 on a CPU; `tf32`: fp32 with the GPU's shorter products; `fp16` scales the
    loss."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of a branch's gradients; unset: not clipped."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Validate and keep a running mean of the weights as well, which forgets at this rate a step; unset: none."""
    log_every: int = Field(50, ge=1)
    """Steps between lines of metrics.jsonl."""
    on_nonfinite: Literal["stop", "skip", "lower_lr"] = "stop"
    """What a branch does about a loss (`stop`) or a gradient (the others) that is infinite or not a number: end the run
    with the last good checkpoint; leave the step out; leave it out and halve this branch's learning rate from there
    on. `lower_lr` waits for the device in every step."""


class Parallel(Table):
    """How branches and images are spread over ranks."""

    branch_groups: Annotated[Literal["auto"] | int, count_or("parallel.branch_groups", "auto")] = "auto"
    """Groups of branches that different ranks train; 1: every rank trains all of them (plain data parallelism).
    "auto": the number that sends the fewest bytes."""
    timeout_seconds: int = Field(300, ge=5)
    """How long ranks wait for each other before the ones that hang are named and the run ends."""


class Validation(Table):
    every: int = Field(1, ge=1)
    """Epochs between validations; the last epoch is always validated."""
    batch_size: int | None = Field(None, ge=1)
    """Images a rank at once; unset: as in training."""


class Checkpoint(Table):
    every_steps: int | None = Field(None, ge=1)
    """Also write a checkpoint every so many steps; the end of an epoch always writes one."""
    every_minutes: float | None = Field(15.0, gt=0)
    """Also write one when the last is so many minutes old."""
    keep: int = Field(2, ge=1)
    """Checkpoints to keep beside the best one; with 2 there is one to go back to if the last is damaged."""
