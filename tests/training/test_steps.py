"""What becomes a CUDA graph, and captures that fail, on a CPU; tests/gpu/test_steps.py has those that succeed."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from loguru import logger
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from bandsplit.config import loading
from bandsplit.data.loader import Batch
from bandsplit.models.ensemble import Ensemble
from bandsplit.models.precision import Precision
from bandsplit.training import capture, memory
from bandsplit.training.learner import Learner
from bandsplit.training.steps import Graphs, InTurn
from tests.compare import assert_equal
from tests.training.tiny import ALONE, batch, network

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Failing(Graphs):
    """Whose captures fail in the middle of a step, some of them without a message."""

    WARM_UP = 0
    captures = 0
    made: tuple[weakref.ref[Tensor], ...] = ()

    @property
    def living(self) -> int:
        """How many tensors of captures that failed still take memory."""
        return sum(each() is not None for each in self.made)

    def _capture(self, branches: Sequence[int], momentum: float | None) -> None:
        self.captures += 1
        self.made += tuple(weakref.ref(part.inputs[0]) for part in self._parts)
        (learner,) = self._learners

        def fail(*_: Any) -> None:
            self.made += tuple(weakref.ref(p.grad) for p in learner.optimizer.param_groups[0]["params"])
            raise RuntimeError("" if self.captures == 3 else "operation not permitted\nCUDA kernel errors")

        hook = learner.optimizer.register_step_pre_hook(fail)
        try:
            learner.step([part.inputs[0] for part in self._parts], [part.labels for part in self._parts], self._lr)
        finally:
            hook.remove()


def five_steps(take: InTurn, learner: Learner) -> list[Any]:
    """Losses, weights and loss scale."""
    losses = []
    for step in range(5):
        x, y = batch(step)
        losses.append(take([0], [Batch([x], y)], step, lr=0.1)[0].loss)
    assert take([], [Batch([x], y)], step, lr=0.1) == {}
    return [*losses, *learner.network.parameters(), learner.state_dict()["scaler"]]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_capture_that_fails_leaves_nothing_behind(config_file: Path, precision: str) -> None:
    """Steps go on as if it had not been tried, and its tensors are free before they do; the third failure is told."""
    config = loading.load(config_file, [f"train.precision={precision}"])
    plain, other = (Learner(network(), config, Precision(precision, CPU), ALONE) for _ in range(2))
    living: list[int] = []
    failing = Failing([other], lambda i, number: living.append(failing.living), CPU, streams=0)
    told: list[str] = []
    sink = logger.add(told.append, format="{message}", level="WARNING")
    assert_equal(five_steps(failing, other), five_steps(InTurn([plain], lambda i, number: None, CPU), plain))
    logger.remove(sink)
    assert living == [0] * 5
    assert failing.captures == Graphs.ATTEMPTS == 3
    assert told == ["steps are not captured as CUDA graphs, and take longer: RuntimeError\n"]


@pytest.mark.parametrize(
    "arch", ["resnet18", "resnet50", "alexnet", "vgg16_bn", "mobilenet_v2", "mobilenet_v3_small", "inception_v3"]
)
@pytest.mark.parametrize("rate", [None, 0, 0.1])
def test_branches_take_turns_where_one_draws_random_numbers(config_file: Path, arch: str, rate: float | None) -> None:
    key = "drop_path" if arch.startswith("resnet") else "dropout"
    keys = ["data.image_size=192", "data.resize_size=192", "model.width=1", f"model.arch={arch}"]
    config = loading.load(config_file, keys if rate is None else [*keys, f"model.{key}={rate}"]).with_classes(10)
    with torch.device("meta"):
        modules = [*Ensemble.of(config).modules()]
    draws = any(module.p > 0 for module in modules if isinstance(module, nn.Dropout | StochasticDepth))
    assert draws == (rate != 0 and (rate is not None or key == "dropout"))
    assert capture.overlapping(config, GPU, 1, 4) == (1 if draws else 4)


@pytest.mark.parametrize(
    ("keys", "device", "replicas", "copied"),
    [
        (["train.branches_at_once=1"], GPU, 1, 1),
        ([], GPU, 1, 1),
        ([], GPU, 2, 0),
        (["train.cuda_graphs=false"], GPU, 1, 0),
        ([], CPU, 1, 0),
    ],
)
def test_the_memory_of_bands_has_the_copy_that_graphs_read(
    config_file: Path, keys: list[str], device: torch.device, replicas: int, copied: int
) -> None:
    config, x = loading.load(config_file, ["data.prefetch=3", *keys]), torch.zeros(4, 3, 8, 8)
    taken = memory.bytes_of_bands([x], 1, config, device, replicas)
    assert taken == (1 + copied + 3) * x.nbytes
