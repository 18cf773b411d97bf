"""Training losses of a branch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, kl_div, log_softmax

from bandsplit.config import schema


def loss(logits: Tensor, target: Tensor, config: schema.Loss) -> Tensor:
    """Mean loss, a scalar. Logits (B, classes); target: class indices (B,) or class probabilities (B, classes)."""
    match config:
        case schema.CrossEntropy():
            return cross_entropy(logits, target, label_smoothing=config.smoothing)
        case schema.BinaryCrossEntropy():
            logits = logits.float()  # under autocast 16 bits, to which targets would be rounded
            if target.ndim == 1:  # on a CPU, one_hot reads the labels back to check their range
                target = torch.zeros_like(logits).scatter_(1, target[:, None], 1)
            shares = target.float() * (1 - config.smoothing) + config.smoothing / logits.shape[-1]
            if config.target_threshold is not None:
                shares = (shares > config.target_threshold).float()
            return binary_cross_entropy_with_logits(logits, shares)


def distilled(logits: Tensor, teacher_logits: Tensor, label_loss: Tensor, config: schema.Distillation) -> Tensor:
    """Distillation loss, a scalar: label_weight · label_loss + weight · T² · KL(teacher ‖ branch); logits (B, classes).

    Hinton, Vinyals and Dean (2015), section 2: T² keeps the size of the gradients independent of the temperature T.
    """
    own, teachers = (log_softmax(x.float() / config.temperature, dim=-1) for x in (logits, teacher_logits))
    divergence = kl_div(own, teachers, reduction="batchmean", log_target=True)
    return config.label_weight * label_loss + config.weight * config.temperature**2 * divergence
