"""report.py on saved predictions: every number against an independent one, figures, files and messages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.special
import torch
from matplotlib.figure import Figure
from PIL import Image

from bandsplit.errors import UserError
from bandsplit.evaluation import measures
from bandsplit.reporting.predictions import report
from bandsplit.reporting.predictions.figures import FIGURES, short, short_names
from bandsplit.reporting.predictions.results import Results, calibration
from bandsplit.reporting.predictions.sheet import mistakes
from bandsplit.reporting.predictions.tables import markdown, summary, tables
from bandsplit.runs.predictions import Predictions
from bandsplit.statistics import paired_interval
from tests.conftest import Done
from tests.reporting.synthetic import predictions


@pytest.mark.parametrize(("branches", "classes"), [(1, 3), (4, 10)])
def test_every_number_is_the_naive_one(branches: int, classes: int) -> None:
    p = predictions(400, branches, classes, held_out=100)
    results, z = Results(p), np.asarray(p.logits, dtype=float)
    fused = {name: np.einsum("k,nkc->nc", w, z) for name, w in p.fusions.items()}
    right = {name: each.argmax(1) == p.labels for name, each in fused.items()}
    for name, each in results.fusions.items():
        log_p = scipy.special.log_softmax(fused[name], axis=1)
        order = np.argsort(-fused[name], axis=1)[:, :5]
        assert each.top1 == pytest.approx(100 * right[name].mean())
        assert each.top5 == pytest.approx(100 * (order == p.labels[:, None]).any(1).mean())
        assert each.loss == pytest.approx(-log_p[np.arange(400), p.labels].mean(), abs=1e-5)
        better, worse = (right[name] & ~right["mean"]).sum(), (right["mean"] & ~right[name]).sum()
        assert each.gain == pytest.approx(each.top1 - results.fusions["mean"].top1)
        as_the_mean = name in ("mean", "temperature") or branches == 1  # by construction
        assert each.gain_interval == ((0, 0) if as_the_mean else paired_interval(better, worse, 400))
    assert results.branch_top[:, 0] == pytest.approx(100 * (z.argmax(2) == p.labels[:, None]).mean(0))

    predicted = fused[p.fusion].argmax(1)
    made = tables(results)
    matrix = pd.crosstab(p.labels, predicted).reindex(index=range(classes), columns=range(classes), fill_value=0)
    listed = {(a, b): n for a, b, n in made["confusions"][["true", "predicted", "images"]].itertuples(index=False)}
    pairs = [(a, b) for a in range(classes) for b in range(classes) if a != b and matrix.loc[a, b]]
    assert listed == {(f"class{a}", f"class{b}"): matrix.loc[a, b] for a, b in pairs}
    assert list(made["confusions"]["images"]) == sorted(listed.values(), reverse=True)
    diagonal = np.diag(matrix.to_numpy())
    assert made["classes"]["top1"].to_numpy() == pytest.approx(100 * diagonal / matrix.sum(axis=1).to_numpy())
    for row in made["classes"].itertuples():
        wrong = matrix.loc[row.Index].drop(row.Index)
        assert row.times == wrong.max()

    for curve in results.growth:
        weights = np.array(p.fusions["learned"]) if "learned" in curve.label else np.ones(branches)
        for n in range(1, branches + 1):
            some = curve.order[:n]
            part = np.einsum("k,nkc->nc", weights[some], z[:, some])
            assert curve.top1[n - 1] == pytest.approx(100 * (part.argmax(1) == p.labels).mean(), abs=0.26)
        assert sorted(curve.order) == list(range(branches))
    assert results.growth[-1].top1[0] == max(results.branch_top[:, 0]) or branches == 1


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_calibration_is_that_of_the_evaluation(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits, labels = 3 * torch.randn(500, classes, generator=generator), torch.arange(500) % classes
    confidence, predicted = logits.double().softmax(-1).max(-1)
    ours = calibration(confidence.numpy(), (predicted == labels).numpy())
    assert np.allclose(ours, measures.calibration(logits, labels), atol=1e-9)


def test_a_bin_holds_its_upper_edge() -> None:
    edges = np.linspace(0, 1, 16)[1:]
    ours = calibration(edges, np.ones(15, dtype=bool))
    assert ours[:, 0].tolist() == [1] * 15


@pytest.mark.parametrize(
    ("branches", "classes", "held_out", "missing"),
    [
        (1, 10, 0, {"fusions", "weights", "bands", "growth"}),
        (2, 2, 50, set()),
        (36, 10, 50, set()),
        (4, 1000, 0, {"fusions", "weights"}),
    ],
)
def test_figures_there_are(branches: int, classes: int, held_out: int, missing: set[str]) -> None:
    results = Results(predictions(300, branches, classes, held_out))
    drawn = {name: draw(results) for name, draw in FIGURES.items()}
    assert {name for name, each in drawn.items() if isinstance(each, str)} == missing
    for each in drawn.values():
        if isinstance(each, Figure):
            each.draw_without_rendering()
    assert len(summary(results, tables(results)).splitlines()) < 90 + branches


@pytest.mark.parametrize("classes", [10, 30])
def test_the_classes_of_a_sample_are_not_said_to_be_of_all_images(classes: int) -> None:
    whole = predictions(300, 1, classes)
    for p, of in ((whole, "all images"), (replace(whole, images=301), "the sample")):
        figure = FIGURES["classes"](Results(p))
        assert isinstance(figure, Figure)
        (told,) = [text for axes in figure.axes if "dashed" in (text := axes.get_title() + axes.get_title(loc="left"))]
        assert f"; dashed: {of}, " in told


def test_bands_are_at_their_place_in_the_block() -> None:
    p = predictions(100, 3, 10)
    p = replace(p, block=2, branches=[replace(b, bands=(k,)) for b, k in zip(p.branches, (3, 0, 1), strict=True)])
    figure = FIGURES["bands"](Results(p))
    assert isinstance(figure, Figure)
    shown = figure.axes[0].collections[0].get_array().reshape(2, 2)
    top1 = Results(p).branch_top[:, 0]
    assert shown[1, 1] == top1[0]
    assert (shown[0, 0], shown[0, 1]) == (top1[1], top1[2])
    assert np.ma.getmaskarray(shown).tolist() == [[False, False], [True, False]]
    two = replace(p, branches=[replace(p.branches[0], bands=(0, 1)), *p.branches[1:]])
    assert FIGURES["bands"](Results(two)) == "not every branch reads one band of its own"


@pytest.mark.slow
def test_the_reports_say_what_the_evaluation_printed(
    finished: Callable[..., Path], image_root: Path, tmp_path: Path, run_here: Callable[..., Done]
) -> None:
    """On a run with held-out images: its two reports; what is fused alone; the images elsewhere, or nowhere."""
    run_dir = Path(shutil.copytree(finished(1, "data.holdout=4", "train.epochs=4"), tmp_path / "run", symlinks=True))
    saved, output = run_dir / "predictions.npz", tmp_path / "evaluation.json"
    done = run_here("evaluate.py", run_dir, "--fit-fusion", "--fusion", "learned", "--save", saved, "--output", output)
    assert done.returncode == 0, done.stderr
    told = json.loads(output.read_text())
    reported = run_here("report.py", run_dir)
    assert reported.returncode == 0, reported.stderr
    assert (run_dir / "plots/table.md").exists()
    folder = run_dir / "predictions"
    text = (folder / "summary.md").read_text()
    assert text in reported.stdout
    for name, each in told["fusions"].items():
        low, high = each["gain_interval"]
        gain = "" if name == "mean" else f"{each['gain']:+.2f} ({low:+.2f} to {high:+.2f})"
        cells = [name, f"{each['top1']:.2f}", f"{each['top5']:.2f}", f"{each['loss']:.4f}", f"{each['ece']:.2f}", gain]
        assert cells in [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    branches = pd.read_csv(folder / "branches.csv")
    assert branches["top1"].tolist() == told["branch_top1"]
    assert branches["top5"].tolist() == told["branch_top5"]
    names = {path.stem for path in folder.glob("*.png")}
    assert names == {*FIGURES, "mistakes"}
    for suffix, begins in (("svg", b"<?xml"), ("pdf", b"%PDF")):
        assert {path.stem for path in folder.glob(f"*.{suffix}")} == names
        assert all(path.read_bytes().startswith(begins) for path in folder.glob(f"*.{suffix}"))

    assert run_here("evaluate.py", run_dir, "--save", tmp_path / "fused.npz", "--save-fused").returncode == 0
    shutil.copytree(image_root / "val", tmp_path / "elsewhere")
    p = replace(Predictions.read(tmp_path / "fused.npz"), folder=str(tmp_path / "gone"))
    fused = Results(p)
    drawn = {name: draw(fused) for name, draw in FIGURES.items()}
    left_out = {name: each for name, each in drawn.items() if isinstance(each, str)}
    assert left_out == {"growth": "the file has no logits of the branches"}
    told_why = mistakes(fused, None)
    assert told_why == f"{tmp_path / 'gone'}: no such folder; --images names the folder of the images"
    assert isinstance(mistakes(fused, tmp_path / "elsewhere"), Figure)
    again = tables(fused)
    for name in ("fusions", "branches"):
        pd.testing.assert_frame_equal(again[name], pd.read_csv(folder / f"{name}.csv"), atol=1e-5)


def test_the_most_confident_mistakes_are_shown(tmp_path: Path) -> None:
    """True class, predicted class and confidence, in order, without those whose image is gone or damaged."""
    results = Results(predictions(60, 1, 3))
    p = results.predictions
    wrong = sorted(np.flatnonzero(results.predicted != p.labels), key=lambda row: -results.confidence[row])
    for number, row in enumerate(wrong):
        path = tmp_path / p.names[row]
        path.parent.mkdir(exist_ok=True)
        if number == 0:
            path.write_bytes(b"no image")
        elif number > 1:
            Image.new("CMYK" if number % 2 else "L", (40 + number, 30)).save(path)
    figure = mistakes(results, tmp_path)
    assert isinstance(figure, Figure)
    shown = [axes.get_title(loc="left").split("\n") for axes in figure.axes if axes.images]
    assert len(shown) == min(24, len(wrong) - 2)
    for (true, predicted, confidence), row in zip(shown, wrong[2:], strict=False):
        assert (true, predicted) == (f"class{p.labels[row]}", f"→ class{results.predicted[row]}")
        assert float(confidence.removesuffix(" %")) == pytest.approx(100 * results.confidence[row], abs=0.1)


@pytest.mark.parametrize(("value", "dtype"), [(100 * 257, np.uint16), (100 / 255, np.float32)])
def test_gray_of_many_levels_is_not_clipped(tmp_path: Path, value: float, dtype: type) -> None:
    results = Results(predictions(60, 1, 3))
    row = np.flatnonzero(results.predicted != results.predictions.labels)[0]
    path = (tmp_path / results.predictions.names[row]).with_suffix(".tiff")
    path.parent.mkdir()
    Image.fromarray(np.full((30, 40), value, dtype)).save(path)
    path.rename(tmp_path / results.predictions.names[row])
    figure = mistakes(results, tmp_path)
    assert isinstance(figure, Figure)
    assert (np.asarray(figure.axes[0].images[0].get_array()) == 100).all()


def test_an_ensemble_without_mistakes() -> None:
    p = predictions(50, 1, 40)
    p.fused.classes[:, :, 0] = p.labels[:, None]
    results = Results(p)
    assert FIGURES["confusion"](results) == "there are no mistakes"
    assert mistakes(results, Path()) == "there are no mistakes"
    assert "Most confused" not in summary(results, tables(results))


@pytest.mark.slow
def test_odd_names_of_classes_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bars, dollars, line breaks, bytes that are not UTF-8, two of one name, long ones, some that begin alike."""
    names = ["a|b", "$x_", "\udcff", "new\nline", "crane", "crane", "tench, Tinca tinca, of the fresh waters of Europe"]
    predictions(100, 2, 7, held_out=20, names=names).write(tmp_path / "x.npz")
    report.report([tmp_path / "x.npz"])
    text = (tmp_path / "x/summary.md").read_text()
    assert all(shown in text for shown in (r"a\|b", "$x_", "�", "new line", "fresh waters"))
    assert {line.count("|") - line.count(r"\|") for line in text.split("## Most")[1].splitlines()[2:]} == {5}
    told = pd.read_csv(tmp_path / "x/classes.csv")
    cranes = ["crane (class4)", "crane (class5)"]
    assert told["class"].tolist() == ["a|b", "$x_", "�", "new\nline", *cranes, names[-1]]
    assert told["folder"].tolist() == [f"class{c}" for c in range(7)]
    assert (short(names[-1], 24), short(names[-1], 20)) == ("tench, Tinca tinca, of…", "tench, Tinca tinca…")
    alike = ["Scottish deerhound of the north", "Scottish deerhound of the south", "coho"]
    cut = short_names(Results(predictions(20, 1, 5, names=[*alike, alike[0], alike[0]])), 24)
    assert (len({*cut}), max(map(len, cut)), cut[2]) == (5, 24, "coho")
    assert (short("n01440764_tench", 10), short("tench", 5)) == ("n01440764…", "tench")


def test_files_that_cannot_be_read_are_named(
    tmp_path: Path, run_here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message each, and the others are drawn; files of one name get different folders."""
    monkeypatch.setattr(report, "FIGURES", {})
    good = predictions(50, 1, 3)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        good.write(tmp_path / folder / "x.npz")
    bad, none, out = tmp_path / "bad.npz", tmp_path / "none.npz", tmp_path / "out"
    bad.write_bytes(b"PK")
    done = run_here("report.py", bad, tmp_path / "one/x.npz", tmp_path / "two/x.npz", "--output", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"left out: {bad}: not the predictions of src/evaluate.py --save") == 1
    assert {path.name for path in out.iterdir()} == {"one-x", "two-x"}
    done = run_here("report.py", bad, none)
    assert done.returncode == 2
    first, *others = done.stderr.splitlines()
    assert first == "error: none of these can be drawn:"
    assert [line.split(": ")[:2] for line in others] == [
        [str(bad), "not the predictions of src/evaluate.py --save, or damaged"],
        [str(none), "no such file"],
    ]
    (tmp_path / "one/x").touch()
    with pytest.raises(UserError, match="x: exists and is not a folder; --output names another folder"):
        report.report([tmp_path / "one/x.npz"])


def test_files_of_one_name_get_folders_of_their_own(tmp_path: Path) -> None:
    files = [tmp_path / f"{place}/predictions.npz" for place in ("h1/demo", "h2/demo", "h2/other")]
    folders = {report._folder(file, files, tmp_path / "out") for file in files}
    assert folders == {tmp_path / f"out/{name}-predictions" for name in ("h1-demo", "h2-demo", "h2-other")}
    assert report._folder(files[0], files[:1] * 2, tmp_path) == tmp_path / "demo-predictions"
    files = [Path("/runs/predictions.npz"), Path("/data/runs/predictions.npz")]
    folders = {report._folder(file, files, tmp_path) for file in files}
    assert folders == {tmp_path / "runs-predictions", tmp_path / "data-runs-predictions"}


def test_markdown_is_aligned() -> None:
    table = markdown(pd.DataFrame({"name": ["a", "long"], "n": ["1", "1,000"]}))
    assert table.splitlines() == ["| name |     n |", "| ---- | ----: |", "| a    |     1 |", "| long | 1,000 |"]
