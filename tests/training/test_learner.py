"""The step of a branch: gradient clipping, the EMA, and steps whose gradients are not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bandsplit.config import loading
from bandsplit.models.precision import Precision
from bandsplit.training import optimizers
from bandsplit.training.learner import Learner
from bandsplit.training.meter import Meter
from tests.compare import assert_equal
from tests.training.tiny import ALONE, FP32, batch, network

OPTIMIZERS = {
    "sgd": ["optim.momentum=0.9"],
    "nesterov": ["optim.momentum=0.9", "optim.nesterov=true"],
    "plain": ["optim.momentum=0"],
    "adam": ["optim.type=adam"],
    "adamw": ["optim.type=adamw"],
    "rmsprop": ["optim.type=rmsprop"],
    "centered": ["optim.type=rmsprop", "optim.centered=true", "optim.momentum=0"],
    "lamb": ["optim.type=lamb"],
}
COMMON = ["optim.lr=0.1", "optim.weight_decay=0.1"]


def test_a_residual_branch_learns_on_top_of_the_teachers_logits(config_file: Path) -> None:
    config = loading.load(config_file, [*COMMON, "distillation.teacher=run", "distillation.residual=true"])
    branch, alone = network(), network()
    (x, y), teacher_logits = batch(), torch.randn(8, 5)
    Learner(branch, config, FP32, ALONE).step([x], [y], lr=0.1, teacher_logits=[teacher_logits])
    optimizer = optimizers.optimizer(alone, config)
    nn.functional.cross_entropy(alone(x) + teacher_logits, y).backward()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    for a, b in zip(branch.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b)


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


def test_the_ema_of_weights_follows_its_formula(config_file: Path) -> None:
    config = loading.load(config_file, ["train.ema_decay=0.8"])
    ours = network()
    learner = Learner(ours, config, FP32, ALONE, optimizers.make_ema(ours, config))
    expected: list[Tensor] = []
    for n in range(5):
        learner.step([batch(n)[0]], [batch(n)[1]], lr=0.1)
        now = [t.detach().clone() for t in (*ours.parameters(), ours[1].running_mean, ours[1].running_var)]
        expected = now if not expected else [0.8 * e + 0.2 * t for e, t in zip(expected, now, strict=True)]
    mean = learner.validated
    for a, b in zip((*mean.parameters(), mean[1].running_mean, mean[1].running_var), expected, strict=True):
        torch.testing.assert_close(a, b)
    again = Learner(network(), config, FP32, ALONE, optimizers.make_ema(network(), config))
    again.load_state_dict(learner.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.validated.parameters(), mean.parameters(), strict=True))
    assert Learner(ours, loading.load(config_file), FP32, ALONE).validated is ours


class Trap(nn.Module):
    """A network whose gradients, but not its loss, are infinite if `armed`."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.armed = network(), False

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        if self.armed:
            weight: Any = self.network[4].weight
            logits = logits + (weight - weight.detach()).sum().sqrt()  # 0, with an infinite slope
        return logits


def trained(config_file: Path, keys: list[str], armed: list[bool], precision: Precision = FP32) -> tuple[Learner, Trap]:
    """A learner after these steps; steps that are not armed see the same batches in the same order."""
    config, trap, n = loading.load(config_file, [*COMMON, *keys]), Trap(), 0
    learner = Learner(trap, config, precision, ALONE, optimizers.make_ema(trap, config))
    for trap.armed in armed:
        x, y = batch(n)
        n += not trap.armed
        outcome = learner.step([x], [y], lr=0.1)
        assert outcome.loss.isfinite()
        assert (bool(outcome.taken), bool(outcome.failed)) == (not trap.armed, trap.armed)
        assert all(p.grad is None for p in trap.parameters())
    return learner, trap


CASES = [(name, armed) for name in OPTIMIZERS for armed in ([False, True], [True, False], [False, True, False])]


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize(
    ("name", "armed"),
    [case for case in CASES if case[0] != "lamb" or case[1][-1]],  # LAMB counts the step in its bias correction
)
def test_gradients_that_are_not_finite_change_nothing(
    config_file: Path, name: str, policy: str, armed: list[bool]
) -> None:
    """Weights, optimizer state, EMA and, if the run continues, running statistics are as without that batch."""
    keys, states = [*OPTIMIZERS[name], f"train.on_nonfinite={policy}"], []
    keys += ["train.ema_decay=0.8"] * (policy == "skip")
    for steps in (armed, [False] * armed.count(False)):
        learner, trap = trained(config_file, keys, steps)
        state = learner.state_dict()
        for group in state["optimizer"]["param_groups"]:
            group.pop("step", None)
        states.append({**state, "network": dict(trap.named_parameters() if policy == "stop" else trap.state_dict())})
    assert_equal(*states)


def test_a_first_step_that_is_left_out_leaves_no_momentum(config_file: Path) -> None:
    """Not even if only the schedule sets momentum, in which case torch leaves its buffers uninitialized."""
    for keys in (["optim.momentum=0.9"], ["optim.momentum=0", "schedule.type=one_cycle"]):
        learner, trap = trained(config_file, [*keys, "train.on_nonfinite=skip"], [])
        trap.armed = True
        buffers = [learner.optimizer.state[p]["momentum_buffer"] for p in trap.parameters()]
        learner.step([batch()[0]], [batch()[1]], lr=0.1, momentum=0.9)
        assert all(torch.equal(b, torch.zeros_like(b)) for b in buffers)
        assert all(learner.optimizer.state[p]["momentum_buffer"] is b for p, b in zip(trap.parameters(), buffers))  # noqa: B905


def test_the_search_for_a_loss_scale_is_not_a_failure(config_file: Path) -> None:
    """In fp16, gradients overflow until the scale fits; only an overflow with a scale of 1 is a failure."""
    config, trap = loading.load(config_file, ["train.on_nonfinite=skip"]), Trap()
    learner = Learner(trap, config, Precision("fp16", ALONE.ranks.device), ALONE)
    trap.armed, failed = True, []
    before = [p.detach().clone() for p in trap.parameters()]
    for _ in range(20):
        outcome = learner.step([batch()[0]], [batch()[1]], lr=0.1)
        assert not outcome.taken
        failed.append(bool(outcome.failed))
    assert failed == [False] * 16 + [True] * 4  # from a scale of 2^16 on
    assert all(torch.equal(a, b) for a, b in zip(trap.parameters(), before, strict=True))


class Waits(TorchDispatchMode):
    """Counts how often the host reads a value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (
            torch.ops.aten._local_scalar_dense, torch.ops.aten.equal, torch.ops.aten.nonzero
        )  # fmt: skip
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["stop", "skip", "lower_lr"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("more", [[], ["train.clip_norm=1.0", "train.ema_decay=0.9"], ["loss.type=bce"]])
def test_the_host_waits_only_with_lower_lr(config_file: Path, name: str, policy: str, more: list[str]) -> None:
    config, trap = loading.load(config_file, [*OPTIMIZERS[name], *more, f"train.on_nonfinite={policy}"]), Trap()
    learner = Learner(trap, config, FP32, ALONE, optimizers.make_ema(trap, config))
    meter, (x, y) = Meter(ALONE, config), batch()
    for step, trap.armed in enumerate([False, True, False], 1):
        with Waits() as waits:
            meter.note(0, learner.step([x], [y], lr=0.1), step)
        on_host = name == "lamb"  # reads its count of steps, which is on the host
        assert waits.count == on_host + (policy == "lower_lr")
    assert learner.lr_factor == (0.5 if policy == "lower_lr" else 1)


@pytest.mark.parametrize("where", ["weight", "running statistic", "optimizer state", "EMA", "nowhere"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_a_checkpoint_would_hold_is_finite(config_file: Path, where: str, value: float) -> None:
    learner, trap = trained(config_file, ["train.ema_decay=0.8"], [False])
    assert learner.ema is not None
    tensors = {
        "weight": trap.network[0].weight,
        "running statistic": trap.network[1].running_var,
        "optimizer state": learner.optimizer.state[trap.network[4].bias]["momentum_buffer"],
        "EMA": learner.ema.module.network[4].weight,
        "nowhere": torch.zeros(2),
    }
    with torch.no_grad():
        tensors[where].view(-1)[1] = value
    assert bool(learner.finite()) == (where == "nowhere")
