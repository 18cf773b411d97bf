"""Losses against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bandsplit.config import schema
from bandsplit.training import losses


def test_smoothing_takes_from_the_label_and_gives_to_all() -> None:
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    shares = torch.full((6, 4), 0.2 / 4)
    shares[range(6), labels] += 0.8
    for config in (schema.CrossEntropy(smoothing=0.2), schema.BinaryCrossEntropy(smoothing=0.2)):
        log_p = logits.log_softmax(-1) if config.type == "cross_entropy" else None
        wanted = (
            -(shares * log_p).sum(-1).mean()
            if log_p is not None
            else -(shares * logits.sigmoid().log() + (1 - shares) * (-logits).sigmoid().log()).mean()
        )
        torch.testing.assert_close(losses.loss(logits, labels, config), wanted)
        assert not torch.isclose(losses.loss(logits, labels, type(config)()), wanted)


def test_what_a_teacher_adds_to_the_loss() -> None:
    """Hinton's formula by hand; its gradient is T² times that of the cross-entropy in He et al."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=generator).requires_grad_()
    teacher_logits, labels = torch.randn(5, 7, generator=generator), torch.tensor([0, 1, 2, 3, 4])
    config = schema.Distillation(teacher="anywhere", temperature=3.0, weight=0.6, label_weight=0.4)
    label_loss = losses.loss(logits, labels, schema.CrossEntropy())
    p, q = (np.exp(x.detach().double().numpy() / 3) for x in (teacher_logits, logits))
    p, q = (x / x.sum(1, keepdims=True) for x in (p, q))
    wanted = 0.4 * label_loss.item() + 0.6 * 9 * (p * np.log(p / q)).sum(1).mean()
    loss = losses.distilled(logits, teacher_logits, label_loss, config)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    soft = nn.functional.cross_entropy(logits / 3, (teacher_logits / 3).softmax(1))
    (of_both,) = torch.autograd.grad(0.4 * label_loss + 0.6 * 9 * soft, logits)
    torch.testing.assert_close(gradient, of_both)


def test_soft_targets_of_binary_cross_entropy_are_not_rounded_to_16_bits() -> None:
    logits, shares = torch.randn(64, 10).bfloat16(), torch.rand(64, 10)
    config = schema.BinaryCrossEntropy(smoothing=0.1)
    wanted = losses.loss(logits.float(), shares, config)
    torch.testing.assert_close(losses.loss(logits, shares, config), wanted, rtol=1e-6, atol=0)


def test_the_threshold_of_binary_targets() -> None:
    """A mixed image belongs to all its classes above the threshold."""
    logits, shares = torch.randn(2, 3), torch.tensor([[0.3, 0.7, 0.0], [0.1, 0.0, 0.9]])
    config = schema.BinaryCrossEntropy(target_threshold=0.2)
    wanted = nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor([[1.0, 1, 0], [0, 0, 1]]))
    torch.testing.assert_close(losses.loss(logits, shares, config), wanted)
    assert not torch.isclose(losses.loss(logits, shares, schema.BinaryCrossEntropy()), wanted)
