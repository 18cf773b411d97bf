"""Optimizers against torch's and timm's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bandsplit.config import loading
from bandsplit.training import optimizers
from bandsplit.training.learner import Learner
from tests.training.tiny import ALONE, FP32, batch, network

OPTIMIZERS: dict[str, tuple[list[str], Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": ([], lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1)),
    "nesterov": (
        ["optim.nesterov=true", "optim.momentum=0.8"],
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.1),
    ),
    "adam": (
        ["optim.type=adam", "optim.betas=[0.8, 0.9]"],
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.9), weight_decay=0.1),
    ),
    "adamw": (["optim.type=adamw"], lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1)),
    "rmsprop": (
        ["optim.type=rmsprop", "optim.centered=true"],
        lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.9, momentum=0.9, centered=True, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_are_torchs(config_file: Path, name: str) -> None:
    keys, make = OPTIMIZERS[name]
    config = loading.load(config_file, [*keys, "optim.lr=0.1", "optim.weight_decay=0.1"])
    ours, theirs = network(), network()
    learner, optimizer = Learner(ours, config, FP32, ALONE), make(theirs.parameters())
    for n in range(4):
        x, y = batch(n)
        learner.step([x], [y], lr=0.1)
        optimizer.zero_grad()
        nn.functional.cross_entropy(theirs(x), y).backward()
        optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_lamb_is_timms(config_file: Path) -> None:
    timm_optim = pytest.importorskip("timm.optim")
    config = loading.load(config_file, ["optim.type=lamb", "optim.lr=0.01", "optim.weight_decay=0.02"])
    optimizer = optimizers.optimizer(network(), config)
    assert isinstance(optimizer, timm_optim.Lamb)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.01, 0.02)


@pytest.mark.parametrize("decay", [True, False])
def test_norms_and_biases_are_decayed_only_where_asked(config_file: Path, decay: bool) -> None:
    """If the loss does not depend on parameters, only decay changes them."""
    keys = [f"optim.decay_norm_and_bias={str(decay).lower()}", "optim.weight_decay=0.5", "optim.momentum=0"]
    ours = network()
    optimizer = optimizers.optimizer(ours, loading.load(config_file, keys))
    with torch.no_grad():
        for p in ours.parameters():
            p.fill_(1.0).grad = torch.zeros_like(p)
    optimizer.step()
    for p in ours.parameters():
        moved = bool((p != 1).all())
        assert moved == (decay or p.ndim > 1)


def test_one_cycle_moves_the_momentum_of_every_optimizer(config_file: Path) -> None:
    for kind, read in (("sgd", lambda g: g["momentum"]), ("adam", lambda g: g["betas"][0])):
        config = loading.load(config_file, [f"optim.type={kind}"])
        learner = Learner(network(), config, FP32, ALONE)
        learner.step([batch()[0]], [batch()[1]], lr=0.1, momentum=0.7)
        assert [read(group) for group in learner.optimizer.param_groups] == [0.7]


def test_a_first_step_that_loss_scaling_skips_leaves_no_momentum(config_file: Path) -> None:
    """In fp16 the initial scale is so high that this usually happens."""
    ours = network()
    optimizer = optimizers.optimizer(ours, loading.load(config_file))
    scaler = torch.amp.GradScaler("cpu")
    before = [p.detach().clone() for p in ours.parameters()]
    for p in ours.parameters():
        p.grad = torch.full_like(p, float("inf"))
    scaler.scale(torch.zeros(()))  # it must have been used
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), before, strict=True))
    assert all(not optimizer.state[p]["momentum_buffer"].any() for p in ours.parameters())
