"""Branches that begin late or end early: the others are those of a run in which all train."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from bandsplit.config import loading
from bandsplit.errors import UserError
from bandsplit.runs import checkpoint
from bandsplit.training.active import ActiveBranches
from bandsplit.training.meter import Progress
from tests.compare import assert_equal, assert_same_run, metrics
from tests.conftest import Done, run


def test_a_branch_ends_when_its_loss_has_not_fallen_for_its_patience(config_file: Path) -> None:
    config = loading.load(config_file, ["data.holdout=4", "train.early_stop_patience=2", "train.epochs=9"])
    config = config.with_values({"split": {"branches": ((0,), (1,), (2,), (3,), (0, 1))}})
    active = ActiveBranches(config)
    losses = [  # one row a branch
        [3.0, 2.0, 1.0, 0.9, 0.8, 0.7],  # always falls
        [3.0, 2.0, 2.5, 1.9, 1.9, 1.9],  # once up, then equal twice
        [3.0, 3.1, 3.2, 0.1, 0.1, 0.1],  # ends after the third
        [math.nan] * 6,  # never known: ends after the second
        [1.0, math.nan, 2.0, 2.0, 2.0, 2.0],  # once unknown, and no record since the first: ends after the third
    ]
    for n in range(6):
        active.note([row[n] for row in losses], step=10 * (n + 1), epoch=n)
        if n == 2:
            saved, active = {"step": 30, **active.state()}, ActiveBranches(config)
            active.load(saved)
            assert not ActiveBranches.ended(saved)
    assert active.stopped == [None, 60, 30, 20, 30]
    assert [active.train(k, 6) for k in range(5)] == [True, False, False, False, False]
    assert ActiveBranches(loading.load(config_file)).state() == {}


def test_the_best_is_chosen_anew_with_every_branch_that_begins(config_file: Path) -> None:
    active = ActiveBranches(loading.load(config_file, ["train.epochs=4", "train.start_epochs=[0, 0, 2, 0]"]))
    progress, best = Progress(), []
    for epoch, (top1, loss) in enumerate([(60.0, 1.0), (70.0, 1.0), (50.0, math.inf), (40.0, 1.0)]):
        progress.step = 10 * (epoch + 1)
        progress.note_validation({"top1": top1, "loss": loss}, 0.0, active.count_begun(epoch))
        best.append((progress.best_step, progress.best_top1))
    assert best == [(10, 60), (20, 70), (20, 70), (40, 40)]


def test_a_branch_alone_that_begins_late_is_told(config_file: Path) -> None:
    told: list[str] = []
    sink = logger.add(told.append, format="{message}")
    active = ActiveBranches(loading.load(config_file, ["train.start_epochs=[0, 0, 0, 1]", "split.only=[3]"]))
    logger.remove(sink)
    assert told == ["no branch of this run trains before epoch 1 (train.start_epochs)\n"]
    assert [(active.train(0, epoch), active.count_begun(epoch)) for epoch in (0, 1)] == [(False, 0), (True, 1)]


@pytest.mark.slow
def test_nothing_is_validated_before_a_branch_begins(finished: Callable[..., Path]) -> None:
    lines = metrics(finished(1, "train.start_epochs=[0, 0, 0, 1]", "split.only=[3]"))
    assert [line["step"] for line in lines if line["event"] == "validation"] == [26]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["train.early_stop_patience=2"], "train.early_stop_patience: 2 given; allowed: unset, unless data.holdout"),
        (
            ["data.holdout=4", "train.early_stop_patience=3", "distillation.teacher=t", "distillation.residual=true"],
            "train.early_stop_patience: 3 given; allowed: unset with distillation.residual = true, since held-out",
        ),
        (
            ["train.start_epochs=[0, 1]"],
            r"start_epochs: \[0, 1\] given; allowed: an epoch below 2 for each of 4 branches",
        ),
        (["train.start_epochs=[0, 1, 1, 2]"], r"start_epochs: \[0, 1, 1, 2\] given"),
        (["train.start_epochs=1,1,1,1"], r"start_epochs: \[1, 1, 1, 1\] given; allowed: .*, with a 0 among them"),
    ],
)
def test_what_cannot_be_is_told(config_file: Path, keys: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        loading.load(config_file, keys)


def branch(run_dir: Path, step: int, k: int) -> dict[str, Any]:
    return checkpoint.read(run_dir / f"checkpoints/step_{step:08d}", checkpoint.branch_file(k))


@pytest.mark.slow
def test_branches_rest_before_they_begin_and_after_they_end(
    finished: Callable[..., Path], config_file: Path, tmp_path: Path, run_here: Callable[..., Done]
) -> None:
    """The steps that a branch takes are those of a run in which all train; resuming is bit-equal."""
    common = ("data.holdout=4", "train.epochs=4", "checkpoint.keep=20", "optim.lr=0.005")
    keys = (*common, "train.early_stop_patience=1", "train.start_epochs=[0, 0, 0, 1]")
    run_dir, together = finished(1, *keys), finished(1, *common)
    told = [line for line in metrics(run_dir) if line["event"] == "validation"]
    ended, steps = told[-1]["stopped_after"], [line["step"] for line in told]
    last = steps[-1]
    assert steps == [10, 20, 30, 40][: len(steps)]
    assert any(step is not None and step < last for step in ended[:3]), "no branch rests: the test shows nothing"
    for k, step in enumerate(ended[:3]):
        losses = [line["held_out_loss"][k] for line in told]
        rises = [n for n in range(1, len(steps)) if losses[n] >= min(losses[:n])]
        assert step == (steps[rises[0]] if rises else None)
        assert_equal(branch(run_dir, last, k), branch(together, step or last, k))
    unbegun, begun = (branch(run_dir, step, 3)["network"] for step in (10, last))
    assert int(unbegun["bn1.num_batches_tracked"]) == 0
    assert int(begun["bn1.num_batches_tracked"]) == (ended[3] or last) - 10
    for line in metrics(run_dir):
        if line["event"] == "train":
            trains = [(k < 3 or line["step"] > 10) and line["step"] <= (end or last) for k, end in enumerate(ended)]
            assert [loss is not None for loss in line["branch_loss"]] == trains
    done = run_here("evaluate.py", run_dir, "--checkpoint", 10, "--output", tmp_path / "early.json")
    assert "left out: branch 3, not begun yet (train.start_epochs)" in done.stderr
    early = json.loads((tmp_path / "early.json").read_text())
    assert early["top1"] == pytest.approx(told[0]["top1"]), "what the run has validated, and may have called its best"
    copy = Path(shutil.copytree(run_dir, tmp_path / "copy", symlinks=True))
    for path in checkpoint.saved(copy / "checkpoints"):
        if checkpoint.step_of(path) > steps[-2]:
            shutil.rmtree(path)
    arguments = [config_file, "--run-dir", copy, "--resume", *(part for key in keys for part in ("--set", key))]
    again = run("train.py", *arguments)
    assert again.returncode == 0, again.stderr
    assert_same_run(copy, run_dir)
    assert f"is finished: {last} steps" in run_here("train.py", *arguments).stderr
