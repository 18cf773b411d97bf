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
    """Epochs in which the learning rate rises linearly to its peak, before the schedule begins."""


class Cosine(_Schedule):
    """Half a cosine from the peak to `lr_min`."""

    type: Literal["cosine"] = "cosine"
    lr_min: float = Field(0.0, ge=0)
    period_epochs: float | None = Field(None, gt=0)
    """Epochs from peak to `lr_min`; unset: all that there are."""
    after: Literal["bounce", "restart"] = "bounce"
    """After a period: back up along the cosine, as torch's CosineAnnealingLR does, or from the peak again."""


class Step(_Schedule):
    """Multiplied by `gamma` every so many epochs, or at given ones; epochs count from the beginning of the run."""

    type: Literal["step"] = "step"
    every_epochs: float | None = Field(None, gt=0)
    milestones: Annotated[tuple[float, ...], Field(strict=False)] = ()
    gamma: float = Field(0.1, gt=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> Step:
        if (self.every_epochs is None) == (not self.milestones):
            raise mistake("schedule.milestones", list(self.milestones), "either milestones or schedule.every_epochs")
        return self


class OneCycle(_Schedule):
    """Smith and Topin, Super-Convergence (2018): up and down once, momentum against it."""

    type: Literal["one_cycle"] = "one_cycle"
    peak_at: float = Field(0.3, gt=0, lt=1)
    """Share of all steps after which the peak is reached."""
    start_factor: float = Field(1 / 25, gt=0, le=1)
    """First learning rate, as a factor on the peak."""
    end_factor: float = Field(1e-4 / 25, ge=0, le=1)
    """Last learning rate, as a factor on the peak."""
    momentum: Annotated[tuple[Fraction, Fraction] | None, Field(strict=False)] = (0.85, 0.95)
    """Momentum (Adam's first beta) at the peak and at both ends; unset: as the optimizer has it."""


class Linear(_Schedule):
    """A line from the peak to `lr_min`."""

    type: Literal["linear"] = "linear"
    lr_min: float = Field(0.0, ge=0)


class Constant(_Schedule):
    type: Literal["constant"] = "constant"


Schedule = Annotated[Cosine | Step | OneCycle | Linear | Constant, Field(discriminator="type"), default_type("cosine")]
