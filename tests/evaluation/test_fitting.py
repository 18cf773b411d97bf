"""Fusion fitted on held-out images: through the command, from the images to the table."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.special
import scipy.stats
import torch

from bandsplit.config import loading
from bandsplit.data import holdout
from bandsplit.data.loader import open_data
from bandsplit.distributed.ranks import Ranks
from bandsplit.evaluation import fitting
from bandsplit.evaluation.joined import Joined
from bandsplit.models import fusion
from bandsplit.runs import checkpoint
from bandsplit.runs.predictions import Predictions
from bandsplit.statistics import paired_interval
from tests.conftest import REPOSITORY, Done, Shared, run

FIT = f"fit it with python {REPOSITORY}/src/evaluate.py"  # as this process was started
HELD_OUT = ("data.holdout=4", "train.epochs=4")
"""40 of 160 images."""

HALF = 2**-11
"""Relative error of a number that is rounded to float16."""

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture
def trained(finished: Callable[..., Path], tmp_path: Path) -> Path:
    """A run with held-out images that a test may change."""
    return Path(shutil.copytree(finished(1, *HELD_OUT), tmp_path / "run", symlinks=True))


def fitted_file(run_dir: Path) -> Path:
    return checkpoint.find(run_dir / "checkpoints", "best") / "fusion.json"


def held_out_logits(run_dir: Path) -> tuple[np.typing.NDArray[np.float32], np.typing.NDArray[np.int64]]:
    """Not rounded; with the loader of the validation images but none of the code that fits."""
    config = loading.load(run_dir / "config.toml")
    files = holdout.split(open_data(config, ALONE)["train"], config)[1]
    runs = Joined.of([run_dir], "best", [], ALONE)
    runs.ensemble.eval()
    with torch.no_grad():
        batches = [(runs.ensemble(batch.inputs), batch.labels) for batch in runs.loader(files)]
    labels = torch.cat([labels for _, labels in batches])
    logits = torch.cat([logits for logits, _ in batches], 1).transpose(0, 1)[labels >= 0]
    return logits.numpy(), labels[labels >= 0].numpy()


def test_fusion_is_fitted_on_the_held_out_images_and_measured_on_the_others(trained: Path, tmp_path: Path) -> None:
    """On one and on three ranks; every figure of the table follows from the saved predictions."""
    tables: list[dict[str, Any]] = []
    weights: list[dict[str, Any]] = []
    for ranks in (1, 3):
        save, output = tmp_path / f"{ranks}.npz", tmp_path / f"{ranks}.json"
        done = run("evaluate.py", trained, "--fit-fusion", "--save", save, "--output", output, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert "fusion, fitted on 40 held-out images:" in done.stdout
        tables.append(json.loads(output.read_text()))
        weights.append(json.loads(fitted_file(trained).read_text()))
    assert weights[0]["held_out"] == weights[1]["held_out"]
    prepared = {"val_image_size": 32, "resize_size": 40, "interpolation": "bilinear"}
    told = {"images": 40, "of": 40, "holdout": 4, "seed": 0, "digest": "", "prepared": prepared}
    assert weights[0]["held_out"] | {"digest": ""} == told
    assert list(weights[0]["fusions"]) == list(fusion.FUSIONS)

    logits, labels = held_out_logits(trained)
    expected = fusion.fit(logits, labels)
    for told in weights:
        fusions = told["fusions"]
        for name, each in fusions.items():
            assert each["loss"] == pytest.approx(expected[name].loss, rel=HALF, abs=1e-3)
            assert each["weights"] == pytest.approx(expected[name].weights, rel=0.05, abs=0.02)
        others = [*np.eye(4), *(np.array(each["weights"]) for each in fusions.values())]
        losses = [fusion.loss_and_gradient(logits, labels, each, fusion.smoothing(40))[0] for each in others]
        assert losses[4 + fusion.FUSIONS.index("learned")] <= min(losses) + 1e-5

    saved = Predictions.read(tmp_path / "1.npz")
    assert saved.logits is not None
    z = saved.logits.astype(float)
    for name, each in tables[0]["fusions"].items():
        assert each["weights"] == weights[0]["fusions"][name]["weights"]
        assert tables[1]["fusions"][name]["weights"] == weights[1]["fusions"][name]["weights"]
        fused = np.einsum("k,nkc->nc", weights[0]["fusions"][name]["weights"], z)
        assert each["top1"] == pytest.approx(100 * (fused.argmax(1) == saved.labels).mean(), abs=2.001)
        log_p = fused - scipy.special.logsumexp(fused, axis=1, keepdims=True)
        assert each["loss"] == pytest.approx(-log_p[np.arange(50), saved.labels].mean(), rel=HALF, abs=2e-3)
        low, high = each["gain_interval"]
        assert each["gain"] == pytest.approx(each["top1"] - tables[0]["top1"])
        assert low <= each["gain"] <= high


def test_a_fitted_fusion_is_used(trained: Path, tmp_path: Path, run_here: Callable[..., Done]) -> None:
    done = run_here("evaluate.py", trained, "--fusion", "learned")
    assert done.returncode == 2
    assert f"{fitted_file(trained)}: no such file; {FIT} {trained} --fit-fusion" in done.stderr
    assert run_here("evaluate.py", trained, "--fit-fusion").returncode == 0
    outputs = {}
    for name in fusion.FUSIONS:
        done = run_here("evaluate.py", trained, "--fusion", name, "--output", tmp_path / "x.json")
        assert done.returncode == 0, done.stderr
        assert ("ensemble (learned)" in done.stdout) == (name == "learned")
        outputs[name] = json.loads((tmp_path / "x.json").read_text())
    for name, told in outputs.items():
        assert told["fusion"] == name
        for key in ("loss", "top1", "top5", "ece"):
            assert told[key] == told["fusions"][name][key] == outputs["mean"]["fusions"][name][key]
    # the same prediction with another confidence
    assert outputs["temperature"]["top1"] == outputs["mean"]["top1"]
    assert outputs["temperature"]["loss"] != outputs["mean"]["loss"]


def test_without_held_out_images_it_says_how_to_get_some(
    finished: Callable[..., Path], run_here: Callable[..., Done]
) -> None:
    for option in (("--fit-fusion",), ("--fusion", "rank")):
        done = run_here("evaluate.py", finished(1), *option)
        assert done.returncode == 2
        assert "this run held none out: train one with --set data.holdout=COUNT" in done.stderr
        done = run_here("evaluate.py", finished(1), *option, "--set", "data.holdout=4")
        assert done.returncode == 2
        assert "--set data.holdout: 4 given, but" in done.stderr


def test_images_that_a_run_was_trained_on_are_not_taken_for_held_out(
    trained: Path, image_root: Path, tmp_path: Path, run_here: Callable[..., Done]
) -> None:
    done = run_here("evaluate.py", trained, "--fit-fusion", "--set", "seed=1")
    assert done.returncode == 2
    assert "--set seed: 1 given" in done.stderr
    shutil.rmtree(trained / "data")
    root = Path(shutil.copytree(image_root, tmp_path / "other"))
    sorted((root / "train").rglob("*.jpg"))[0].unlink()
    done = run_here("evaluate.py", trained, "--fit-fusion", "--set", f"data.root={root}")
    assert done.returncode == 2
    assert f"the training images are not those that {trained} was trained on" in done.stderr


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"format": 2}', '{"format": 1, "branches": [{}]}', "\x00\x00", '{"format": 1, "branches": 3}'],
)
def test_a_damaged_file_is_named(trained: Path, run_here: Callable[..., Done], content: str) -> None:
    fitted_file(trained).write_text(content)
    done = run_here("evaluate.py", trained, "--fusion", "rank")
    assert done.returncode == 2
    assert f"error: {fitted_file(trained)}: cannot be understood" in done.stderr


@pytest.fixture(scope="module")
def parts(finished: Callable[..., Path], shared: Shared) -> list[Path]:
    """Branches 0 and 1, and branches 2 and 3; the last of another seed."""
    config = finished(1).parent / "tiny.toml"

    def train(run_dir: Path) -> None:
        branches, seed = run_dir.name.split("-")
        sets = ("--set", "data.holdout=4", "--set", f"seed={seed}")
        done = run("train.py", config, "--branches", branches, "--run-dir", run_dir, *sets)
        assert done.returncode == 0, done.stderr

    return [shared.once(f"held_out/{name}", train) for name in ("0,1-0", "2,3-0", "2,3-1")]


def test_joined_runs_are_fitted_together(parts: list[Path], tmp_path: Path, run_here: Callable[..., Done]) -> None:
    one, two, other = (Path(shutil.copytree(part, tmp_path / part.name, symlinks=True)) for part in parts)
    done = run_here("evaluate.py", one, other, "--checkpoint", "last", "--fit-fusion")
    assert done.returncode == 2
    assert f"{other}: seed: 1, but {one} has 0: one was trained on images that the other held out" in done.stderr
    for runs in ((one,), (one, two)):  # neither replaces the other's
        done = run_here("evaluate.py", *runs, "--checkpoint", "last", "--fit-fusion", "--fusion", "learned")
        assert done.returncode == 0, done.stderr
        assert "ensemble (learned)" in done.stdout
    options = ("--fit-fusion", "--corrupt", "jpeg", "--output", tmp_path / "two.json")
    done = run_here("evaluate.py", two, "--checkpoint", "last", *options)
    assert done.returncode == 0, done.stderr
    table = done.stdout.split("largest weight first:\n")[1].splitlines()[1:3]
    assert {line.split()[1].lstrip("+") for line in table} == {"2", "3"}, "numbers in the whole ensemble"
    assert {*pd.read_csv(tmp_path / "two_corruption.csv")["branch"]} == {"ensemble", "2", "3"}
    for runs in ((one,), (one, two)):
        done = run_here("evaluate.py", *runs, "--checkpoint", "last", "--fusion", "learned")
        assert done.returncode == 0, done.stderr
    done = run_here("evaluate.py", one, other, "--checkpoint", "last")
    assert done.returncode == 0, done.stderr
    assert "held-out" not in done.stdout
    done = run_here("evaluate.py", one, other, "--checkpoint", "last", "--fusion", "learned")
    assert done.returncode == 2
    path = checkpoint.find(one / "checkpoints", "last") / "fusion.json"
    assert f"{path}: it was fitted for other branches; fit it with" in done.stderr, "the file that was read"
    table = json.loads(path.read_text())
    table["branches"][0]["digest"] = "0123"  # trained anew, with the same name, seed and steps
    path.write_text(json.dumps(table))
    done = run_here("evaluate.py", one, "--checkpoint", "last", "--fusion", "learned")
    assert done.returncode == 2
    assert "fusion.json: it was fitted for other branches" in done.stderr


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        ((), []),
        (("data.holdout=4", "train.early_stop_patience=2"), ["train.early_stop_patience: held-out images"]),
        (("model.init_from='torchvision'",), ["model.init_from: 'torchvision': such weights were trained on ImageNet"]),
    ],
)
def test_what_has_seen_held_out_images_is_told(config_file: Path, sets: tuple[str, ...], told: list[str]) -> None:
    configs = [loading.load(config_file), loading.load(config_file, sets), loading.load(config_file, sets)]
    found = fitting.what_knows_held_out(configs)
    assert [text[: len(begin)] for text, begin in zip(found, told, strict=True)] == told


def test_a_sample_is_fitted_where_not_all_logits_fit(
    trained: Path, run_here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bandsplit.evaluation.collector.LIMIT", 2 * 30 * 4 * 10)
    done = run_here("evaluate.py", trained, "--fit-fusion")
    assert done.returncode == 0, done.stderr
    assert "fitted on 30 of 40 held-out images" in done.stdout


def test_a_held_out_image_that_went_bad_is_left_out(trained: Path, image_root: Path, tmp_path: Path) -> None:
    config = loading.load(trained / "config.toml")
    out = holdout.split(open_data(config, ALONE)["train"], config)[1]
    root = Path(shutil.copytree(image_root, tmp_path / "damaged"))
    (root / "train" / out.name(5)).write_bytes(b"no image")
    done = run("evaluate.py", trained, "--fit-fusion", "--set", f"data.root={root}", ranks=2)
    assert done.returncode == 0, done.stderr
    assert "1 held-out images cannot be decoded and do not count" in done.stderr
    assert out.name(5) in done.stderr
    assert "fitted on 39 of 40 held-out images" in done.stdout


def test_the_paired_interval_is_that_of_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    difference = rng.choice([-1, 0, 1], 2000, p=[0.04, 0.89, 0.07])
    better, worse = int((difference == 1).sum()), int((difference == -1).sum())
    low, high = paired_interval(better, worse, 2000)
    theirs = scipy.stats.bootstrap((difference,), np.mean, method="BCa", rng=1).confidence_interval
    assert (low, high) == pytest.approx((100 * theirs.low, 100 * theirs.high), abs=0.15)
    low, high = paired_interval(0, 0, 10)
    assert high == -low == pytest.approx(100 * 1.96 / 12 * 2**0.5), "ten images on which both agree prove little"
    assert paired_interval(0, 5, 5)[0] == -100


def test_the_paired_interval_holds_what_it_says_for_few_discordant_images() -> None:
    """Wald's interval without adjustment covers 93.8 % here, and has no width where no image is discordant."""
    counts = np.random.default_rng(0).multinomial(500, [0.010, 0.005, 0.985], 4000)
    covered = [low <= 0.5 <= high for low, high in (paired_interval(b, c, 500) for b, c, _ in counts)]
    assert 0.945 < np.mean(covered) < 0.985


def test_ranks_that_wait_are_told_that_the_fit_is_still_going_on() -> None:
    ready = threading.Event()
    work = fitting._in_thread(lambda: 7 if ready.wait() else 0)
    assert next(work) is None
    ready.set()
    assert ALONE.finish(work) == 7
