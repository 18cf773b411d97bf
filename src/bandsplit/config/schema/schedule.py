"""[schedule]: learning-rate schedules."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    model_validator,
)

from bandsplit.config.schema.base import Fraction, Table, default_type, mistake


class _Schedule(Table):
    warmup_epochs: float = Field(0.0, ge=0)
    """Epochs of linear warm-up to the peak, before the schedule."""


class Cosine(_Schedule):
    """Half a cosine from the peak to `lr_min` (Loshchilov and Hutter, SGDR, 2017)."""

    type: Literal["cosine"] = "cosine"
    lr_min: float = Field(0.0, ge=0)
    """Lowest learning rate."""
    period_epochs: float | None = Field(None, gt=0)
    """Epochs from the peak to `lr_min`, at least one step; unset: all epochs after warm-up."""
    after: Literal["bounce", "restart"] = "bounce"
    """After a period: back up along the cosine, as in torch's CosineAnnealingLR, or restart from the peak."""


class Step(_Schedule):
    """Multiplies by `gamma` every `every_epochs`, or at `milestones`; epochs are counted from the start of the run."""

    type: Literal["step"] = "step"
    every_epochs: float | None = Field(None, gt=0)
    """Epochs between steps; unset: at `milestones`."""
    milestones: Annotated[tuple[float, ...], Field(strict=False)] = ()
    """Epochs of the steps, such as [30, 60, 90]; empty: every `every_epochs`."""
    gamma: float = Field(0.1, gt=0, lt=1)
    """Factor of the learning rate at a step."""

    @model_validator(mode="after")
    def _check(self) -> Step:
        if (self.every_epochs is None) == (not self.milestones):
            raise mistake("schedule.milestones", list(self.milestones), "either milestones or schedule.every_epochs")
        return self


class OneCycle(_Schedule):
    """Up to the peak and down again, with momentum cycled inversely (Smith and Topin, Super-Convergence, 2018)."""

    type: Literal["one_cycle"] = "one_cycle"
    peak_at: float = Field(0.3, gt=0, lt=1)
    """Position of the peak, as a fraction of the steps after warm-up."""
    start_factor: float = Field(1 / 25, gt=0, le=1)
    """First learning rate, as a fraction of the peak."""
    end_factor: float = Field(1e-4 / 25, ge=0, le=1)
    """Last learning rate, as a fraction of the peak."""
    momentum: Annotated[tuple[Fraction, Fraction] | None, Field(strict=False)] = (0.85, 0.95)
    """Momentum (Adam's first beta) at the peak and at both ends; unset: the optimizer's momentum."""


class Linear(_Schedule):
    """Linear from the peak to `lr_min`."""

    type: Literal["linear"] = "linear"
    lr_min: float = Field(0.0, ge=0)
    """Last learning rate."""


class Constant(_Schedule):
    type: Literal["constant"] = "constant"


Schedule = Annotated[Cosine | Step | OneCycle | Linear | Constant, Field(discriminator="type"), default_type("cosine")]
