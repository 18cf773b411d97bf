"""A cascade, run: the same as on logits, on any number of ranks, and through the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from bandsplit.config import loading, schema
from bandsplit.errors import UserError
from bandsplit.evaluation import cascade as running
from bandsplit.evaluation.joined import Joined
from bandsplit.models import cascade, fusion
from bandsplit.models.cascade import Cascade
from bandsplit.models.costs import forward_macs
from bandsplit.runs import checkpoint
from bandsplit.runs.directory import RunDirectory
from bandsplit.runs.fitted import Fitted
from tests.conftest import Done, run
from tests.evaluation.test_fitting import ALONE, FIT, HELD_OUT


@pytest.fixture(scope="module")
def fitted_run(finished: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a cascade beside its checkpoint; its 40 held-out images can vouch for a loss of 10 points."""
    run_dir = Path(shutil.copytree(finished(1, *HELD_OUT), tmp_path_factory.mktemp("cascade") / "run", symlinks=True))
    done = run("evaluate.py", run_dir, "--fit-fusion", "--cascade", "10")
    assert done.returncode == 0, done.stderr
    return run_dir


def fusion_file(run_dir: Path) -> Path:
    return checkpoint.find(run_dir / "checkpoints", "best") / "fusion.json"


def found(run_dir: Path) -> Cascade:
    fitted = Fitted.read(fusion_file(run_dir))
    assert fitted is not None
    assert fitted.cascade is not None
    return fitted.cascade


@torch.inference_mode()
def test_the_stages_are_those_of_the_logits(fitted_run: Path) -> None:
    """Image by image, with batches of any size; with logits in float16 but for images at the threshold."""
    runs = Joined.of([fitted_run], "best", [], ALONE)
    runs.ensemble.eval()
    batches = list(runs.loader(runs.validation_files()))
    inputs = [torch.cat(each) for each in zip(*(batch.inputs for batch in batches), strict=True)]
    logits = runs.ensemble(inputs).transpose(0, 1).numpy()
    seen = set()
    chain = Cascade([2, 0, 3, 1], [0.6, 1.2, 0.4, 0.9], [1.5, 1.2, 1.1, 1.0], 0.0, 10.0)
    certain = cascade.apply(chain, logits).confidence
    for threshold in (0.0, *np.quantile(certain, [0.2, 0.5, 0.8]), 1.0):
        chain = replace(chain, threshold=float(threshold))
        expected = cascade.apply(chain, logits)
        halved = cascade.apply(chain, logits.astype(np.float16))
        near = np.abs(expected.confidence - threshold).min(1) < 1e-3
        assert np.all((halved.stages == expected.stages) | near)
        seen |= set(expected.stages.tolist())
        for size in (1, 7, 64):
            staged = running.Staged(runs.ensemble, chain, size)
            for part in zip(*(torch.split(x, 5) for x in inputs), strict=True):
                staged.add(part)
            predicted, stages = staged.finish()
            assert stages.tolist() == expected.stages.tolist()
            assert predicted.tolist() == expected.predicted.tolist()
    assert {0, 3} < seen
    nothing = running.Staged(runs.ensemble, chain, 7)
    nothing.add([x[:0] for x in inputs])
    assert [len(each) for each in (*nothing.finish(), runs.ensemble([x[:0] for x in inputs])[0])] == [0, 0, 0]


def test_counts_are_the_same_on_any_number_of_ranks(
    fitted_run: Path, tmp_path: Path, run_here: Callable[..., Done]
) -> None:
    tables: list[dict[str, Any]] = []
    for start in (run_here, partial(run, ranks=3)):
        save, output = tmp_path / "saved.npz", tmp_path / "x.json"
        done = start("evaluate.py", fitted_run, "--cascade", "10", "--save", save, "--output", output)
        assert done.returncode == 0, done.stderr
        tables.append(json.loads(output.read_text())["cascade"])
        assert tables[-1].pop("seconds") > 0
        assert tables[-1].pop("all_seconds") > 0
    assert tables[0] == tables[1]
    table = tables[0]
    left = np.array(table["left"])
    assert left.sum() == 50
    assert table["branches"] == pytest.approx(np.arange(1, len(left) + 1) @ left / 50)
    with np.load(save) as saved:
        applied = cascade.apply(found(fitted_run), saved["logits"])
        labels = saved["labels"]
    assert np.bincount(applied.stages, minlength=len(left)) == pytest.approx(left, abs=1)
    assert table["top1"] == pytest.approx(100 * np.mean(applied.predicted == labels), abs=2.001)
    assert table["full_top1"] == pytest.approx(100 * np.mean(applied.full == labels), abs=2.001)
    assert table["gain"] == pytest.approx(table["top1"] - table["full_top1"])


def test_multiplications_are_those_of_the_dry_run(fitted_run: Path) -> None:
    runs = Joined.of([fitted_run], "best", [], ALONE)
    expected = [forward_macs(branch.to("meta"), 3, 16) for branch in runs.ensemble.branches]
    assert running.branch_macs(Joined.of([fitted_run], "best", [], ALONE)) == expected


def test_a_cascade_outlives_another_fit_of_the_same_weights(
    fitted_run: Path, run_here: Callable[..., Done], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(fitted_run, tmp_path / "copy", symlinks=True))
    earlier = json.loads(fusion_file(copy).read_text())  # as earlier versions wrote it
    del earlier["held_out"]["prepared"], earlier["branches"][0]["digest"]
    learned = earlier["fusions"]["learned"]
    learned["weights"] = [0.9999 * weight for weight in learned["weights"]]  # of another device
    fusion_file(copy).write_text(json.dumps(earlier))
    assert run_here("evaluate.py", copy, "--fit-fusion").returncode == 0
    assert found(copy) == found(fitted_run)
    done = run_here("evaluate.py", copy, "--cascade", "10", "--set", "data.resize_size=33")
    assert done.returncode == 0
    assert "fusion was fitted on images prepared with" in done.stderr
    done = run_here("evaluate.py", copy, "--fit-fusion", "--set", "data.resize_size=33")
    assert done.returncode == 0
    assert "its cascade was fitted for other weights or images; --cascade fits it anew" in done.stderr


def test_what_has_no_cascade_says_so(fitted_run: Path, run_here: Callable[..., Done], tmp_path: Path) -> None:
    for option, message in (
        (("--cascade", "2.5"), f"fusion.json: its cascade is for a loss of 10; {FIT}"),
        (("--cascade", "2", "--fit-fusion"), "--cascade 2: 40 held-out images cannot vouch for a loss of at most 2"),
        (("--cascade", "10", "--flip"), "--cascade 10: stages are fitted to the center crop"),
        (("--cascade", "x"), "'x' given, expected a number between 0 and 100"),
    ):
        done = run_here("evaluate.py", fitted_run, *option)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    old = Path(shutil.copytree(fitted_run, tmp_path / "old", symlinks=True))
    table = json.loads(fusion_file(old).read_text())
    del table["cascade"], table["fusions"]["drop"]
    fusion_file(old).write_text(json.dumps({**table, "format": 1}))
    assert run_here("evaluate.py", old, "--fusion", "learned").returncode == 0
    for option, message in (
        (("--cascade", "10"), f"it has no cascade; {FIT} {old} --fit-fusion --cascade 10"),
        (("--fusion", "drop"), "it has no fusion 'drop'; fit it with"),
    ):
        done = run_here("evaluate.py", old, *option)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    table["cascade"] = {"order": [0, 9], "weights": [1, 1], "scales": [1, 1], "threshold": 0.5, "loss": 10}
    fusion_file(old).write_text(json.dumps({**table, "format": 2}))
    done = run_here("evaluate.py", old, "--cascade", "10")
    assert (done.returncode, "order of the cascade: [0, 9], but there are 4 branches" in done.stderr) == (2, True)


def test_the_config_names_the_fusion(fitted_run: Path, run_here: Callable[..., Done], tmp_path: Path) -> None:
    """`--fusion` overrides it; without held-out images nothing but the mean can be named."""
    output = tmp_path / "x.json"
    by_config = ("--set", "fusion.method=drop")
    for options, expected in ((by_config, "drop"), ((*by_config, "--fusion", "mean"), "mean")):
        done = run_here("evaluate.py", fitted_run, *options, "--output", output)
        assert done.returncode == 0, done.stderr
        assert json.loads(output.read_text())["fusion"] == expected
    copy = Path(shutil.copytree(fitted_run, tmp_path / "unfitted", symlinks=True))
    fusion_file(copy).unlink()
    done = run_here("evaluate.py", copy, *by_config)
    assert done.returncode == 2
    assert f"fusion.method = 'drop': {fusion_file(copy)}: no such file; fit it with python" in done.stderr

    assert get_args(schema.Fusion.model_fields["method"].annotation) == fusion.FUSIONS
    config = loading.load(copy / "config.toml", ["fusion.method=learned"])
    RunDirectory(copy).check(config, resume=True)  # it may change
    with pytest.raises(UserError, match=r"'learned' given; allowed: 'mean', unless data.holdout takes images out"):
        loading.load(copy / "config.toml", ["fusion.method=learned", "data.holdout=none"])
