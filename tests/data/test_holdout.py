"""Held-out images: the same ones on every rank and at every start, and never trained on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bandsplit.config import loading
from bandsplit.data import holdout, pinned
from bandsplit.data.images import ImageFiles
from bandsplit.data.loader import open_data
from bandsplit.distributed.ranks import Ranks
from bandsplit.errors import UserError
from bandsplit.training.session import Plan, Session
from tests.conftest import TRAIN_PER_CLASS, VAL_PER_CLASS, Done

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


def test_they_are_chosen_in_each_class_by_the_seed() -> None:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(4, dtype=np.int32), [100, 40, 3, 9]))
    classes = ["a", "b", "c", "d", "no images"]
    for given, counts in ((2, [2, 2, 2, 2, 0]), (0.1, [10, 4, 0, 1, 0]), (0.9, [90, 36, 2, 8, 0])):
        chosen = holdout.held_out(labels, classes, given, 7)
        assert np.bincount(labels[chosen], minlength=5).tolist() == counts
        assert np.array_equal(chosen, holdout.held_out(labels, classes, given, 7))
        assert not np.array_equal(chosen, holdout.held_out(labels, classes, given, 8))
    few, many = (np.flatnonzero(holdout.held_out(labels, classes, given, 7)) for given in (0.1, 0.2))
    assert set(few) < set(many)


def test_each_image_of_a_class_is_as_likely() -> None:
    labels = np.repeat(np.arange(3), 10)
    times = sum(holdout.held_out(labels, ["a", "b", "c"], 2, seed).astype(int) for seed in range(2000))
    assert np.all(np.abs(times - 400) < 5 * np.sqrt(2000 * 0.2 * 0.8))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (16, r"data\.holdout: 16 given, but class disc_checkered has only 16 images"),
        (0.01, r"data\.holdout: 0\.01 given, which is no image of any class"),
    ],
)
def test_what_cannot_be_held_out_is_refused(config_file: Path, given: float, message: str) -> None:
    config = loading.load(config_file, [f"data.holdout={given}"])
    with pytest.raises(UserError, match=message):
        Plan.of(config, ALONE)


@pytest.mark.parametrize("given", ["0", "-1", "1.0", "0.0", "true", "some", "[1]"])
def test_what_is_neither_a_number_nor_a_fraction_is_refused(config_file: Path, given: str) -> None:
    with pytest.raises(UserError, match=r"data\.holdout: .* given; allowed: a number of images per class, at least 1"):
        loading.load(config_file, [f"data.holdout={given}"])


@pytest.mark.parametrize("given", ["4", "0.25"])
def test_no_held_out_and_no_validation_image_is_trained_on(config_file: Path, given: str) -> None:
    """Over two passes the loader of a run hands out every other training image twice, and nothing else."""
    config = loading.load(config_file, [f"data.holdout={given}"])
    plan = Plan.of(config, ALONE)
    everything = open_data(config, ALONE)
    number = {path: i for i, path in enumerate([*everything["train"].paths, *everything["val"].paths])}
    assert len(number) == 10 * (TRAIN_PER_CLASS + VAL_PER_CLASS)

    numbered = replace(plan.train_files, labels=[number[path] for path in plan.train_files.paths])
    loader = Session(replace(plan, train_files=numbered)).loader
    assert plan.steps_per_epoch == 120 // 12
    trained = torch.cat([next(loader).labels for _ in range(2 * plan.steps_per_epoch)]).tolist()

    training, out = holdout.split(everything["train"], config)
    assert len(out) == len(plan.held_out_files) == 40
    assert sorted(trained) == sorted(2 * [number[path] for path in training.paths])
    assert not {number[path] for path in [*out.paths, *everything["val"].paths]} & set(trained)


def of_run(run_dir: Path) -> tuple[ImageFiles, ImageFiles]:
    config = loading.load(run_dir / "config.toml")
    return holdout.split(pinned.as_began(run_dir / "data", open_data(config, ALONE), config.data)["train"], config)


@pytest.mark.slow
def test_a_run_keeps_its_held_out_images(finished: Callable[..., Path], run_here: Callable[..., Done]) -> None:
    run_dir = finished(2, "data.holdout=4")
    training, out = of_run(run_dir)
    assert (len(training), len(out)) == (120, 40)
    assert not set(training.paths) & set(out.paths)
    assert np.bincount(out.labels).tolist() == [4] * 10
    assert "120 training (40 more are held out) and 50 validation images" in (run_dir / "logs/rank0.log").read_text()
    done = run_here("train.py", "--resume", "--run-dir", run_dir, "--set", "data.holdout=5")
    assert done.returncode == 2
    assert "data.holdout was 4, now 5" in done.stderr


def test_a_run_keeps_them_when_images_are_added(
    config_file: Path, image_root: Path, tmp_path: Path, finished: Callable[..., Path]
) -> None:
    """Its own list of images counts, not what is in the folder now."""

    run_dir = finished(2, "data.holdout=4")
    before = of_run(run_dir)
    root = Path(shutil.copytree(image_root, tmp_path / "more"))
    first = sorted((root / "train").rglob("*.jpg"))[0]
    shutil.copy(first, first.with_name("0.jpg"))
    config = loading.load(run_dir / "config.toml", [f"data.root={root}"])
    found = open_data(config, ALONE)
    assert len(found["train"]) == 161
    after = holdout.split(pinned.as_began(run_dir / "data", found, config.data)["train"], config)
    for mine, theirs in zip(after, before, strict=True):
        assert [mine.name(i) for i in range(len(mine))] == [theirs.name(i) for i in range(len(theirs))]


def test_the_dry_run_counts_without_them(config_file: Path, run_here: Callable[..., Done]) -> None:
    done = run_here("train.py", config_file, "--set", "data.holdout=4", "--dry-run")
    assert "data      120 training (40 more are held out) and 50 validation images" in done.stdout
    assert "steps     2 epochs x 10 = 20" in done.stdout
