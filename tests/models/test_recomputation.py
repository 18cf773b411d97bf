"""Activation checkpointing changes neither gradients nor running statistics, and keeps less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bandsplit.config import loading, schema
from bandsplit.errors import UserError
from bandsplit.models import batch_norm, networks
from bandsplit.training.learner import learners_of
from tests.training.tiny import ALONE, FP32

CASES: dict[str, tuple[dict[str, Any], int]] = {
    "resnet18": ({"arch": "resnet18", "width": 0.25}, 32),
    "resnet50 with drop path": ({"arch": "resnet50", "width": 0.25, "drop_path": 0.5, "tweaks": ["b", "c", "d"]}, 32),
    "vgg16_bn": ({"arch": "vgg16_bn"}, 32),
    "mobilenet_v3_small": ({"arch": "mobilenet_v3_small"}, 32),
}


def step(keys: dict[str, Any], size: int, recompute: bool, ghost: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients and buffers after two steps in float64, and the next random number."""
    torch.manual_seed(0)
    network = networks.build(schema.Model(**keys), 3, 5, size).double()
    if recompute:
        networks.recompute(network)
    if ghost:
        batch_norm.fit(network, images=2, at_once=4, mesh=ALONE)
    torch.manual_seed(1)  # the ghost norms draw random numbers where they are made
    for _ in range(2):
        x = torch.randn(4, 3, size, size, dtype=torch.float64)
        torch.nn.functional.cross_entropy(network(x), torch.arange(4)).backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(network.parameters()))
    return gradients | dict(network.named_buffers()), torch.rand(1)


@pytest.mark.parametrize("case", CASES)
def test_gradients_statistics_and_random_numbers_are_those_without(case: str) -> None:
    (plain, drawn), (ours, drawn_here) = (step(*CASES[case], recompute) for recompute in (False, True))
    assert plain.keys() == ours.keys()
    for name, x in plain.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-9, atol=1e-12)
        assert torch.equal(ours[name], x), name
    assert torch.equal(drawn, drawn_here)


def test_ghost_batch_norm_counts_each_batch_once() -> None:
    (plain, _), (ours, _) = (step(*CASES["resnet18"], recompute, ghost=True) for recompute in (False, True))
    assert all(torch.equal(ours[name], x) for name, x in plain.items())
    assert int(ours["bn1.num_batches_tracked"]) == 2


def test_learners_recompute_by_their_key(config_file: Path) -> None:
    """Bit-equal weights, statistics and EMA after three steps."""
    states = []
    for keys in ([], ["train.activation_checkpointing=true"]):
        config = loading.load(config_file, [*keys, "model.drop_path=0.3", "train.ema_decay=0.9", "split.only=[2]"])
        ensemble, (learner,) = learners_of(config, 12, FP32, ALONE)
        calls: list[int] = []
        block: nn.Module = ensemble.branches[0].layer2[0]  # type: ignore[index, assignment, union-attr]
        block.conv1.register_forward_hook(lambda *_, calls=calls: calls.append(1))  # type: ignore[union-attr]
        generator = torch.Generator().manual_seed(0)
        for n in range(3):
            torch.manual_seed(n)
            x = torch.randn(12, 3, 16, 16, generator=generator)
            learner.step([x], [torch.randint(0, 10, (12,), generator=generator)], lr=0.05)
        with torch.no_grad():
            ensemble.eval()([x])
        assert len(calls) == (7 if keys else 4)
        states.append(learner.state_dict())
    for name in ("network", "ema"):
        assert all(torch.equal(x, states[1][name][key]) for key, x in states[0][name].items())


@pytest.mark.parametrize("keys", [["model.arch=inception_v3"], ["model.source=timm"]])
def test_networks_that_cannot_recompute_say_so(config_file: Path, keys: list[str]) -> None:
    with pytest.raises(UserError, match=r"train.activation_checkpointing: True given; allowed: false with '"):
        loading.load(config_file, ["train.activation_checkpointing=true", "model.width=1", *keys])
