"""Branches are independent of each other, and the fusion is the mean of their logits."""

from __future__ import annotations

from pathlib import Path

import torch

from bandsplit.config import loading
from bandsplit.models.ensemble import Ensemble, fuse


def test_each_branch_sees_only_its_input(config_file: Path) -> None:
    ensemble = Ensemble.of(loading.load(config_file, ["split.branches=[[0], [0, 1], [0, 2, 3]]"])).eval()
    inputs = [torch.randn(2, 3 * n, 16, 16, requires_grad=True) for n in (1, 2, 3)]
    logits = ensemble(inputs)
    assert logits.shape == (3, 2, 10)
    logits[1].sum().backward()
    assert [x.grad is not None and bool(x.grad.any()) for x in inputs] == [False, True, False]


def test_weights_come_from_seed_and_branch_alone(config_file: Path) -> None:
    four = Ensemble.of(loading.load(config_file)).state_dict()
    torch.manual_seed(99)
    two = Ensemble.of(loading.load(config_file, ["split.branches=[[0], [1]]"])).state_dict()
    other = Ensemble.of(loading.load(config_file, ["seed=1"])).state_dict()
    for k in (0, 1):
        name = f"branches.{k}.conv1.weight"
        assert torch.equal(four[name], two[name])
        assert not torch.equal(four[name], other[name])
    assert not torch.equal(four["branches.0.conv1.weight"], four["branches.1.conv1.weight"])


def test_building_leaves_torchs_random_state_alone(config_file: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Ensemble.of(loading.load(config_file))
    assert torch.equal(torch.rand(3), expected)


def test_fusion_is_the_mean() -> None:
    logits = torch.tensor([[[1.0, 2.0]], [[3.0, -2.0]]])
    assert torch.equal(fuse(logits), torch.tensor([[2.0, 0.0]]))
