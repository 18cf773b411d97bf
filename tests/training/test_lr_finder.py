"""The LR finder's suggestion on curves with a known answer, and on real files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bandsplit.config import loading
from bandsplit.training import lr_finder
from bandsplit.training.session import Session
from tests.conftest import Done


def valley(lrs: np.ndarray, steepest: float) -> np.ndarray:
    """A loss that falls around one learning rate and diverges two decades above it."""
    x = np.log10(lrs / steepest)
    return 2.5 - np.tanh(2 * x) + np.exp(8 * (x - 2))


@pytest.mark.parametrize("steepest", [1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_the_steepest_fall_is_suggested(steepest: float, noise: float) -> None:
    lrs = np.geomspace(1e-5, 10, 200)
    curve = valley(lrs, steepest) + noise * np.random.default_rng(0).standard_normal(200)
    found = lr_finder.suggestion(lrs, curve)
    assert found is not None
    assert abs(np.log10(found / steepest)) < 0.2


def test_nothing_is_suggested_where_nothing_falls() -> None:
    lrs = np.geomspace(1e-5, 10, 50)
    assert lr_finder.suggestion(lrs, np.linspace(2, 3, 50)) is None
    assert lr_finder.suggestion(lrs, np.full(50, np.nan)) is None


def test_a_curve_that_ends_early_counts_as_far_as_it_goes() -> None:
    lrs = np.geomspace(1e-5, 10, 200)
    curve = valley(lrs, 1e-3)
    whole = lr_finder.suggestion(lrs, curve)
    curve[150:] = np.nan
    assert lr_finder.suggestion(lrs, curve) == whole


def test_smoothing_has_no_bias_and_keeps_what_is_missing() -> None:
    losses = np.full(30, 2.0)
    losses[20:] = np.nan
    curve = lr_finder.smoothed(losses)
    np.testing.assert_allclose(curve[:20], 2.0)
    assert np.isnan(curve[20:]).all()
    step = lr_finder.smoothed(np.r_[np.zeros(5), np.ones(60)])
    assert step[4] == 0 < step[5] < step[6] < 1
    assert step[-1] > 0.99


def test_learning_rates_are_scaled_to_the_batch(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[float] = []
    step = Session.step

    def noted(self: Session, branches: Any, parts: Any, number: int, lr: float) -> Any:
        taken.append(lr)
        return step(self, branches, parts, number, lr)

    monkeypatch.setattr(Session, "step", noted)
    lrs = np.array([1e-4, 1e-3, 1e-2])
    lr_finder._range_test(loading.load(config_file, ["optim.base_batch=24"]), lrs, tmp_path / "out")  # batches of 12
    assert taken == pytest.approx(lrs / 2)


@pytest.mark.slow
def test_on_real_files(config_file: Path, tmp_path: Path, run_here: Callable[..., Done]) -> None:
    """Every branch has a curve, diverging ones stop early, and the suggestion can be pasted into a command."""
    larger = ("--set", "train.batch_size=80", "--set", "model.stem=small", "--set", "optim.base_batch=160")
    arguments = (config_file, *larger, "--from", "1e-4", "--to", "1e4", "--steps", "60", "--output", tmp_path / "out")
    done = run_here("find_lr.py", *arguments)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "out/lr_finder.json").read_text())
    assert f"all: --set optim.lr={table['suggested']:.2g}" in done.stdout
    branches = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("branch")]
    assert branches == [float(f"{lr:.2g}") for lr in table["suggested_branch"]]
    assert 1e-4 < table["suggested"] < 10
    assert [len(row) for row in table["branch_loss"]] == [60] * 4
    assert all(row[0] is not None for row in table["branch_loss"])
    assert any(row[-1] is None for row in table["branch_loss"]), "at a rate of ten thousand"
    assert (tmp_path / "out/lr_finder.png").stat().st_size > 10_000
