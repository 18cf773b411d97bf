"""script/ablation.py: its table matches the metrics of its runs, and it resumes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.compare import metrics
from tests.conftest import REPOSITORY, Done

TRICK = "label smoothing 0.1"


@pytest.fixture
def ablation(config_file: Path, tmp_path: Path, run_here: Callable[..., Done]) -> Callable[..., Done]:
    def call(*more: str) -> Done:
        few = ["--set", "train.epochs=1", "--seeds", "1", "--jobs", "2", "--only", TRICK]
        return run_here(
            str(REPOSITORY / "script/ablation.py"), config_file, "--output", tmp_path / "ablation", *more, *few
        )

    return call


@pytest.mark.slow
def test_an_ablation_matches_its_runs(ablation: Callable[..., Done], tmp_path: Path) -> None:
    output = tmp_path / "ablation"
    done = ablation()
    assert done.returncode == 0, done.stderr
    runs = {path.name: path for path in output.glob("*-seed*")}
    assert sorted(runs) == ["label_smoothing_0_1-seed0", "plain_recipe-seed0"]
    assert "smoothing = 0.1" in (runs["label_smoothing_0_1-seed0"] / "config.toml").read_text()
    assert "smoothing = 0.0" in (runs["plain_recipe-seed0"] / "config.toml").read_text()
    top1 = {name: metrics(path)[-2]["top1"] for name, path in runs.items()}
    difference = top1["label_smoothing_0_1-seed0"] - top1["plain_recipe-seed0"]
    line = next(line for line in done.stdout.splitlines() if line.startswith(f"| {TRICK}"))
    assert line.endswith(f"| {'+' if difference >= 0 else ''}{difference:.2f} |")
    assert (output / "ablation.md").read_text() in done.stdout
    assert len(json.loads((output / "ablation.json").read_text())) == 2
    assert (output / "ablation.png").exists()

    written = {path: path.stat().st_mtime for path in runs.values()}
    again = ablation()
    assert again.stdout == done.stdout
    assert {path: path.stat().st_mtime for path in runs.values()} == written

    other = ablation("--set", "optim.lr=0.1")
    assert other.returncode == 2
    assert "plain_recipe-seed0 holds a run of another config: optim.lr was 0.05, now 0.1" in other.stderr


def test_a_mistake_shows_before_the_first_run(ablation: Callable[..., Done], tmp_path: Path) -> None:
    done = ablation("--set", "optim.lrr=1")
    assert done.returncode == 2
    assert "did you mean optim.lr?" in done.stderr
    assert not (tmp_path / "ablation").exists()
