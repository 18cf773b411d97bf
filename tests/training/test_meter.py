"""What the meter reports about losses, gradients and weights that are not finite, and about skipped steps."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loguru import logger

from bandsplit.config import loading
from bandsplit.config.schema import RunConfig
from bandsplit.distributed.mesh import Mesh
from bandsplit.distributed.ranks import joined
from bandsplit.errors import UserError
from bandsplit.runs import checkpoint
from bandsplit.runs.metrics import Stopwatch
from bandsplit.training.learner import Learner, Outcome
from bandsplit.training.meter import Meter, Progress
from tests.conftest import Done, on_ranks
from tests.training.tiny import ALONE, FP32, network

BAD, GOOD = torch.tensor(float("nan")), torch.tensor(2.0)


def outcome(loss: torch.Tensor = GOOD, failed: bool = False) -> Outcome:
    return Outcome(loss, torch.tensor(not failed), torch.tensor(failed))


def started(config: RunConfig) -> tuple[Meter, Progress]:
    meter, progress = Meter(ALONE, config), Progress()
    meter.start(progress)
    return meter, progress


@pytest.mark.parametrize(
    ("third", "message"),
    [
        (outcome(BAD, failed=True), "branch 0: the loss of step 3 is not finite (learning rate 0.0"),
        (outcome(BAD), "branch 0: the loss of step 3 is not finite"),
        (outcome(failed=True), "branch 0: the gradient of step 3 is not finite"),
        (outcome(), "branch 0: the loss of step 5 is not finite"),
    ],
)
def test_the_first_number_that_is_not_finite_is_named(config_file: Path, third: Outcome, message: str) -> None:
    meter, _ = started(loading.load(config_file, ["split.block=1"]))
    for step, result in enumerate((outcome(), outcome(), third, outcome(), outcome(BAD, failed=True)), 1):
        if step == 3:
            meter.require_finite(step=2, steps_per_epoch=10)
        meter.note(0, result, step)
    with pytest.raises(UserError, match=re.escape(message)):
        meter.require_finite(step=5, steps_per_epoch=10)


@pytest.mark.parametrize("policy", ["stop", "skip", "lower_lr"])
def test_weights_that_are_not_finite_end_the_run_whatever_the_policy(config_file: Path, policy: str) -> None:
    """The update itself may overflow, which later steps cannot repair."""
    config = loading.load(config_file, ["split.block=1", f"train.on_nonfinite={policy}"])
    learner, (meter, _) = Learner(network(), config, FP32, ALONE), started(config)
    meter.require_finite(4, 10, [learner])
    with torch.no_grad():
        next(iter(learner.validated.parameters()))[0, 0, 0, 0] = torch.inf
    meter.require_finite(4, 10)
    with pytest.raises(UserError, match=r"branch 0: the state \(weights, .*\) after step 4 is not finite"):
        meter.require_finite(4, 10, [learner])


@pytest.mark.parametrize("policy", ["skip", "lower_lr"])
def test_skipped_steps_are_reported_with_the_metrics(config_file: Path, policy: str) -> None:
    """They are not part of the mean, and their count is saved in checkpoints."""
    config = loading.load(config_file, ["split.block=1", f"train.on_nonfinite={policy}"])
    meter, progress = started(config)
    for step, result in enumerate((outcome(), outcome(failed=True), outcome(BAD, failed=True)), 1):
        meter.note(0, result, step)
    meter.require_finite(3, 10)
    resumed, progress = started(config)
    resumed.load(meter.state())
    resumed.note(0, outcome(torch.tensor(4.0)), 4)
    told: list[str] = []
    sink = logger.add(told.append, format="{level} {message}")
    progress.step = 4
    assert resumed.line(progress, Stopwatch(0.0))["loss"] == 3.0
    resumed.note(0, outcome(), 5)
    assert resumed.line(progress, Stopwatch(0.0))["loss"] == 2.0
    logger.remove(sink)
    halved = ", and each halved the learning rate" * (policy == "lower_lr")
    wanted = f"ERROR branch 0: 2 of 4 steps up to step 4 were left out, since their gradients were not finite{halved}\n"
    assert told == [wanted]


def told_on_rank(config: RunConfig, groups: int, failing_rank: int) -> str:
    """The error that a rank raises if one rank's loss, or its branch's gradient, was not finite in step 2."""
    with joined(60) as ranks:
        meter = Meter(Mesh(ranks, 2, groups), config)
        for step in (1, 2):
            wrong = ranks.rank == failing_rank and step == 2
            for i in range(2 // groups):
                meter.note(i, outcome(BAD, failed=groups == 2) if wrong and i == 2 // groups - 1 else outcome(), step)
        try:
            meter.require_finite(2, 10)
        except UserError as error:
            return str(error)
        return "nothing"


@pytest.mark.parametrize("groups", [1, 2])
def test_every_rank_raises_the_same(config_file: Path, groups: int) -> None:
    config = loading.load(config_file, ["split.branches=[[0], [1]]", "split.only=[0, 1]"])
    first, second = on_ranks(2, told_on_rank, config, groups, 1)
    assert first == second
    assert first.startswith("branch 1: the loss of step 2 is not finite")


def test_no_checkpoint_holds_numbers_that_are_not_finite(
    config_file: Path, tmp_path: Path, run_here: Callable[..., Done]
) -> None:
    """At this learning rate losses stay finite for a step or two after gradients or running statistics overflow."""
    keys = ("optim.lr=100", "checkpoint.every_steps=1", "checkpoint.keep=20", "schedule.warmup_epochs=0")
    sets = [argument for key in keys for argument in ("--set", key)]
    done = run_here("train.py", config_file, "--run-dir", tmp_path / "run", *sets)
    assert done.returncode == 2
    assert re.search(r"error: branch \d: the (loss|gradient|state .*) (of|after) step \d+ is not finite", done.stderr)
    folders = sorted((tmp_path / "run/checkpoints").glob("step_*"))
    assert folders
    for folder in folders:
        for path in folder.glob("branch_*.pt"):
            state = checkpoint.read(folder, path.name)
            momentum = [m["momentum_buffer"] for m in state["optimizer"]["state"].values()]
            assert all(x.isfinite().all() for x in (*state["network"].values(), *momentum)), path
