"""[loss], [distillation] and [mix]."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
)

from bandsplit.config.schema.base import Fraction, Table, count_or, default_type


class CrossEntropy(Table):
    type: Literal["cross_entropy"] = "cross_entropy"
    smoothing: Fraction = 0.0


class BinaryCrossEntropy(Table):
    """Each class by itself (Wightman et al., ResNet strikes back, 2021), mean over images and classes."""

    type: Literal["bce"] = "bce"
    smoothing: Fraction = 0.0
    target_threshold: float | None = Field(None, ge=0, lt=1)
    """Targets above it count as 1, the others as 0; unset: as smoothing and mixing leave them."""


Loss = Annotated[CrossEntropy | BinaryCrossEntropy, Field(discriminator="type"), default_type("cross_entropy")]


class Distillation(Table):
    """Every branch also learns from the fused logits of a trained run, on the same images, mixed alike.

    Loss: label_weight · [loss] + weight · T² · KL(teacher ‖ branch) with softmax(logits / T) of both (Hinton, Vinyals
    and Dean, 2015).  The defaults are those of He et al., Bag of Tricks (CVPR 2019), section 5.3.
    """

    teacher: str = Field(min_length=1)
    """Run directory of the teacher, whose split may be another; `~` and `$VARIABLES` are expanded."""
    checkpoint: Annotated[Literal["best", "last"] | int, count_or("distillation.checkpoint", "best", "last")] = "best"
    """"best", "last" or the number of a step."""
    temperature: float = Field(20.0, gt=0)
    """T above."""
    weight: float = Field(1.0, gt=0)
    label_weight: float = Field(1.0, ge=0)


class Mix(Table):
    """Mixing of images and labels within a batch, on the bands; the same for all branches."""

    mixup: float = Field(0.0, ge=0)
    """α of the Beta distribution (Zhang et al., ICLR 2018); 0: off."""
    cutmix: float = Field(0.0, ge=0)
    """The same for boxes, whose sides are multiples of the block (Yun et al., ICCV 2019); both: one by chance."""
    probability: Fraction = 1.0
    """Share of batches that are mixed at all."""
