"""[train], [parallel], [validation], [checkpoint] and [log]."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
)

from bandsplit.config.schema.base import Table, count_or, is_list, mistake


def _parts(value: object) -> object:
    if is_list(value) and all(isinstance(part, str) and part for part in value):
        return tuple(value)
    raise mistake("train.freeze", value, 'a list of names, such as ["conv1", "bn1", "layer1"]')


class Train(Table):
    epochs: int = Field(ge=1)
    """Passes over the training images."""
    batch_size: int = Field(ge=1)
    """Images per optimizer step, over all ranks."""
    grad_accum_steps: Annotated[Literal["auto"] | int, count_or("train.grad_accum_steps", "auto")] = 1
    """Forward and backward passes per optimizer step, each on a part of the rank's images, to save memory. "auto": the
    smallest number whose parts fit, found when a run starts and kept in its config."""
    activation_checkpointing: bool = False
    """Whether each residual block, or stage, of a network keeps only its input and is computed again in the backward
    pass: 0.4 of ResNet-34's activations, for one more forward pass; results are the same, bit for bit on a CPU."""
    cuda_graphs: bool = True
    """GPU: whether a branch's step is captured as a CUDA graph and replayed, so that it does not wait for the host. Not
    done where several ranks train a branch, with `activation_checkpointing`, `on_nonfinite = "lower_lr"`, RMSprop, LAMB
    or a schedule of the momentum."""
    branches_at_once: int = Field(4, ge=1)
    """GPU: CUDA graphs that are replayed at the same time, each with memory of its own; 1: branches take turns, as
    those with dropout always do."""
    compile: bool = False
    """Whether torch.compile generates the code of a training step; takes a minute or more at the start. Branches of the
    same kind are compiled once. Validation runs the networks as they are."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 autocast on a GPU, fp32 on a CPU; `tf32`: fp32 with TF32 arithmetic on a GPU; `fp16`: autocast with
    loss scaling."""
    clip_norm: float | None = Field(None, gt=0)
    """Norm to which a branch's gradients are clipped; unset: no clipping."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay per step of the EMA of the weights. The EMA is validated, and saved with the weights. Unset: no EMA."""
    early_stop_patience: int | None = Field(None, ge=1)
    """Validations in a row that have not lowered a branch's loss on held-out images (`data.holdout`), after which it
    trains no more; the others go on. Unset: all branches train to the end."""
    freeze: Annotated[tuple[str, ...], BeforeValidator(_parts)] = ()
    """Parts of every branch that are not trained, such as ["conv1", "bn1", "layer1"]: modules or parameters, by name.
    They run as in validation, so batch norm in them keeps its statistics. Empty: everything is trained."""
    start_epochs: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)] = ()
    """Epochs before each branch begins to train, one number a branch, such as [0, 0, 10, 20]: from low bands to all.
    Empty: all begin at once."""
    log_every: int = Field(50, ge=1)
    """Steps between lines of metrics.jsonl."""
    profile: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False)] = ()
    """First and last step that torch.profiler records on rank 0, such as [20, 25]: a trace in the run directory, and a
    table in the log. Empty: none."""
    on_nonfinite: Literal["stop", "skip", "lower_lr"] = "stop"
    """What to do when gradients of a branch are inf or NaN; they never reach its weights. `stop`: end the run, also for
    such a loss; the last good checkpoint stays. `skip`: skip the step. `lower_lr`: skip it and halve this branch's
    learning rate from then on; only with this policy does the host wait for the device in every step."""


class Parallel(Table):
    """How branches and images are distributed over ranks."""

    branch_groups: Annotated[Literal["auto"] | int, count_or("parallel.branch_groups", "auto")] = "auto"
    """Number of groups of branches, each trained by different ranks; 1: every rank trains all branches (data
    parallelism); "auto": the number that sends the fewest bytes per step."""
    timeout_seconds: int = Field(300, ge=5)
    """Time that ranks wait for each other; after that the run ends and names the hanging rank."""


class Validation(Table):
    every: int = Field(1, ge=1)
    """Epochs between validations; the last epoch is always validated."""
    batch_size: int | None = Field(None, ge=1)
    """Images per rank and batch; unset: as in training."""


class Checkpoint(Table):
    every_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints, in addition to those at the end of every epoch; unset: none."""
    every_minutes: float | None = Field(15.0, gt=0)
    """Age of the last checkpoint at which another one is written; unset: no checkpoints by time."""
    keep: int = Field(2, ge=1)
    """Checkpoints to keep in addition to the best; with 2, there is a fallback if the last one is damaged."""


class Log(Table):
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], Field(strict=False)] = ()
    """Who follows metrics.jsonl while the run goes on, each in a process of its own: "tensorboard" writes events into
    the run directory, "wandb" sends to Weights & Biases, or with WANDB_MODE=offline keeps them for `wandb sync`."""
