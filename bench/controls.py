"""Bands against controls of equal cost: trains every arm in every fold for every budget, and compares them.

    python bench/controls.py --images FOLDER … [--work runs/controls] [--arms …] [--folds 2] [--budgets 1,2]
    python bench/controls.py --only report
    python bench/controls.py --only report --results doc/controls/results.parquet

An arm is a config of config/controls. A budget is a multiple of the time in which the first arm, rgb128, trains for 10
epochs; each arm trains for as many epochs as its own time per step allows. doc/controls.md has the protocol.

FOLDER: class folders; several are pooled. --work holds everything: links to the images in folds, times, runs, and a
result of each finished run; what is there is not repeated, so the same command continues. The report writes all results
into one file, which --results takes on another machine with the same images. On a cluster, script/slurm/controls.sh
runs --shard I/N in each task of an array.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import step
import torch
from controls_arms import (
    ACCUMULATED,
    BASELINE,
    CONFIGS,
    FIRST,
    LRS,
    TEACHER_LR,
    TEACHERS,
    TOGETHER,
    VARIANTS,
    Times,
    config_of,
    grown,
    seconds_of,
)
from controls_report import CPU_TIMES, TIMES, report, require_images, unpack
from loguru import logger
from scipy.special import softmax
from tqdm import tqdm

from bandsplit.cli import entry
from bandsplit.config.schema import RunConfig
from bandsplit.cpus import available_cpus
from bandsplit.data import folders
from bandsplit.distributed.ranks import joined
from bandsplit.errors import UserError
from bandsplit.runs.files import replace_text
from bandsplit.runs.predictions import Predictions

REPOSITORY = Path(__file__).resolve().parent.parent
EPOCHS = 10
"""Of the baseline in budget 1."""
FOLDS = 5


@dataclass(frozen=True)
class Task:
    """One run."""

    arm: str
    fold: str
    """ "0" to "4", or "lr": a part of the training images of fold 0."""
    budget: float
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}/fold{self.fold}-x{self.budget:g}-lr{self.lr:g}-seed{self.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, nargs="+", default=[], metavar="FOLDER", help="folders of class folders")
    parser.add_argument("--work", type=Path, default=Path("runs/controls"))
    parser.add_argument("--arms", nargs="+", help="names of configs in config/controls (default: all)")
    parser.add_argument(
        "--folds", type=int, choices=range(1, FOLDS + 1), default=2, help="how many of them (default: 2)"
    )
    parser.add_argument(
        "--budgets", type=budgets_of, default="1,2", help="multiples of the time of the baseline (default: 1,2)"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=available_cpus(), help="runs at once, one thread each")
    parser.add_argument(
        "--shard", type=part_of, default="1/1", metavar="I/N", help="only every N-th run, from the I-th (default: 1/1)"
    )
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="results of earlier runs: controls.parquet of a report"
    )
    parser.add_argument("--only", choices=["prepare", "time", "train", "report"], help="one of the stages")
    arguments = parser.parse_args()
    entry.run(lambda: run(arguments))


def budgets_of(text: str) -> list[float]:
    """The type of an option that takes positive numbers."""
    try:
        budgets = [float(each) for each in text.split(",")]
    except ValueError:
        budgets = [0]
    if not all(0 < budget < math.inf for budget in budgets):
        raise argparse.ArgumentTypeError(f"{text!r} given, expected positive numbers such as 1,2")
    return budgets


def part_of(text: str) -> tuple[int, int]:
    """The type of an option I/N: I, counted from 0, and N."""
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} given, expected I/N with I from 1 to N")
    return int(number) - 1, int(of)


def run(arguments: argparse.Namespace) -> None:
    work, only = arguments.work, arguments.only
    known = sorted(path.stem for path in CONFIGS.glob("*.toml") if path.stem != "base")
    arms = arguments.arms or known
    if unknown := set(arms) - set(known):
        raise UserError(f"--arms {' '.join(sorted(unknown))}: no such arms; there are {', '.join(known)}")
    arms = sorted({*arms, BASELINE, *(TEACHERS[arm] for arm in arms if arm in TEACHERS)})
    work.mkdir(parents=True, exist_ok=True)
    if arguments.results:
        unpack(arguments.results, work)
    if only in (None, "prepare"):
        prepare(arguments.images, work)
    if only in (None, "time"):
        measure(arms, work)
    if only in (None, "train"):
        trained = [arm for arm in arms if arm != ACCUMULATED]
        folds, seeds = range(arguments.folds), range(arguments.seeds)
        train(trained, work, folds, arguments.budgets, seeds, arguments.jobs, arguments.shard)
    if only in (None, "report"):
        report(work)


# ---------------------------------------------------------------------------------------------------- images


def prepare(roots: Sequence[Path], work: Path) -> None:
    """Links all images into WORK/folds: FOLDS folds, stratified by class, and one within the training images of fold 0.

    An image is in the validation images of exactly one of the folds. Numbers and folds follow from the classes, the
    order of the roots, and names and sizes of the files, wherever these are. Raises UserError if earlier results are
    those of other images.
    """
    if (work / "images.csv").exists():
        return
    if not roots:
        raise UserError(f"--images: not given, and {work} holds no images yet")
    pooled = sorted(
        (os.fsdecode(name).partition("/")[0], number, str(found.folder / os.fsdecode(name)))
        for number, found in enumerate(map(folders.walk, roots))
        for name in found.names.to_pylist()
    )
    frame = pd.DataFrame(pooled, columns=["class", "root", "path"])
    require_images(work, digest_of(frame))
    rng = np.random.default_rng(0)
    place = frame.groupby("class")["path"].transform(lambda paths: rng.permutation(len(paths)))
    frame["fold"] = place % FOLDS
    frame["name"] = [f"{number:06d}{Path(path).suffix.lower()}" for number, path in enumerate(frame["path"])]
    unfinished = work / "folds.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    for fold in range(FOLDS):
        link(frame, frame["fold"] == fold, unfinished / str(fold))
    inner = frame[frame["fold"] != 0]
    link(inner, place[inner.index] // FOLDS % 5 == 0, unfinished / "lr")
    unfinished.rename(work / "folds")
    frame.to_csv(work / "images.csv", index=False)
    logger.info("{} images of {} classes in {} folds", len(frame), frame["class"].nunique(), FOLDS)


def digest_of(frame: pd.DataFrame) -> str:
    """Of classes, names and sizes of the images in their order."""
    paths = map(Path, frame["path"])
    lines = (f"{label}/{path.name} {path.stat().st_size}\n" for label, path in zip(frame["class"], paths, strict=True))
    return hashlib.blake2b("".join(lines).encode(errors="surrogateescape"), digest_size=16).hexdigest()


def link(frame: pd.DataFrame, val: pd.Series, root: Path) -> None:
    for (name, label, path), out in zip(frame[["name", "class", "path"]].itertuples(index=False), val, strict=True):
        target = root / ("val" if out else "train") / label / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)


# ---------------------------------------------------------------------------------------------------- time


def measure(arms: Sequence[str], work: Path) -> None:
    """Times of a step of every arm, one thread, in interleaved rounds; run it on an idle machine.

    Writes times.json, wall-clock time with DALI's thread on another core where there is one, and cpu_times.json, CPU
    time with DALI's thread. An arm of growing images is timed at each of its sizes; a distilled one with the forward
    pass of its teacher. Arms that are new are timed beside the baseline, and brought to its earlier time.
    """
    known = times_of(work) if (work / TIMES).exists() else {}
    new = set(arms) - set(known)
    if not new:
        return
    new |= {TEACHERS[arm] for arm in new & set(TEACHERS)}
    torch.set_num_threads(1)
    subjects, sizes = [], {}
    with joined() as ranks:
        for arm in sorted({*new, BASELINE}):
            config = config_of(arm, [f"data.root={(work / 'folds/0').absolute()}"])
            sizes[arm] = sorted({config.image_size_at(epoch) for epoch in range(config.train.epochs)})
            for size in sizes[arm]:
                plain = config.with_values({"data": {"image_size": size}, "augment": {"progressive": None}})
                plain = plain.model_copy(update={"name": f"{arm} {size}", "distillation": None})
                subjects.append(step.of_config(plain, ranks, synthetic=False))
        seconds, cpu_seconds, _ = step.timed(subjects, 7, 5, ranks.device)
    wall = {name: of["step"] for name, of in seconds.items()}
    for file, found in ((TIMES, wall), (CPU_TIMES, cpu_seconds)):
        times = {
            arm: {str(size): float(np.median(found[f"{arm} {size}"])) * config_of(arm).grad_accum_steps for size in of}
            for arm, of in sizes.items()
        }
        for arm in TEACHERS.keys() & times.keys():
            for size in times[arm]:
                of_teacher = seconds[f"{TEACHERS[arm]} {size}"]
                third = [each / 3 for each in of_teacher["step"]]  # CUDA graphs are timed as a whole
                times[arm][size] += float(np.median(of_teacher.get("forward", third)))
        before = json.loads((work / file).read_text()) if (work / file).exists() else {}
        if before:
            (then,), (now,) = before[BASELINE].values(), times[BASELINE].values()
            times = {arm: {size: time * then / now for size, time in of.items()} for arm, of in times.items()}
        replace_text(work / file, json.dumps(times | before, indent=2, sort_keys=True) + "\n")


def times_of(work: Path) -> Times:
    path = work / TIMES
    if not path.exists():
        raise UserError(f"{path}: not there yet; --only time writes it")
    times: Times = json.loads(path.read_text())
    return times


def steps_of(arm: str, images: int) -> int:
    """Steps of an epoch of an arm, which may hold out some of the training images."""
    config = config_of(arm)
    steps = int(images * (1 - (config.data.holdout or 0)) // config.train.batch_size)
    if not steps:
        raise UserError(f"{images} training images in a fold, fewer than a batch of {config.train.batch_size}")
    return steps


def epochs_of(arm: str, budget: float, images: int, times: Times) -> int:
    """As many epochs as fit into a budget, or 2 % more, at least two; a teacher's training is taken off first."""
    allowed = budget * seconds_of(BASELINE, EPOCHS, steps_of(BASELINE, images), times)
    if arm in TEACHERS:
        teacher = TEACHERS[arm]
        epochs = epochs_of(teacher, budget / 2, images, times)
        allowed -= seconds_of(teacher, epochs, steps_of(teacher, images), times)
    steps, epochs = steps_of(arm, images), 2
    while seconds_of(arm, epochs + 1, steps, times) <= allowed * 1.02:
        epochs += 1
    return epochs


# ---------------------------------------------------------------------------------------------------- training


def train(
    arms: Sequence[str],
    work: Path,
    folds: Sequence[int],
    budgets: Sequence[float],
    seeds: Sequence[int],
    jobs: int,
    shard: tuple[int, int],
) -> None:
    """Trains and evaluates what has no results yet, several runs at once: learning rates first, then fold by fold."""
    choose = [Task(arm, "lr", 0.5, lr, 0) for arm in arms for lr in LRS]
    run_all(choose, work, jobs, shard)
    rates = {arm: best_lr(arm, work) for arm in arms}
    missing = [arm for arm, lr in rates.items() if lr is None]
    if missing:  # other shards are not finished yet
        raise UserError(f"{work}: no learning rate yet for {', '.join(missing)}; start the same command again later")
    tasks = [
        Task(arm, str(fold), budget, rate, seed)
        for budget in budgets
        for seed in seeds
        for fold in folds
        for arm, rate in rates.items()
        if rate is not None
    ]
    run_all(tasks, work, jobs, shard)


def teachers_of(tasks: Sequence[Task]) -> list[Task]:
    """The runs whose logits distilled arms learn from."""
    return [replace(t, arm=TEACHERS[t.arm], budget=t.budget / 2, lr=TEACHER_LR) for t in tasks if t.arm in TEACHERS]


def missing_teachers(tasks: Sequence[Task], work: Path) -> list[Task]:
    """The teachers of runs that have no results yet; the result of one whose run is gone does not count."""
    teachers = teachers_of([task for task in tasks if not result_of(task, work).exists()])
    for teacher in teachers:
        if not (work / "runs" / teacher.name / "config.toml").exists():
            result_of(teacher, work).unlink(missing_ok=True)
    return teachers


def run_all(tasks: Sequence[Task], work: Path, jobs: int, shard: tuple[int, int]) -> None:
    """Trains what has no results yet of a shard of these runs and their teachers, teachers first.

    A run whose teacher another shard has not finished is left for the next time.
    """
    teachers = set(teachers_of(tasks))
    wanted = {*tasks, *missing_teachers(tasks, work)}
    own = [task for task in shard_of(tasks, shard) if task in wanted and not result_of(task, work).exists()]
    run_each([task for task in own if task in teachers], work, jobs)
    own = [task for task in own if task not in teachers]
    ready = [task for task in own if all(result_of(each, work).exists() for each in teachers_of([task]))]
    if len(ready) < len(own):
        logger.warning("{} runs wait for their teachers; start the same command again later", len(own) - len(ready))
    run_each(ready, work, jobs)


def shard_of(tasks: Sequence[Task], shard: tuple[int, int]) -> list[Task]:
    """The part of these runs and their teachers that belongs to a shard, whatever is finished."""
    return list(dict.fromkeys([*teachers_of(tasks), *tasks]))[shard[0] :: shard[1]]


def run_each(tasks: Sequence[Task], work: Path, jobs: int) -> None:
    with ThreadPoolExecutor(jobs) as pool:
        for _ in tqdm(pool.map(partial(run_one, work=work), tasks), total=len(tasks), unit="run", disable=None):
            pass


def result_of(task: Task, work: Path) -> Path:
    return work / "results" / f"{task.name.replace('/', '-')}.json"


def run_one(task: Task, work: Path) -> None:
    """Trains a run, or goes on with it, evaluates its last checkpoint, and writes its result."""
    times, root = times_of(work), (work / "folds" / task.fold).absolute()
    images = sum(1 for _ in (root / "train").rglob("*.*"))
    config = config_of(task.arm)
    epochs = epochs_of(task.arm, task.budget, images, times)
    run_dir = work / "runs" / task.name
    keys = [*grown(task.arm, epochs), f"optim.lr={task.lr}", f"seed={task.seed}", f"data.root={root}"]
    env = {"CONTROLS": str(root), "TEACHER": ""}
    if task.arm in TEACHERS:
        (teacher,) = teachers_of([task])
        env["TEACHER"] = str((work / "runs" / teacher.name).absolute())
    if (run_dir / "config.toml").exists():
        call("train.py", "--resume", "--run-dir", run_dir, env=env)
    else:
        call("train.py", CONFIGS / f"{task.arm}.toml", "--run-dir", run_dir, *sets(keys), env=env)
    runs = [Path(env["TEACHER"]), run_dir] if task.arm in TOGETHER else [run_dir]
    evaluations = {
        variant: evaluated(runs, config, task, overrides, env)
        for variant, overrides in {"": [], **VARIANTS.get(task.arm, {})}.items()
    }
    steps = steps_of(task.arm, images)
    seconds = seconds_of(task.arm, epochs, steps, times)
    if task.arm in TEACHERS:
        before = epochs_of(teacher.arm, teacher.budget, images, times)
        seconds += seconds_of(teacher.arm, before, steps_of(teacher.arm, images), times)
    table = {**asdict(task), "epochs": epochs, "steps": epochs * steps, "seconds": seconds, "evaluations": evaluations}
    result = result_of(task, work)
    result.parent.mkdir(exist_ok=True)
    replace_text(result, json.dumps(table) + "\n")


def evaluated(
    runs: Sequence[Path], config: RunConfig, task: Task, overrides: Sequence[str], env: dict[str, str]
) -> dict[str, Any]:
    """Accuracy of the last weights by fusion; for each image its number, whether it is right and how surely."""
    saved = runs[-1] / ("predictions_larger.npz" if overrides else "predictions.npz")
    fit = ["--fit-fusion"] if config.data.holdout and not overrides and task.fold != "lr" else []
    call("evaluate.py", *runs, "--checkpoint", "last", "--save", saved, *fit, *sets(overrides), env=env)
    found = Predictions.read(saved)
    numbers = np.array([int(Path(name).stem) for name in found.names])
    correct = found.fused.classes[:, :, 0] == found.labels[:, None]
    ways = {
        name: {
            "weights": weights,
            "top1": 100 * float(correct[:, n].mean()),
            "loss": float(found.fused.losses[:, n].mean()),
            "correct": correct[:, n].tolist(),
            "confidence": found.fused.confidences[:, n, 0].round(4).tolist(),
        }
        for n, (name, weights) in enumerate(found.fusions.items())
    }
    if len(found.branches) > 1 and found.logits is not None:
        probabilities = softmax(found.logits[:, 0].astype(np.float32), axis=1)
        ways[FIRST] = {
            "weights": [1.0] + [0.0] * (len(found.branches) - 1),
            "top1": 100 * float(found.branch_correct[:, 0, 0].mean()),
            "loss": float(-np.log(probabilities[np.arange(len(numbers)), found.labels]).mean()),
            "correct": found.branch_correct[:, 0, 0].tolist(),
            "confidence": probabilities.max(1).round(4).tolist(),
        }
    return {
        "images": numbers.tolist(),
        "branch_top1": (100 * found.branch_correct[:, :, 0].mean(0)).tolist(),
        "fusions": ways,
    }


def call(script: str, *arguments: object, env: dict[str, str]) -> None:
    """Raises UserError with the last lines of its output if a command fails."""
    command = [sys.executable, str(REPOSITORY / "src" / script), *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **env, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: exit code {done.returncode}:\n{done.stderr[-2000:]}")


def sets(overrides: Sequence[str]) -> list[str]:
    return [argument for override in overrides for argument in ("--set", override)]


def best_lr(arm: str, work: Path) -> float | None:
    """Of LRS, that of the higher accuracy on the split inside fold 0; None if not all have been tried."""
    top1 = {}
    for lr in LRS:
        result = result_of(Task(arm, "lr", 0.5, lr, 0), work)
        if not result.exists():
            return None
        top1[lr] = json.loads(result.read_text())["evaluations"][""]["fusions"]["mean"]["top1"]
    return max(top1, key=lambda lr: top1[lr])


if __name__ == "__main__":
    main()
