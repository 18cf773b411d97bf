"""bench/controls.py: folds, budgets, and the comparison of results; all arms are configs."""

from __future__ import annotations

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from bandsplit.errors import UserError
from bandsplit.runs.metrics import Metrics
from tests.conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "bench"))

import controls
import controls_arms
import controls_curves
import controls_report
import controls_results

ARMS = sorted(path.stem for path in controls_arms.CONFIGS.glob("*.toml") if path.stem != "base")


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.endswith("_growing")])
def test_images_grow_within_the_fewest_epochs(arm: str) -> None:
    assert controls_arms.config_of(arm, controls.grown(arm, 2)).train.epochs == 2


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_config_of_a_family_and_of_the_page(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTROLS", "images")
    monkeypatch.setenv("TEACHER", "run")
    config = controls_arms.config_of(arm, controls.grown(arm, 20))
    assert config.train.epochs == 20
    if config.augment.progressive:
        assert config.image_size_at(0) < config.image_size_at(15) == config.data.image_size
    assert sum(arm in arms for arms in controls_arms.FAMILIES.values()) == 1
    assert len(config.split.groups) == 1 or config.data.holdout
    page = (REPOSITORY / "doc/controls.md").read_text()
    assert f"`{arm}`" in page or (arm.startswith("coarse2_") and f"`_{arm.removeprefix('coarse2_')}`" in page)


def test_folds_are_stratified_and_each_image_is_validated_once(tmp_path: Path) -> None:
    roots = [tmp_path / "a", tmp_path / "b"]
    for n, root in enumerate(roots):
        for label, count in (("cat", 23), ("dog", 11 + n)):
            (root / label).mkdir(parents=True)
            for i in range(count):
                (root / label / f"{i}.jpg").write_bytes(f"{n}{label}{i}".encode())
    controls.prepare(roots, tmp_path, range(5))
    pooled = len(pd.read_csv(tmp_path / "images.csv"))
    assert pooled == 69
    names = {part: [files(tmp_path / f"folds/{fold}/{part}") for fold in range(5)] for part in ("train", "val")}
    assert sorted(name for fold in names["val"] for name in fold) == sorted({*names["val"][0], *names["train"][0]})
    for train, val in zip(names["train"], names["val"], strict=True):
        assert not {*train} & {*val}
        assert len(train) + len(val) == pooled
    assert {sum("cat" in name for name in fold) for fold in names["val"]} <= {9, 10}
    inner = [files(tmp_path / f"folds/lr/{part}") for part in ("train", "val")]
    assert sorted([*inner[0], *inner[1]]) == names["train"][0]
    assert len(inner[1]) == pytest.approx(len(names["train"][0]) / 5, abs=2)


def test_numbers_and_folds_do_not_depend_on_where_the_images_are(tmp_path: Path) -> None:
    for place in ("z", "a"):
        for n, part in enumerate(("train", "val") if place == "z" else ("second", "first")):  # sorts the other way
            (tmp_path / place / part / "cat").mkdir(parents=True)
            for i in range(9):
                (tmp_path / place / part / f"cat/{i}.jpg").write_bytes(b"image" * (1 + n + i))
    for place, parts in (("z", ("train", "val")), ("a", ("second", "first"))):
        work = tmp_path / f"work_{place}"
        work.mkdir()
        controls.prepare([tmp_path / place / part for part in parts], work, [0])
    one, other = (pd.read_csv(tmp_path / f"work_{place}/images.csv") for place in "za")
    assert (one[["class", "fold", "name"]] == other[["class", "fold", "name"]]).all(axis=None)
    noted = [(tmp_path / f"work_{place}/images.json").read_text() for place in "za"]
    assert noted[0] == noted[1]
    (tmp_path / "results").mkdir()
    (tmp_path / "results/images.json").write_text(noted[0])
    with pytest.raises(UserError, match="--images: other images than those of"):
        controls.prepare([tmp_path / "a/second"], tmp_path / "results", [0])


def files(folder: Path) -> list[str]:
    assert all(path.read_bytes() for path in folder.rglob("*.jpg"))
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))


def test_arms_train_as_long_as_the_baseline() -> None:
    times = {"rgb128": {"128": 1.0}, "rgb64": {"64": 0.3}, "rgb128_growing": {"64": 0.3, "96": 0.6, "128": 1.0}}
    times |= {"coarse2_x4": {"128": 1.3}, "coarse2_distilled": {"128": 0.4}}
    epochs = partial(controls.epochs_of, images=6400, times=times)

    def seconds(arm: str, epochs: int) -> float:
        return controls.seconds_of(arm, epochs, controls.steps_of(arm, 6400), times)

    assert seconds("rgb128", epochs("rgb128", 1)) == 10 * 100
    assert epochs("rgb64", 2) == 67  # 68 would be more than 2 % above
    assert 1000 - 100 < seconds("rgb128_growing", epochs("rgb128_growing", 1)) <= 1020
    assert controls.steps_of("coarse2_x4", 6400) == 95, "5 % are held out"
    assert 1000 - 1.3 * 95 < seconds("coarse2_x4", epochs("coarse2_x4", 1)) <= 1020
    teacher = seconds("coarse2_x4", epochs("coarse2_x4", 0.5))
    with pytest.raises(UserError, match="fewer than a batch of 64"):
        controls.epochs_of("rgb64", 1, 63, times)
    assert 1000 - 40 < teacher + seconds("coarse2_distilled", epochs("coarse2_distilled", 1)) <= 1020


TASKS = [
    controls.Task(arm, fold, budget, 0.05, 0)
    for budget in (1.0, 2.0)
    for fold in "01"
    for arm in ("rgb128", "rgb64", "each_distilled", "low", "stagewise")
]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[controls.Task]:
    """Runs in the order in which they end, which they do at once."""
    runs: list[controls.Task] = []

    def train(task: controls.Task, place: controls.Place, gpu: str) -> None:
        teacher = controls.teacher_of(task)
        assert teacher is None or Metrics(place.work / "runs" / teacher.name / "metrics.jsonl").ended
        Metrics(begun(task, place.work)).write("end", step=1)
        controls.result_of(task, place.work).touch()
        runs.append(task)

    monkeypatch.setattr(controls, "run_one", train)
    return runs


def begun(task: controls.Task, work: Path) -> Path:
    (work / "results").mkdir(exist_ok=True)
    (work / "runs" / task.name).mkdir(parents=True, exist_ok=True)
    return work / "runs" / task.name / "metrics.jsonl"


def test_shards_train_every_run_once_and_teachers_first(tmp_path: Path, trained: list[controls.Task]) -> None:
    """Whichever shard is the first: none waits for another one."""
    for part in (2, 0, 1, 2, 0, 1):
        controls.run_all(TASKS, controls.Place(tmp_path, 1, 1, (part, 3)))
    teachers = [teacher for task in TASKS if (teacher := controls.teacher_of(task))]
    assert len(trained) == len(set(trained))
    assert set(trained) == {*TASKS, *teachers}


def test_a_teacher_whose_run_is_elsewhere_or_was_stopped_is_trained(
    tmp_path: Path, trained: list[controls.Task]
) -> None:
    """Its result alone, from another machine, is no teacher; nor is what a killed start has left of the run."""
    student = controls.Task("each_distilled", "0", 2.0, 0.05, 0)
    teacher = controls.teacher_of(student)
    assert teacher is not None
    Metrics(begun(teacher, tmp_path)).write("train", step=1)
    controls.result_of(teacher, tmp_path).touch()
    controls.run_all([teacher, student], controls.Place(tmp_path, 1, 1))
    assert trained == [teacher, student]
    controls.run_all([teacher, student], controls.Place(tmp_path, 1, 1))
    assert len(trained) == 2


def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def train(task: controls.Task, place: controls.Place, gpu: str) -> None:
        if task.arm == "low":
            raise UserError(f"{task.name} failed")
        done.append(task)

    monkeypatch.setattr(controls, "run_one", train)
    with pytest.raises(UserError, match="^low/fold0-x1-lr0.05-seed0 failed\nlow/fold1-x1-lr0.05-seed0 failed$"):
        controls.run_each(TASKS[:10], controls.Place(tmp_path, 2, 1))
    assert len(done) == 8


def test_runs_share_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four jobs on two GPUs: each has two of four runs at once."""
    together, used = threading.Barrier(4), []

    def train(task: controls.Task, place: controls.Place, gpu: str) -> None:
        together.wait(10)
        used.append(gpu)

    monkeypatch.setattr(controls, "run_one", train)
    controls.run_each(TASKS[:4], controls.Place(tmp_path, 4, 1, ("2", "3")))
    assert sorted(used) == ["2", "2", "3", "3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jobs", "0"], "argument --jobs: '0' given, expected a positive integer"),
        (["--results", "{folder}/times.json"], "times.json: no results; expected controls.parquet of a report"),
        (["--only", "train"], "no learning rates yet: rgb128; --only rates tries them, in all shards"),
        (["--only", "rates", "--arms", "low"], "times.json: no times of low; --only time with --arms measures them"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_have_one_message(
    tmp_path: Path,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "times.json").write_text('{"rgb128": {"128": 0.3}}')
    words = [option.format(folder=tmp_path) for option in options]
    monkeypatch.setattr(sys, "argv", ["controls.py", "--work", str(tmp_path), "--arms", "rgb128", *words])
    with pytest.raises(SystemExit) as ended:
        controls.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)


def test_results_of_another_device_are_refused(tmp_path: Path) -> None:
    for _ in range(2):
        controls_results.require(tmp_path, controls_results.DEVICE, "NVIDIA H100", "this machine")
    results = REPOSITORY / "doc/controls/drawn.parquet"  # which does not name its device
    with pytest.raises(UserError, match=r"drawn.parquet: device cpu, but .* are of device NVIDIA H100; use another"):
        controls_results.unpack(results, tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*.json")) == ["device.json"]


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [
        (None, 0, []),
        (None, 2, ["0", "1"]),
        ("", 0, []),
        ("2,3", 2, ["2", "3"]),
        ("3,9,1", 1, ["3"]),  # CUDA stops at the first that is not there
        ("MIG-3f2a", 1, ["MIG-3f2a"]),
    ],
)
def test_gpus_have_the_names_of_the_job(
    visible: str | None, count: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(controls.torch.cuda, "device_count", lambda: count)
    assert controls.visible_gpus() == expected


@pytest.mark.parametrize("gpu", ["", "3"])
def test_a_run_sees_its_gpu_and_has_its_own_epochs(gpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It began with other times, of which 15 epochs were right."""
    task, seen = controls.Task("rgb64", "0", 1.0, 0.05, 0), []
    (tmp_path / "times.json").write_text('{"rgb128": {"128": 1.0}, "rgb64": {"64": 0.5}}')
    (tmp_path / "folds/0/train").mkdir(parents=True)
    for number in range(64):
        (tmp_path / f"folds/0/train/{number}.jpg").touch()
    begun(task, tmp_path).with_name("config.toml").write_text("[train]\nepochs = 15\n")
    monkeypatch.setattr(controls, "call", lambda *_, env: seen.append(env.get("CUDA_VISIBLE_DEVICES")))
    monkeypatch.setattr(controls, "evaluated", lambda *_: {})
    controls.run_one(task, controls.Place(tmp_path, 1, 1), gpu)
    assert seen == [gpu or None]
    found = json.loads(controls.result_of(task, tmp_path).read_text())
    assert (found["epochs"], found["steps"], found["seconds"]) == (15, 15, 7.5)


def test_tasks_of_an_array_unpack_the_same_results(tmp_path: Path) -> None:
    """At once, into the same folder."""
    results = REPOSITORY / "doc/controls/longer.parquet"
    options = controls.parsed(["--work", str(tmp_path), "--results", str(results), "--only", "train", "--arms", "low"])
    with ThreadPoolExecutor() as pool:
        for task in [pool.submit(controls.run, options) for _ in range(4)]:
            assert "no learning rates yet: low, rgb128;" in str(task.exception())
    assert len([*tmp_path.glob("results/*.json")]) == pd.read_parquet(results)["file"].nunique()
    assert json.loads((tmp_path / "times.json").read_text()).keys() >= {"rgb128"}


def test_pairs_are_of_arms() -> None:
    labels = {label for pair in controls_arms.PAIRS for label in pair}
    assert {label.split()[0] for label in labels} <= set(ARMS)


def test_what_a_prediction_costs() -> None:
    macs, first = controls_arms.macs_of, controls_arms.FIRST
    assert macs("each_dct2d") == 4 * macs("each_dct2d", first)
    assert macs("rgb80", variant="at 104") == pytest.approx(macs("rgb80") * (104 / 80) ** 2, rel=0.1)
    assert macs("stagewise") == macs("low") + macs("stagewise", first), "the teacher predicts too"
    assert controls_arms.parameters_of("stagewise") > 2 * controls_arms.parameters_of("low")
    student, alone = (controls_arms.memory_of(arm) for arm in ("coarse2_distilled", "coarse2"))
    assert student.weights == 5 * alone.weights, "with a teacher of four such networks"


def test_results_are_compared_image_by_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    fold = np.arange(1000) % 5
    (tmp_path / "times.json").write_text('{"rgb128": {"128": 0.5}}')
    (tmp_path / "results").mkdir()
    right: dict[tuple[str, float], list[np.typing.NDArray[np.int64]]] = {}
    for arm, rates in (
        ("rgb128", (0.6, 0.7)),
        ("coarse2", (0.7, 0.8)),
        ("rgb128_deep", (0.4, 0.5)),
        ("rgb64", (0.3, 0.4)),
    ):
        for budget, rate in zip((1.0, 2.0), rates, strict=True):
            for number in (0, 1):
                rows = np.flatnonzero(fold == number)
                correct = rows[rng.random(200) < rate]
                right.setdefault((arm, budget), []).append(correct)
                scores = {"correct": np.isin(rows, correct).tolist(), "confidence": rng.random(200).tolist()}
                run = {"arm": arm, "fold": str(number), "budget": budget, "seconds": 100 * budget}
                run |= {"lr": 0.1, "seed": 0, "epochs": 3, "steps": 9}
                fusions = {"mean": {"weights": [1.0], "top1": 1.0, "loss": 1.0, **scores}}
                run["evaluations"] = {"": {"images": rows.tolist(), "branch_top1": [0.0], "fusions": fusions}}
                (tmp_path / f"results/{arm}-{budget}-{number}.json").write_text(json.dumps(run))
    chosen = [json.loads(path.read_text()) for path in sorted((tmp_path / "results").glob("*-1.0-0.json"))]
    for run, lr, top1 in [(run, lr, top1) for run in chosen for lr, top1 in ((0.05, 1.0), (0.1, 2.0))]:
        run = json.loads(json.dumps(run | {"fold": "lr", "budget": 0.5, "lr": lr}))
        run["evaluations"][""]["fusions"]["mean"]["top1"] = top1
        (tmp_path / f"results/{run['arm']}-lr-{lr}.json").write_text(json.dumps(run))
    for run in chosen:  # a teacher, which has another learning rate, and a budget that has only begun
        run["evaluations"][""]["fusions"]["mean"]["correct"] = [False] * 200
        if run["arm"] == "rgb128":
            (tmp_path / f"results/{run['arm']}-teacher.json").write_text(json.dumps(run | {"lr": 0.05}))
        if run["arm"] != "rgb128":
            (tmp_path / f"results/{run['arm']}-4.0-0.json").write_text(json.dumps(run | {"budget": 4.0}))
    for number in (0, 1):
        run = json.loads((tmp_path / f"results/rgb64-1.0-{number}.json").read_text())
        (tmp_path / f"results/rgb64-other-{number}.json").write_text(json.dumps(run | {"lr": 0.05}))
    frame = controls_report.table(controls_results.read(controls_results.collected(tmp_path))).set_index(
        ["arm", "budget"]
    )
    assert sorted(frame.index) == sorted([*right, ("rgb64 lr 0.05", 1.0)])
    assert frame.loc[("rgb64 lr 0.05", 1.0), "top1"] == frame.loc[("rgb64", 1.0), "top1"]
    for key, parts in right.items():
        assert frame.loc[key, "top1"] == pytest.approx(sum(map(len, parts)) / 4)
        assert frame.loc[key, "images"] == 400
    above = frame.loc[("coarse2", 1.0)]
    assert above.top1_above == pytest.approx(above.top1 - frame.loc[("rgb128", 1.0)].top1)
    assert above.low < above.top1_above < above.high
    assert above.high - above.low == pytest.approx(2 * 1.96 * 100 * (0.24 + 0.21) ** 0.5 / 20, rel=0.15)
    assert frame.loc[("rgb128", 2.0)].time_ratio == pytest.approx(1)
    assert 0.45 < frame.loc[("coarse2", 2.0)].time_ratio < 0.65
    monkeypatch.setattr(controls_report, "PAIRS", (("coarse2", "rgb64 lr 0.05"), ("coarse2", "rgb80")))
    controls_report.report(tmp_path)
    assert (tmp_path / "report/controls.pdf").stat().st_size > 5000
    text = (tmp_path / "report/controls.md").read_text()
    apart = frame.loc[("coarse2", 1.0), "top1"] - frame.loc[("rgb64 lr 0.05", 1.0), "top1"]
    assert f"| coarse2 | rgb64 lr 0.05 | {apart:+.2f} (" in text
    assert "| coarse2 | rgb80 |" not in text, "which was not trained"
    left_out = text.partition("| not continued |")[2].partition("\n\n")[0].splitlines()[2:]
    (line,) = left_out  # rgb64 is worse and costs less, rgb128 is the baseline
    assert line.startswith("| rgb128_deep | coarse2 | +")
    assert "not those of rgb128: coarse2 at 4, rgb128_deep at 4, rgb64 at 4\n" in text
    runs = controls_results.chosen(controls_results.collected(tmp_path))
    cascade = controls_report.cascades(runs)
    assert cascade.count("| rgb64 → rgb128 |") == 2
    assert controls_report.cascades(pd.concat([runs, runs.assign(seed=1)])) == cascade, "no more images than before"
    (tmp_path / "cpu_times.json").write_text('{"rgb128": {"128": 1.0}, "coarse2": {"128": 1.5}}')
    curves = controls_results.read(controls_results.collected(tmp_path))
    assert {curve.arm: curve.cpu_seconds for curve in curves}["coarse2"] == pytest.approx([13.5, 13.5])
    base = next(curve for curve in curves if curve.arm == "rgb128")
    between = controls_curves.at_cpu_time(replace(base, cpu_seconds=[100.0, 400.0]), 200.0)
    assert between is not None
    assert 100 * np.nanmean(between) == pytest.approx((base.top1(1.0) + base.top1(2.0)) / 2)
    assert controls_curves.at_cpu_time(replace(base, cpu_seconds=[100.0, 400.0]), 405.0) is None
    controls_results.unpack(tmp_path / "report/controls.parquet", tmp_path / "again")
    for path in tmp_path.glob("results/*.json"):
        assert json.loads((tmp_path / "again/results" / path.name).read_text()) == json.loads(path.read_text())
    assert (tmp_path / "again/times.json").read_text().split() == ["{", '"rgb128":', "{", '"128":', "0.5", "}", "}"]


def test_a_cascade_asks_the_second_where_the_first_is_unsure() -> None:
    """The second is always right, the first where it is sure: nothing is lost, and half of the images are enough."""
    rng = np.random.default_rng(0)
    image, sure = rng.permutation(4000), rng.random(4000)
    other = rng.permutation(image)
    run = SimpleNamespace(
        image=image, confidence=sure, correct=sure > 0.5, image_2=other, correct_2=np.ones(4000, dtype=bool)
    )
    right, second, asked = controls_report.halves(run, 0.0)
    assert right.all()
    assert second.all()
    assert 0.47 < asked.mean() < 0.53
    run.correct_2 = other % 2 == 0  # in its own order
    assert (controls_report.halves(run, 0.0)[1] == (image % 2 == 0)).all()
    assert controls_report.halves(run, 1.0)[2].sum() == 0
