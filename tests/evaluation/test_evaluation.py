"""Evaluation against naive computations, for any batch size and any number of ranks; its files and its messages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassCalibrationError

from bandsplit.config import loading
from bandsplit.data.crops import CENTER, FLIP, TEN, Crop
from bandsplit.data.loader import Batch
from bandsplit.distributed.mesh import Mesh
from bandsplit.distributed.ranks import Ranks
from bandsplit.evaluation import collector
from bandsplit.evaluation.detailed import evaluate_in_detail
from bandsplit.evaluation.evaluate import evaluate
from bandsplit.evaluation.joined import Joined
from bandsplit.evaluation.measures import calibration, count_correct
from bandsplit.models.ensemble import Ensemble
from bandsplit.models.precision import Precision
from bandsplit.statistics import calibration_error
from tests.conftest import Done, run

ALONE = Mesh(Ranks(0, 1, 0, 1, torch.device("cpu")), 4)


def naive_counts(logits: Tensor, labels: Tensor) -> list[int]:
    """Top-1 and top-5 counts, one image at a time."""
    counts = [0, 0]
    for scores, label in zip(logits.tolist(), labels.tolist(), strict=True):
        order = sorted(range(len(scores)), key=lambda k: -scores[k])
        counts[0] += order[0] == label
        counts[1] += label in order[:5]
    return counts


@pytest.mark.parametrize("classes", [2, 5, 37])
def test_counts_are_the_naive_ones(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(3, 50, classes, generator=generator)
    labels = torch.randint(0, classes, (50,), generator=generator)
    assert count_correct(logits, labels).tolist() == [naive_counts(branch, labels) for branch in logits]


@pytest.mark.parametrize(("kind", "classes"), [(torch.bfloat16, 1000), (torch.int8, 7)])
def test_of_equal_logits_the_first_class_is_predicted_by_all_that_count(kind: torch.dtype, classes: int) -> None:
    """With ties at the top as autocast leaves them, and with more than five of them."""
    logits = torch.randn(4000, classes, generator=torch.Generator().manual_seed(classes)).to(kind).float()
    first = torch.tensor([row.index(max(row)) for row in logits.tolist()])
    ties = (logits == logits.amax(-1, keepdim=True)).sum(-1)
    assert (ties > 1).sum() > 20
    assert count_correct(logits, first).tolist() == [4000, 4000]
    assert int(calibration(logits, first)[:, 1].sum()) == 4000
    five = torch.from_numpy(collector.top(logits[None], first)["classes"][:, 0].numpy()).long()
    assert torch.equal(five[:, 0], first)
    assert torch.equal(logits.gather(-1, five), logits.topk(5).values)
    assert all(len({*row}) == 5 for row in five.tolist())


@pytest.mark.parametrize("batch_size", [1, 7, 20, 64])
def test_accuracy_does_not_depend_on_the_batches(config_file: Path, batch_size: int) -> None:
    config = loading.load(config_file)
    ensemble = Ensemble.of(config)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(20, 3, 16, 16, generator=generator) for _ in range(4)]
    labels = torch.randint(0, 10, (20,), generator=generator)

    parts = [slice(start, start + batch_size) for start in range(0, 20, batch_size)]
    batches = [Batch([x[part] for x in inputs], labels[part]) for part in parts]
    accuracy = evaluate(ensemble, batches, 20, ALONE, Precision("fp32", ALONE.ranks.device))
    ensemble.eval()
    with torch.no_grad():
        logits = ensemble(inputs)
    fused = logits.mean(dim=0)
    right = [naive_counts(each, labels) for each in (fused, *logits)]
    assert (accuracy.top1, accuracy.top5) == (5.0 * right[0][0], 5.0 * right[0][1])
    assert accuracy.branch_top1 == [5.0 * top1 for top1, _ in right[1:]]
    assert accuracy.branch_top5 == [5.0 * top5 for _, top5 in right[1:]]
    assert accuracy.loss == pytest.approx(float(torch.nn.functional.cross_entropy(fused, labels)), abs=1e-5)


def test_a_missing_image_is_noticed(config_file: Path) -> None:
    ensemble = Ensemble.of(loading.load(config_file))
    batch = Batch([torch.zeros(3, 3, 16, 16)] * 4, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(AssertionError, match="validated 3 images of 4"):
        evaluate(ensemble, [batch], 4, ALONE, Precision("fp32", ALONE.ranks.device))


def test_images_that_cannot_be_decoded_do_not_count(
    finished: Callable[..., Path], image_root: Path, tmp_path: Path, run_here: Callable[..., Done]
) -> None:
    """Where they were not found before: the others count once each, and the bad ones are named."""
    shutil.copytree(image_root / "val", tmp_path / "val")
    bad = sorted((tmp_path / "val").rglob("*.jpg"))[7:9]
    for path in bad:
        path.write_bytes(b"not an image")
    output = tmp_path / "accuracy.json"
    sets = ("--set", f"data.root={tmp_path}", "--set", "data.check=off")
    done = run_here("evaluate.py", finished(1), *sets, "--output", output)
    assert done.returncode == 0, done.stderr
    assert "48 images (2 left out, which cannot be decoded): loss " in done.stdout
    found = json.loads(output.read_text())
    assert (found["val_images"], found["left_out"]) == (48, 2)
    assert all(f"{path}: not an image of a known format" in done.stderr for path in bad)
    done = run_here("evaluate.py", finished(1), *sets, "--set", "data.max_bad=1")
    assert done.returncode == 2
    assert "error: 2 images cannot be read or decoded any more, and data.max_bad = 1" in done.stderr


def test_validation_images_alone_are_enough(
    finished: Callable[..., Path], image_root: Path, tmp_path: Path, run_here: Callable[..., Done]
) -> None:
    shutil.copytree(image_root / "val", tmp_path / "val")
    for root, output in ((image_root, "whole.json"), (tmp_path, "alone.json")):
        done = run_here("evaluate.py", finished(1), "--set", f"data.root={root}", "--output", tmp_path / output)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "alone.json").read_text() == (tmp_path / "whole.json").read_text()


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_the_calibration_error_is_that_of_torchmetrics_and_of_numpy(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = 3 * torch.randn(400, classes, generator=generator)
    labels = torch.where(
        torch.rand(400, generator=generator) < 0.6, logits.argmax(-1), torch.randint(0, classes, (400,))
    )
    bins = sum(calibration(x, y) for x, y in zip(logits.split(70), labels.split(70), strict=True))
    assert isinstance(bins, Tensor)
    ours = calibration_error(bins.tolist())

    theirs = MulticlassCalibrationError(classes, n_bins=15, norm="l1")(logits.double().softmax(-1), labels)
    assert ours == pytest.approx(100 * float(theirs), abs=1e-4)

    odds = np.exp(logits.double().numpy())
    probabilities = odds / odds.sum(1, keepdims=True)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels.numpy()
    naive = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            naive += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert ours == pytest.approx(100 * naive, abs=1e-9)


def test_padding_is_not_calibrated() -> None:
    logits, labels = torch.randn(8, 5), torch.arange(8) % 5
    padded = calibration(torch.cat([logits, logits[:3]]), torch.cat([labels, -torch.ones(3, dtype=torch.int64)]))
    assert torch.equal(padded, calibration(logits, labels))
    assert padded[:, 0].sum() == 8


@pytest.mark.parametrize(("option", "crops"), [("--flip", FLIP), ("--ten-crop", TEN)])
def test_crops_are_single_evaluations_averaged_by_hand(
    finished: Callable[..., Path], tmp_path: Path, option: str, crops: tuple[Crop, ...]
) -> None:
    run_dir, told = finished(1), []
    for ranks in (1, 2):
        done = run("evaluate.py", run_dir, option, "--output", tmp_path / "x.json", ranks=ranks)
        assert done.returncode == 0, done.stderr
        told.append(json.loads((tmp_path / "x.json").read_text()))
    runs = Joined.of([run_dir], "best", [], ALONE.ranks)
    files = runs.validation_files()
    runs.ensemble.eval()
    fused, alone = (torch.zeros(*shape, dtype=torch.float64) for shape in ((50, 10), (4, 50, 10)))
    with torch.no_grad():
        for crop in crops:
            batches = list(runs.loader(files, [crop]))
            logits = torch.cat([runs.ensemble(batch.inputs) for batch in batches], 1).double()
            labels = torch.cat([batch.labels for batch in batches])
            fused += logits[:, labels >= 0].mean(0).softmax(-1) / len(crops)
            alone += logits[:, labels >= 0].softmax(-1) / len(crops)
    labels = labels[labels >= 0]
    for table in told:
        assert (table["top1"], table["top5"]) == tuple(2.0 * count for count in naive_counts(fused, labels))
        assert table["branch_top1"] == [2.0 * naive_counts(branch, labels)[0] for branch in alone]
        assert table["loss"] == pytest.approx(float(-fused[range(50), labels].log().mean()), abs=1e-5)
        assert table["cumulative_top1"][0] == table["branch_top1"][0]
        assert table["cumulative_top1"][-1] == table["top1"]


@pytest.mark.parametrize("crops", [CENTER, FLIP])
def test_branches_are_added_one_by_one_largest_weight_first(
    finished: Callable[..., Path], crops: tuple[Crop, ...]
) -> None:
    """Every prefix summed anew in float64; a branch of weight 0 is not used, and the mean goes from branch 0 up."""
    weights = {"mean": [0.25] * 4, "learned": [0.2, 0.0, 0.7, 0.4], "none": [0.0] * 4}
    used = {"mean": [0, 1, 2, 3], "learned": [2, 3, 0], "none": [0, 1, 2, 3]}
    runs = Joined.of([finished(1)], "best", [], ALONE.ranks)
    files = runs.validation_files()
    given = {name: each for name, each in weights.items() if name != "mean"}
    found = evaluate_in_detail(runs.ensemble, runs.loader(files, crops), 50, runs.mesh, runs.precision, given)
    with torch.no_grad():
        batches = [
            (runs.ensemble(batch.inputs), batch.labels) for crop in crops for batch in runs.loader(files, [crop])
        ]
    logits, labels = torch.cat([each for each, _ in batches], 1).double(), torch.cat([each for _, each in batches])
    z, y = logits[:, labels >= 0].unflatten(1, (len(crops), 50)), labels[labels >= 0][:50]
    for name, order in used.items():
        each, w = found.fused[name], weights[name]
        assert each.order == order
        for n in range(1, len(order) + 1):
            scale = sum(w) / sum(w[k] for k in order[:n]) if sum(w) else 1
            fused = sum((scale * w[k] * z[k] for k in order[:n]), torch.zeros_like(z[0]))
            probabilities = fused.softmax(-1).mean(0) if len(crops) > 1 else fused[0]
            counts = [2.0 * count for count in naive_counts(probabilities, y)]
            assert [each.cumulative_top1[n - 1], each.cumulative_top5[n - 1]] == counts or name == "none"
        assert each.cumulative_top1[-1] == each.top1


def test_checkpoints_that_do_not_fit_are_told_in_one_message(
    finished: Callable[..., Path], tmp_path: Path, run_here: Callable[..., Done]
) -> None:
    run_dir = Path(shutil.copytree(finished(1), tmp_path / "run", symlinks=True))
    config = (run_dir / "config.toml").read_text()

    def refused(told: str, *arguments: object) -> None:
        done = run_here("evaluate.py", run_dir, "--checkpoint", "26", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert told in done.stderr
        assert "Traceback" not in done.stderr

    refused("--set data.classes: 11 given, but the networks of", "--set", "data.classes=11")
    folder = run_dir / "checkpoints/step_00000026"
    for change in (("classes = 10", "classes = 12"), ("width = 0.125", "width = 0.25")):
        assert change[0] in config
        (run_dir / "config.toml").write_text(config.replace(*change))
        refused(f"{folder}: these weights do not fit the networks of the config: ")
    (run_dir / "config.toml").write_text(config)
    path = folder / "branch_02.pt"
    path.write_bytes(path.read_bytes()[:-5000])
    refused(f"{folder}: this checkpoint is damaged: branch_02.pt")
    path.unlink()
    refused(f"{folder}: this checkpoint is damaged: branch_02.pt is missing; others: 13, 24")
