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
    """Share of the target that is spread evenly over all classes."""


class BinaryCrossEntropy(Table):
    """Binary cross-entropy, mean over images and classes (Wightman et al., ResNet strikes back, 2021)."""

    type: Literal["bce"] = "bce"
    smoothing: Fraction = 0.0
    """Share of the target that is spread evenly over all classes."""
    target_threshold: float | None = Field(None, ge=0, lt=1)
    """Targets above it become 1, the others 0; unset: soft targets, as smoothing and mixing give them."""


Loss = Annotated[CrossEntropy | BinaryCrossEntropy, Field(discriminator="type"), default_type("cross_entropy")]


class Distillation(Table):
    """Every branch also learns from the fused logits of a trained run on the same images, mixed in the same way.

    Loss: label_weight · [loss] + weight · T² · KL(teacher ‖ branch) with softmax(logits / T) of both (Hinton, Vinyals
    and Dean, 2015).  The defaults are those of He et al., Bag of Tricks (CVPR 2019), section 5.3.
    """

    teacher: str = Field(min_length=1)
    """Run directory of the teacher, whose split may differ; `~` and `$VARIABLES` are expanded."""
    checkpoint: Annotated[Literal["best", "last"] | int, count_or("distillation.checkpoint", "best", "last")] = "best"
    """"best", "last" or a step number."""
    temperature: float = Field(20.0, gt=0)
    """T in the formula above."""
    weight: float = Field(1.0, gt=0)
    """Factor of the loss against the teacher."""
    label_weight: float = Field(1.0, ge=0)
    """Factor of the loss against the labels."""
    residual: bool = False
    """Instead of the formula: [loss] of the sum of the branch's and the teacher's logits, so that the branch learns
    what the teacher lacks (stagewise additive modeling: Friedman, Annals of Statistics 29, 2001). The prediction is
    that of both runs: `bandsplit evaluate TEACHER RUN`, with `--fit-fusion` unless both have one branch. Validations,
    and with them the best checkpoint, measure the branches alone; `train.early_stop_patience` must be unset."""


class Mix(Table):
    """Mixup and CutMix within a batch, on the bands, the same for all branches."""

    mixup: float = Field(0.0, ge=0)
    """α of Mixup's Beta distribution (Zhang et al., ICLR 2018); 0: off."""
    cutmix: float = Field(0.0, ge=0)
    """α of CutMix, with boxes of whole blocks (Yun et al., ICCV 2019); 0: off. With `mixup`: one at random."""
    probability: Fraction = 1.0
    """Probability that a batch is mixed."""
