"""Results of bench/controls.py: one file per run, all in one table, and curves from these."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from controls_arms import BASELINE, TEACHER_LR, TEACHERS, seconds_of
from controls_curves import Correct, Curve

from bandsplit.errors import UserError
from bandsplit.runs.files import reading, replace_text

TIMES, CPU_TIMES, IMAGES, DEVICE = "times.json", "cpu_times.json", "images.json", "device.json"
"""In a work folder: what a step of each arm takes, the digest of the images, and the device, "cpu" or a GPU's name."""

RUN_COLUMNS = ("arm", "fold", "budget", "lr", "seed", "epochs", "steps", "seconds")
SCORE_COLUMNS = ("weights", "top1", "loss", "correct", "confidence")


def collected(work: Path) -> pd.DataFrame:
    """All results, a row for each fusion of each evaluation of each run; times and digest of the images in `attrs`."""
    rows = []
    for path in sorted((work / "results").glob("*.json")):
        run = json.loads(path.read_text())
        about = {key: value for key, value in run.items() if key != "evaluations"}
        for variant, evaluation in run["evaluations"].items():
            shared = {"variant": variant, "branch_top1": evaluation["branch_top1"], "image": evaluation["images"]}
            for fusion, scores in evaluation["fusions"].items():
                rows.append({"file": path.name, **about, **shared, "fusion": fusion, **scores})
    frame = pd.DataFrame(rows)
    for file in (TIMES, CPU_TIMES, IMAGES, DEVICE):
        if (work / file).exists():
            frame.attrs[Path(file).stem] = json.loads((work / file).read_text())
    return frame


def unpack(file: Path, work: Path) -> None:
    """Writes the results and times of a report into WORK where they are missing there.

    Raises UserError if the file holds no results, or those of other images or of another device than those of WORK.
    """
    try:
        with reading(file):
            frame = pd.read_parquet(file)
    except pa.ArrowInvalid:
        frame = pd.DataFrame()
    if not {"file", "variant", "fusion", *RUN_COLUMNS, *SCORE_COLUMNS} <= set(frame.columns):
        raise UserError(f"--results {file}: no results; expected controls.parquet of a report")
    (work / "results").mkdir(parents=True, exist_ok=True)
    source = f"--results {file}"
    require(work, DEVICE, device_in(frame), source)
    if Path(IMAGES).stem in frame.attrs:
        require(work, IMAGES, frame.attrs[Path(IMAGES).stem], source)
    for name in (TIMES, CPU_TIMES):
        if Path(name).stem in frame.attrs and not (work / name).exists():
            replace_text(work / name, json.dumps(frame.attrs[Path(name).stem], indent=2) + "\n")
    for name, rows in frame.groupby("file"):
        path = work / "results" / str(name)
        if path.exists():
            continue
        first = rows.iloc[0]
        run: dict[str, Any] = {key: first[key] for key in RUN_COLUMNS} | {"evaluations": {}}
        for row in rows.itertuples():
            shared = {"images": row.image, "branch_top1": row.branch_top1, "fusions": {}}
            evaluation = run["evaluations"].setdefault(row.variant, shared)
            evaluation["fusions"][row.fusion] = {key: getattr(row, key) for key in SCORE_COLUMNS}
        replace_text(path, json.dumps(run, default=lambda value: value.tolist()) + "\n")


def require(work: Path, file: str, value: str, source: str) -> None:
    """Notes what the times and results of WORK are of: images by their digest, device by its name.

    Raises UserError if it has noted others than those of `source`.
    """
    path = work / file
    if not path.exists():
        replace_text(path, json.dumps(value) + "\n")
    elif (noted := json.loads(path.read_text())) != value:
        if file == IMAGES:
            raise UserError(f"{source}: other images than those of {work}; use another --work")
        ways = "use another --work, without --results, or hide GPUs (CUDA_VISIBLE_DEVICES=)"
        raise UserError(f"{source}: device {value}, but times and results in {work} are of device {noted}; {ways}")


def device_in(frame: pd.DataFrame) -> str:
    """The device of times and results; the first reports, all of CPUs, did not note it."""
    device: str = frame.attrs.get(Path(DEVICE).stem, "cpu")
    return device


def timed_on(frame: pd.DataFrame) -> str:
    """Where training time was measured, as words after "minutes"."""
    device = device_in(frame)
    return "of one thread" if device == "cpu" else f"on {device}"


def chosen(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs of arms and budgets with all folds and seeds of the baseline; without what has only begun.

    A column `other_rate` is true for runs with another learning rate than that of their arm, which were trained to see
    what the choice costs. Those that only served as teachers are left out.
    """
    rows = compared(frame)
    return rows[rows["complete"]]


def compared(frame: pd.DataFrame) -> pd.DataFrame:
    """What `chosen` chooses from: a column `complete` is true for what it takes."""
    tried = frame[(frame["fold"] == "lr") & (frame["budget"] == 0.5) & (frame["variant"] == "")]
    tried = tried[tried["fusion"] == "mean"]
    best = tried.sort_values(["top1", "lr"], ascending=[False, True]).groupby("arm")["lr"].first()
    rate = frame["arm"].map(best)
    other = rate.notna() & (rate != frame["lr"])
    teaches = frame["arm"].isin(TEACHERS.values()) & (frame["lr"] == TEACHER_LR)
    left_out = (frame["fold"] == "lr") | (other & (teaches | (frame["variant"] != "")))
    rows = frame.assign(other_rate=other)[~left_out]
    groups = rows.groupby(["arm", "budget", "lr"])
    folds = {key: set(zip(group["fold"], group["seed"], strict=True)) for key, group in groups}
    of_baseline = {
        budget: folds[arm, budget, lr] for arm, budget, lr in folds if arm == BASELINE and lr == best.get(arm, lr)
    }
    keys = zip(rows["arm"], rows["budget"], rows["lr"], strict=True)
    return rows.assign(complete=[folds[key] == of_baseline.get(key[1]) for key in keys])


def read(frame: pd.DataFrame) -> list[Curve]:
    """The curves of all arms, from what `collected` returns."""
    images = 1 + max(max(numbers) for numbers in frame["image"])
    found: dict[tuple[str, str, str, bool], dict[float, list[tuple[float, float, Correct]]]] = {}
    for run in chosen(frame).itertuples():
        if run.fusion not in ("mean", "learned"):
            continue
        several = len(run.branch_top1) > 1
        rate, fusion = f"lr {run.lr:g}" * run.other_rate, f"({run.fusion})" * several
        label = " ".join(filter(None, [run.arm, run.variant, rate, fusion]))
        correct = np.full(images, np.nan)
        correct[run.image] = run.correct
        budgets = found.setdefault((run.arm, label, run.variant, run.other_rate), {})
        budgets.setdefault(run.budget, []).append((run.seconds, cpu_seconds_of(run, frame), correct))
    return [curve_of(*names, budgets) for names, budgets in found.items()]


def cpu_seconds_of(run: Any, frame: pd.DataFrame) -> float:
    """CPU time of a run, with its teacher's; NaN where it was not measured, and for runs on a GPU."""
    times = frame.attrs.get("cpu_times", {})
    if run.arm not in times or device_in(frame) != "cpu":
        return math.nan
    own = seconds_of(run.arm, run.epochs, run.steps // run.epochs, times)
    if run.arm not in TEACHERS:
        return own
    same = (frame["fold"] == run.fold) & (frame["seed"] == run.seed) & (frame["budget"] == run.budget / 2)
    teachers = frame[same & (frame["arm"] == TEACHERS[run.arm]) & (frame["lr"] == TEACHER_LR)]
    return own + next((cpu_seconds_of(teacher, frame) for teacher in teachers.itertuples()), math.nan)


def curve_of(
    arm: str, label: str, variant: str, other_rate: bool, budgets: dict[float, list[tuple[float, float, Correct]]]
) -> Curve:
    order = sorted(budgets)
    correct = []
    for budget in order:
        stack = np.stack([each for _, _, each in budgets[budget]])
        count = (~np.isnan(stack)).sum(0)
        correct.append(np.where(count > 0, np.nansum(stack, 0) / np.maximum(count, 1), np.nan))
    seconds, cpu_seconds = ([float(np.mean([run[n] for run in budgets[budget]])) for budget in order] for n in (0, 1))
    runs = [len(budgets[budget]) for budget in order]
    return Curve(arm, label, variant, other_rate, seconds, cpu_seconds, order, correct, runs)
