"""Learning-rate and momentum schedules against torch's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from bandsplit.config import loading
from bandsplit.training import schedules

STEPS = 7  # an epoch


def torchs(make: Callable[[torch.optim.Optimizer], Any], steps: int, lr: float) -> tuple[list[float], list[float]]:
    """Learning rates and momenta of torch's own scheduler."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr, momentum=0.9)
    schedule = make(optimizer)
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(steps):
        for values, key in zip(found, ("lr", "momentum"), strict=True):
            values.append(optimizer.param_groups[0][key])
        optimizer.step()
        schedule.step()
    return found


SCHEDULES: dict[str, tuple[list[str], Callable[[torch.optim.Optimizer], Any]]] = {
    "cosine": (
        ["schedule.lr_min=0.001"],
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6 * STEPS, eta_min=0.001),
    ),
    "cosine that bounces": (
        ["schedule.lr_min=0.001", "schedule.period_epochs=2"],
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=2 * STEPS, eta_min=0.001),
    ),
    "cosine that restarts": (
        ["schedule.lr_min=0.001", "schedule.period_epochs=2", "schedule.after=restart"],
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2 * STEPS, eta_min=0.001),
    ),
    "cosine after a warm-up": (
        ["schedule.warmup_epochs=2", "schedule.lr_min=0.001"],
        lambda o: lr_scheduler.SequentialLR(
            o,
            [
                lr_scheduler.LinearLR(o, start_factor=1 / 14, total_iters=13),
                lr_scheduler.CosineAnnealingLR(o, T_max=28, eta_min=0.001),
            ],
            milestones=[14],
        ),
    ),
    "step": (
        ["schedule.type=step", "schedule.every_epochs=2", "schedule.gamma=0.3"],
        lambda o: lr_scheduler.StepLR(o, step_size=2 * STEPS, gamma=0.3),
    ),
    "milestones": (
        ["schedule.type=step", "schedule.milestones=[1, 4]"],
        lambda o: lr_scheduler.MultiStepLR(o, milestones=[STEPS, 4 * STEPS]),
    ),
    "linear": (
        ["schedule.type=linear", "schedule.lr_min=0.03"],
        lambda o: lr_scheduler.LinearLR(o, start_factor=1, end_factor=0.1, total_iters=6 * STEPS),
    ),
    "constant": (["schedule.type=constant"], lambda o: lr_scheduler.ConstantLR(o, factor=1)),
    "one cycle": (
        ["schedule.type=one_cycle", "schedule.peak_at=0.4"],
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=6 * STEPS, pct_start=0.4),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_torchs(config_file: Path, name: str) -> None:
    keys, make = SCHEDULES[name]
    config = loading.load(config_file, ["train.epochs=6", "optim.lr=0.3", "schedule.warmup_epochs=0", *keys])
    total = 6 * STEPS - 1  # torch's one-cycle cannot step further
    lrs, momenta = torchs(make, total, 0.3)
    assert [schedules.lr_at(step, STEPS, config) for step in range(total)] == pytest.approx(lrs, rel=1e-6, abs=1e-12)
    if name == "one cycle":
        ours = [schedules.momentum_at(step, STEPS, config) for step in range(total)]
        assert ours == pytest.approx(momenta, rel=1e-6)
    else:
        assert schedules.momentum_at(3, STEPS, config) is None


SHORT = {
    "cosine": [],
    "cosine, periods": ["schedule.period_epochs=0.4"],
    "cosine, periods of less than a step": ["schedule.period_epochs=1e-320"],
    "cosine, restarts": ["schedule.period_epochs=0.7", "schedule.after=restart"],
    "cosine, restarts within a step": ["schedule.period_epochs=0.01", "schedule.after=restart"],
    "step": ["schedule.type=step", "schedule.every_epochs=0.3"],
    "step, many in one step": ["schedule.type=step", "schedule.every_epochs=1e-320"],
    "milestones": ["schedule.type=step", "schedule.milestones=[0, 0.01, 0.5, 1]"],
    "one cycle": ["schedule.type=one_cycle"],
    "linear": ["schedule.type=linear", "schedule.lr_min=0.01"],
    "constant": ["schedule.type=constant"],
}


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("warmup", [0, 0.3, 0.5, 0.99])
def test_every_schedule_takes_runs_of_a_few_steps(config_file: Path, name: str, warmup: float) -> None:
    """For any number of steps, also if warm-up leaves one step or none, or if a period is shorter than a step."""
    keys = ["optim.lr=0.3", "train.epochs=1", f"schedule.warmup_epochs={warmup}", *SHORT[name]]
    peaks = [n / 20 for n in range(1, 20)] + [1 / 3, 1 / 7] if name.startswith("one cycle") else [None]
    for peak in peaks:
        config = loading.load(config_file, [*keys, *([f"schedule.peak_at={peak}"] if peak else [])])
        for total in range(1, 25):
            lrs = [schedules.lr_at(step, total, config) for step in range(total)]
            assert all(0 <= lr <= 0.3 * (1 + 1e-12) for lr in lrs), (total, peak, lrs)  # nan is refused too
            for step in range(total):
                momentum = schedules.momentum_at(step, total, config)
                assert momentum is None or 0.85 - 1e-12 <= momentum <= 0.95 + 1e-12, (total, peak, step)


@pytest.mark.parametrize("name", SHORT)
def test_the_step_after_a_warm_up_that_rounds_up_to_all_steps_has_a_value(config_file: Path, name: str) -> None:
    """Which a run that is extended says."""
    keys = ["optim.lr=0.3", "train.epochs=2", "schedule.warmup_epochs=1.9", *SHORT[name]]
    config = loading.load(config_file, keys)
    assert schedules.lr_at(7, 4, config) == pytest.approx(0.3)
    assert 0 <= schedules.lr_at(8, 4, config) <= 0.3 * (1 + 1e-12)
    momentum = schedules.momentum_at(8, 4, config)
    assert momentum is None or 0.85 - 1e-12 <= momentum <= 0.95 + 1e-12


@pytest.mark.parametrize("peak_at", [0.04, 0.1, 0.2, 0.25, 0.3, 1 / 3, 0.5, 0.9])
def test_short_one_cycles_are_torchs(config_file: Path, peak_at: float) -> None:
    """Except that torch divides by zero if the peak is the first step."""
    keys = ["schedule.type=one_cycle", f"schedule.peak_at={peak_at}", "optim.lr=0.3", "schedule.warmup_epochs=0"]
    config = loading.load(config_file, [*keys, "train.epochs=1"])
    for total in range(1, 30):
        if peak_at * total == 1:
            assert schedules.lr_at(0, total, config) == pytest.approx(0.3)
            assert schedules.momentum_at(0, total, config) == pytest.approx(0.85)
            continue
        steps = total - 1  # torch's scheduler raises in its last step
        lrs, momenta = torchs(
            lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=total, pct_start=peak_at),  # noqa: B023
            steps, 0.3,
        )  # fmt: skip
        assert [schedules.lr_at(step, total, config) for step in range(steps)] == pytest.approx(lrs)
        assert [schedules.momentum_at(step, total, config) for step in range(steps)] == pytest.approx(momenta)
        assert schedules.lr_at(steps, total, config) == pytest.approx(0.3 * 1e-4 / 25)


def test_warm_up_starts_low_and_its_absence_at_the_peak(config_file: Path) -> None:
    without, with_it = (loading.load(config_file, [f"schedule.warmup_epochs={n}", "optim.lr=0.3"]) for n in (0, 1))
    assert schedules.lr_at(0, 10, without) == 0.3
    assert schedules.lr_at(0, 10, with_it) == pytest.approx(0.03)
    assert schedules.lr_at(9, 10, with_it) == pytest.approx(0.3)


def test_lr_scales_with_the_batch_if_a_base_batch_is_set(config_file: Path) -> None:
    keys = ["optim.lr=0.1", "train.batch_size=1024", "schedule.warmup_epochs=0"]
    for more, lr in (
        ([], 0.1),
        (["optim.base_batch=256"], 0.4),
        (["optim.base_batch=256", "optim.scaling=sqrt"], 0.2),
    ):
        assert schedules.lr_at(0, 10, loading.load(config_file, [*keys, *more])) == pytest.approx(lr)
