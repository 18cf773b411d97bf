"""Losses of one branch."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, kl_div, log_softmax, one_hot

from bandsplit.config import schema


def loss(logits: Tensor, target: Tensor, config: schema.Loss) -> Tensor:
    """Mean loss, a scalar.  Logits (B, classes); target: classes (B,), or shares (B, classes) of mixed images."""
    match config:
        case schema.CrossEntropy():
            return cross_entropy(logits, target, label_smoothing=config.smoothing)
        case schema.BinaryCrossEntropy():
            classes = logits.shape[-1]
            shares = one_hot(target, classes) if target.ndim == 1 else target
            shares = shares.to(logits.dtype) * (1 - config.smoothing) + config.smoothing / classes
            if config.target_threshold is not None:
                shares = (shares > config.target_threshold).to(logits.dtype)
            return binary_cross_entropy_with_logits(logits, shares)


def distilled(logits: Tensor, teacher_logits: Tensor, label_loss: Tensor, config: schema.Distillation) -> Tensor:
    """The loss of the labels, a scalar, with what a teacher's logits add to it; both logits (B, classes).

    Hinton, Vinyals and Dean (2015), section 2: T² keeps the gradients' size whatever the temperature T is.
    """
    own, teachers = (log_softmax(x.float() / config.temperature, dim=-1) for x in (logits, teacher_logits))
    divergence = kl_div(own, teachers, reduction="batchmean", log_target=True)
    return config.label_weight * label_loss + config.weight * config.temperature**2 * divergence
