"""report.py --compare, and its tables in LaTeX."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from bandsplit.cli.report import main
from bandsplit.errors import UserError
from bandsplit.reporting import compare, report
from bandsplit.reporting.compare import Side
from bandsplit.runs.predictions import Fused, Predictions
from tests.reporting.synthetic import predictions
from tests.reporting.test_report import curve, finished, groups_of, write_run


def side(name: str, *folders: Path) -> Side:
    return compare.side(name, folders, groups_of(*folders))


def save_predictions(folder: Path, right: Sequence[bool], step: int = 1, first: int = 0, crops: str = "center") -> None:
    """Predictions of two fusions, in use the one that is right where `right` says so; the other one is not there.

    `step`: -1 to save the images in reverse order; `first`: number in the name of the first image.
    """
    made = predictions(images=len(right), held_out=50)
    used = list(made.fusions).index(made.fusion)
    wrong = (made.labels + 1) % len(made.classes)
    classes = made.fused.classes.copy()
    classes[:, :, 0] = np.where(right, wrong, made.labels)[:, None]
    classes[:, used, 0] = np.where(right, made.labels, wrong)
    names = [f"{first + i}.jpg" for i in range(len(right))]
    replace(
        made,
        names=names[::step],
        crops=crops,
        labels=made.labels[::step],
        fused=Fused(classes[::step], made.fused.confidences, made.fused.losses),
    ).write(folder / "predictions.npz")


def test_time_and_steps_to_reach_an_accuracy(tmp_path: Path) -> None:
    """The first validation that reaches it counts; A takes half the time of B, and as many steps."""
    a = side("A", *(write_run(tmp_path / f"a{n}", finished([10, 30, 50, 40]), seed=n) for n in (0, 1)))
    b = side("B", write_run(tmp_path / "b", finished([20, 39, 60], pace=2.0), name="other"))
    assert compare.levels([*a.runs, *b.runs]) == [20, 30, 40, 50]
    found = compare.efforts(a, b)
    assert set(found) == {"seconds", "step"}
    assert found["step"].values == {
        20: ([200, 200], [100]), 30: ([200, 200], [200]), 40: ([300, 300], [300]), 50: ([300, 300], [300])
    }  # fmt: skip
    assert found["seconds"].label == "Training time (min)"
    assert [found["seconds"].ratio(top1) for top1 in (20, 30, 40, 50)] == [1, 0.5, 0.5, 0.5]
    numbers = compare.compare_table(a, b).numbers.set_index(["quantity", "top1"])
    assert list(numbers.loc[("step", 30), ["a", "a_two_sd", "b", "ratio"]]) == [200, 0, 200, 1]


@pytest.mark.parametrize("right", [570, 999])
def test_a_level_is_reached_by_the_run_that_defines_it(tmp_path: Path, right: int) -> None:
    """Accuracies of 1,000 images as the evaluation has them, with a first one so close that ticks are fine."""
    top1 = [100 * count / 1000 for count in (right - 6, right, right + 1)]
    each = side("A", write_run(tmp_path / "a", finished(top1)))
    other = side("B", write_run(tmp_path / "b", finished([top1[0], *top1[:2]]), name="other"))
    found = compare.levels([*each.runs, *other.runs])
    assert found[-1] == pytest.approx(top1[1], abs=1e-9)
    assert found == [round(level, 2) for level in found]
    for a, b in (compare.efforts(each, other)["step"].values[level] for level in found):
        assert (a, b) == ([200], [300])


def test_sides_of_one_group_in_progress_have_their_own_epochs(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / str(n), curve([50] * n), seed=n) for n in (1, 3)]
    groups = groups_of(*folders)
    a, b = (compare.side(name, [folder], groups) for name, folder in zip("AB", folders, strict=True))
    epochs = [f"net (in progress, epoch {n} of 90)" for n in (1, 3)]
    assert [each.group.label for each in (a, b)] == epochs
    told = compare.difference_notes(a, b)[0]
    assert told.startswith("Top-1 at the last validation (of A at epoch 1, of B at epoch 3): A 50.00, B 50.00;")


def test_the_interval_over_seeds_is_welchs() -> None:
    a, b = [70.0, 71.0, 73.0], [60.0, 64.0]
    difference, interval = compare.difference_over_seeds(a, b)
    va, vb = np.var(a, ddof=1) / 3, np.var(b, ddof=1) / 2
    freedom = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 1)
    half = stats.t.ppf(0.975, freedom) * (va + vb) ** 0.5
    assert difference == pytest.approx(71 + 1 / 3 - 62)
    assert interval == pytest.approx((difference - half, difference + half))
    assert compare.difference_over_seeds([70.0], b)[1] is None
    assert compare.difference_over_seeds([70.0, 70.0], [60.0, 60.0])[1] is None


def test_the_paired_interval_over_images_is_that_of_the_discordant_ones() -> None:
    """With many images it approaches the normal interval of paired proportions, and pairing makes it narrower."""
    rng = np.random.default_rng(1)
    a = (rng.random(4000) < 0.7).astype(float)
    b = np.where(rng.random(4000) < 0.9, a, 1 - a)
    difference, interval = compare.difference_over_images(a, b)
    half = 1.96 * np.std(a - b) / len(a) ** 0.5
    assert difference == pytest.approx(a.mean() - b.mean())
    assert interval == pytest.approx((difference - half, difference + half), abs=0.1 * half)
    assert half < 0.6 * 1.96 * (np.var(a) + np.var(b)) ** 0.5 / len(a) ** 0.5


def test_the_bootstrap_is_that_of_scipy() -> None:
    """Which draws every image. Shares of several seeds, 300 images."""
    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 4, (2, 300)) / 3
    found = stats.bootstrap(
        (a, b),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        n_resamples=10_000,
        paired=True,
        method="percentile",
        rng=3,
    )
    _, interval = compare.difference_over_images(a, b)
    assert interval == pytest.approx(tuple(found.confidence_interval), abs=0.003)
    means = compare.resampled_means(np.stack([a, b]))
    assert means.mean(0) == pytest.approx([a.mean(), b.mean()], abs=0.001)
    spread = np.cov(a, b, bias=True) / 300
    np.testing.assert_allclose(np.cov(means.T), spread, atol=0.05 * spread[0, 0])


def test_saved_predictions_are_paired_by_name(tmp_path: Path) -> None:
    right = np.array([True] * 60 + [False] * 40)
    folders = [write_run(tmp_path / name, finished([50]), name=name) for name in "ab"]
    a, b = (side(name, folder) for name, folder in zip("AB", folders, strict=True))
    told = compare.difference_notes(a, b)
    assert told[0].endswith("A − B = +0.00 points. No interval over seeds, which takes two runs on both sides.")
    assert told[1] == f"No interval over images: {folders[0] / 'predictions.npz'} is not there."
    save_predictions(folders[0], right)
    save_predictions(folders[1], right, step=-1)
    equal = compare.saved(b.runs)
    assert isinstance(equal, compare.Saved)
    assert equal.correct.loc["3.jpg"] == 1
    assert equal.correct.loc["99.jpg"] == 0
    about = "step 100, learned fusion, branches of synthetic"
    same = (
        f"Saved predictions of the same 100 images (A: {about}; B: {about}): A 60.00, B 60.00; A − B = +0.00 points, "
        "95 % interval +0.00 to +0.00 (paired bootstrap over images, 10,000 resamples; A and B differ on 0 images, too "
        "few for a reliable interval)."
    )
    assert compare.difference_notes(a, b)[1] == same
    save_predictions(folders[1], right, crops="ten")
    assert "are of the crops 'center', those of B of 'ten'" in compare.difference_notes(a, b)[1]
    save_predictions(folders[1], right)
    made = Predictions.read(folders[1] / "predictions.npz")
    early = [replace(branch, step=40) for branch in made.branches]
    replace(made, branches=early).write(folders[1] / "predictions.npz")
    assert "B: step 40 of 100, learned fusion" in compare.difference_notes(a, b)[1]
    replace(made, classes=made.classes[::-1]).write(folders[1] / "predictions.npz")
    assert "A and of B have different labels for the same images" in compare.difference_notes(a, b)[1]
    assert "have different labels for the same images" in str(compare.saved([*a.runs, *b.runs]))
    replace(made, folder="/data/v2/val").write(folders[1] / "predictions.npz")
    assert "Saved predictions of the same 100 images of /data/v2/val (A: " in compare.difference_notes(a, b)[1]
    save_predictions(folders[1], ~right)
    assert "A 60.00, B 40.00; A − B = +20.00 points" in compare.difference_notes(a, b)[1]
    save_predictions(folders[1], right, first=1)
    assert "of A and of B are of different images" in compare.difference_notes(a, b)[1]
    replace(made, names=["0.jpg", *made.names[:-1]]).write(folders[1] / "predictions.npz")
    assert f"{folders[1] / 'predictions.npz'} has several images of the same name." in compare.difference_notes(a, b)[1]
    (folders[1] / "predictions.npz").write_bytes(b"PK\3\4")
    assert (
        f"{folders[1] / 'predictions.npz'}: not the predictions of src/evaluate.py --save, or damaged"
        in compare.difference_notes(a, b)[1]
    )


def test_a_seed_counts_once(tmp_path: Path) -> None:
    """Copies of a run are no further evidence."""
    a, b = ([write_run(tmp_path / f"{s}{n}", finished([50 + n]), seed=n * (s == "b")) for n in (0, 1)] for s in "ab")
    told = compare.difference_notes(side("A", *a), side("B", *b))[0]
    assert told.endswith("No interval over seeds: several runs of a side have the same seed.")
    assert "95 % interval" in compare.difference_notes(side("A", *b), side("B", *b))[0]
    groups = groups_of(*a), groups_of(*b)
    notes = [report.make_tables(each)["table"].notes for each in groups]
    assert notes == [["net: 2 runs of seed 0 count as 2, but tell nothing of the spread between seeds."], []]


def test_command_compares_sets_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a = [write_run(tmp_path / f"a{n}", finished([50, 60 + n]), seed=n) for n in range(2)]
    b = [write_run(tmp_path / f"b{n}", finished([40, 50 + n], pace=2.0), seed=n, name="slow") for n in range(2)]
    both = [",".join(map(str, each)) for each in (a, b)]
    monkeypatch.setattr("sys.argv", ["report.py", "--compare", *both, "--output", str(tmp_path / "out")])
    main()
    text = (tmp_path / "out/compare.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "A: net, n = 2.\n\nB: slow, n = 2." in text
    assert "A − B = +10.00 points, 95 % interval" in text
    assert {path.suffix for path in (tmp_path / "out").glob("compare.*")} == {
        ".md",
        ".csv",
        ".tex",
        ".png",
        ".svg",
        ".pdf",
    }


def test_what_cannot_be_compared_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, other = (write_run(tmp_path / name, finished([50]), name=name) for name in ("good", "other"))
    with pytest.raises(UserError, match="these runs differ in more than their seeds: good; other"):
        report.report([], tmp_path / "out", ([good, other], [good]))
    running = write_run(tmp_path / "running", finished([50])[:-1], seed=1, name="good")
    with pytest.raises(UserError, match="some of these runs are finished and some are not: good; good \\(in progress"):
        report.report([], tmp_path / "out", ([good, running], [good]))
    with pytest.raises(UserError, match="nowhere: no such folder"):
        report.report([good], tmp_path / "out", ([good], [tmp_path / "nowhere"]))
    early = write_run(tmp_path / "early", curve([50])[:1], name="early")
    with pytest.raises(UserError, match=f"--compare {early}: no validation yet"):
        report.report([], tmp_path / "out", ([good], [early]))
    monkeypatch.setattr("sys.argv", ["report.py"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "no run directory or file of predictions is given" in capsys.readouterr().err


def test_latex_tables_compile(tmp_path: Path) -> None:
    """With names that hold characters with a meaning in LaTeX, and labels that are longer than a line."""
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex")
    name = r"50%_of & #1 $x^2$ {~} \n"
    folders = [write_run(tmp_path / str(n), finished([50, 60 + n]), seed=n, name=name) for n in range(2)]
    folders.append(write_run(tmp_path / "b_%", curve([55]), name=name, batch_size=512))
    groups = groups_of(*folders)
    sides = [compare.side("A", folders[:2], groups), compare.side("B", folders[2:], groups)]
    for table, each in report.make_tables(groups, sides).items():
        each.write(tmp_path, table)
    inputs = "\n".join(rf"\input{{{table}}}" for table in ("table", "costs", "compare"))
    document = rf"\documentclass{{article}}\usepackage{{booktabs,graphicx}}\begin{{document}}{inputs}\end{{document}}"
    (tmp_path / "paper.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout
    assert "Overfull" not in done.stdout
    assert "undefined" not in done.stdout
