"""`train.compile`: the same steps as without, and one compilation for branches of the same kind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from bandsplit.config import loading
from bandsplit.errors import UserError
from bandsplit.training.learner import Learner
from tests.training.tiny import ALONE, FP32, batch, network

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")


@needs_compiler
@pytest.mark.slow
def test_steps_are_those_without_and_branches_share_the_code(config_file: Path) -> None:
    torch._dynamo.reset()
    counters.clear()
    learners = [
        Learner(network().double(), loading.load(config_file, [f"train.compile={value}"]), FP32, ALONE)
        for value in ("false", "true", "true")
    ]
    for n in range(3):
        x, y = batch(n)
        losses = [learner.step([x.double()[:4], x.double()[4:]], [y[:4], y[4:]], lr=0.1).loss for learner in learners]
        torch.testing.assert_close(losses[1:], losses[:1] * 2, rtol=0, atol=1e-12)
    plain, *others = [learner.state_dict()["network"] for learner in learners]
    for other in others:
        assert list(other) == list(plain)
        torch.testing.assert_close(other, plain, rtol=0, atol=1e-9)
    assert counters["stats"]["unique_graphs"] == 1


def test_not_with_activation_checkpointing(config_file: Path) -> None:
    with pytest.raises(UserError, match=r"train.compile: True given; allowed: false with train.activation_checkp"):
        loading.load(config_file, ["train.compile=true", "train.activation_checkpointing=true"])
