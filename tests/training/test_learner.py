"""What a branch does in a step: gradient clipping, the EMA, and gradients that are not finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bandsplit.config import loading
from bandsplit.training import optimizers
from bandsplit.training.learner import Learner
from tests.training.tiny import ALONE, FP32, batch, network


def test_gradients_are_clipped_to_their_norm(config_file: Path) -> None:
    norms = []
    for keys in ([], ["train.clip_norm=0.01"]):
        ours = network()
        config = loading.load(config_file, ["optim.momentum=0", "optim.weight_decay=0", *keys])
        before = [p.detach().clone() for p in ours.parameters()]
        Learner(ours, config, FP32, ALONE).step([batch()[0]], [batch()[1]], lr=1.0)
        moved = [a.detach() - b for a, b in zip(ours.parameters(), before, strict=True)]
        norms.append(float(torch.cat([m.flatten() for m in moved]).norm()))
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


def test_the_running_mean_of_weights_is_the_formulas(config_file: Path) -> None:
    config = loading.load(config_file, ["train.ema_decay=0.8"])
    ours = network()
    learner = Learner(ours, config, FP32, ALONE, optimizers.running_mean(ours, config))
    expected: list[Tensor] = []
    for n in range(5):
        learner.step([batch(n)[0]], [batch(n)[1]], lr=0.1)
        now = [t.detach().clone() for t in (*ours.parameters(), ours[1].running_mean, ours[1].running_var)]
        expected = now if not expected else [0.8 * e + 0.2 * t for e, t in zip(expected, now, strict=True)]
    mean = learner.validated
    for a, b in zip((*mean.parameters(), mean[1].running_mean, mean[1].running_var), expected, strict=True):
        torch.testing.assert_close(a, b)
    again = Learner(network(), config, FP32, ALONE, optimizers.running_mean(network(), config))
    again.load_state_dict(learner.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.validated.parameters(), mean.parameters(), strict=True))
    assert Learner(ours, loading.load(config_file), FP32, ALONE).validated is ours
