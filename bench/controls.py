"""Bands against controls of equal cost: trains every arm in every fold for every budget, and compares them.

    python bench/controls.py --images FOLDER … [--work runs/controls] [--arms …] [--folds 0,1] [--budgets 1,2]
    python bench/controls.py --only report
    python bench/controls.py --only report --results doc/controls/results.parquet

An arm is a config of config/controls. A budget is a multiple of the time in which the first arm, rgb128, trains for 10
epochs; each arm trains for as many epochs as its own time per step allows. doc/controls.md has the protocol.

FOLDER: class folders; several are pooled. --work holds everything: links to the images in folds, times, runs, and a
result of each finished run; what is there is not repeated, so the same command continues. The report writes all results
into one file, which --results takes on another machine with the same images. --arms, --folds and --budgets do not limit
the report. On a cluster, script/slurm/controls.sh runs --shard I/N in each task of an array.
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
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import common
import numpy as np
import pandas as pd
import step
import tomli
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
from controls_report import report
from controls_results import CPU_TIMES, DEVICE, IMAGES, TIMES, require, unpack
from filelock import FileLock, Timeout
from loguru import logger
from scipy.special import softmax
from tqdm import tqdm

from bandsplit.cli import entry
from bandsplit.config.schema import RunConfig
from bandsplit.cpus import available_cpus
from bandsplit.data import folders
from bandsplit.distributed.ranks import joined
from bandsplit.errors import UserError
from bandsplit.paths import writing_to
from bandsplit.runs.files import replace_text
from bandsplit.runs.metrics import Metrics
from bandsplit.runs.predictions import Predictions

REPOSITORY = Path(__file__).resolve().parent.parent
STAGES = ("prepare", "time", "rates", "train", "report")
EPOCHS = 10
"""Of the baseline in budget 1."""
FOLDS = 5
WAITING = 0.1
"""Share of a step that may be waiting for images, without a warning."""


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
    arguments = parsed()
    entry.run(lambda: run(arguments))


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Options, of the command line by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, nargs="+", default=[], metavar="FOLDER", help="folders of class folders")
    parser.add_argument("--work", type=Path, default=Path("runs/controls"))
    parser.add_argument("--arms", nargs="+", help="names of configs in config/controls (default: all)")
    parser.add_argument("--folds", type=folds_of, default="0,1", help=f"of 0 to {FOLDS - 1} (default: 0,1)")
    parser.add_argument(
        "--budgets", type=budgets_of, default="1,2", help="multiples of the time of the baseline (default: 1,2)"
    )
    parser.add_argument("--seeds", type=common.count, default=1)
    parser.add_argument(
        "--jobs",
        type=common.count,
        help="runs at once, one thread each, with the other CPUs to decode (default: one for each GPU, or CPU)",
    )
    parser.add_argument(
        "--shard", type=part_of, default="1/1", metavar="I/N", help="only every N-th run, from the I-th (default: 1/1)"
    )
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="results of earlier runs: controls.parquet of a report"
    )
    parser.add_argument("--only", choices=STAGES, help="one of the stages")
    return parser.parse_args(words)


def budgets_of(text: str) -> list[float]:
    """The type of an option that takes positive numbers."""
    try:
        budgets = [float(each) for each in text.split(",")]
    except ValueError:
        budgets = [0]
    if not all(0 < budget < math.inf for budget in budgets):
        raise argparse.ArgumentTypeError(f"{text!r} given, expected positive numbers such as 1,2")
    return budgets


def folds_of(text: str) -> list[int]:
    """The type of an option that takes numbers of folds."""
    folds = [int(each) if each.isdecimal() else FOLDS for each in text.split(",")]
    if max(folds) >= FOLDS or len(set(folds)) < len(folds):
        raise argparse.ArgumentTypeError(f"{text!r} given, expected different numbers of 0 to {FOLDS - 1}, such as 0,1")
    return folds


def part_of(text: str) -> tuple[int, int]:
    """The type of an option I/N: I, counted from 0, and N."""
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} given, expected I/N with I from 1 to N")
    return int(number) - 1, int(of)


def run(arguments: argparse.Namespace) -> None:
    work, stages = arguments.work, [arguments.only] if arguments.only else STAGES
    known = sorted(path.stem for path in CONFIGS.glob("*.toml") if path.stem != "base")
    arms = arguments.arms or known
    if unknown := set(arms) - set(known):
        raise UserError(f"--arms {' '.join(sorted(unknown))}: no such arms; there are {', '.join(known)}")
    arms = sorted({*arms, BASELINE, *(TEACHERS[arm] for arm in arms if arm in TEACHERS)})
    work.mkdir(parents=True, exist_ok=True)
    gpus = visible_gpus()
    jobs = arguments.jobs or len(gpus) or available_cpus()
    place = Place(work, jobs, max(1, available_cpus() // jobs - 1), gpus, arguments.shard)
    with locked(work / ".lock"):
        if {"time", "rates", "train"} & set(stages):
            require(work, DEVICE, device_of(gpus), "this machine")
        if arguments.results:
            unpack(arguments.results, work)
        if "prepare" in stages:
            prepare(arguments.images, work, arguments.folds)
        if "time" in stages:
            measure(arms, work, place.threads)
    trained = [arm for arm in arms if arm != ACCUMULATED]
    if {"rates", "train"} & set(stages):
        times_of(work, trained)  # before runs that would miss them
    if "rates" in stages:
        try_rates(trained, place)
    if "train" in stages:
        train(trained, place, arguments.folds, arguments.budgets, range(arguments.seeds))
    if "report" in stages:
        report(work)


def visible_gpus() -> list[str]:
    """The GPUs of this machine or job, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    return os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")[:count]


def device_of(gpus: Sequence[str]) -> str:
    """The name of these GPUs, or "cpu" without any. Raises UserError if they are of several kinds."""
    names = sorted({torch.cuda.get_device_name(number) for number in range(len(gpus))})
    if len(names) > 1:
        raise UserError(f"GPUs of several kinds: {', '.join(names)}; CUDA_VISIBLE_DEVICES chooses those of one kind")
    return names[0] if names else "cpu"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Context of one process at a time: tasks of an array start at once. Raises UserError if it cannot be written."""
    lock = FileLock(path)
    with writing_to(path):
        try:
            lock.acquire(timeout=1)
        except Timeout:
            logger.info("waiting for another process, which prepares {} or measures times in it", path.parent)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------------------------------------------- images


def prepare(roots: Sequence[Path], work: Path, folds: Sequence[int]) -> None:
    """Lists all images in WORK/images.csv, in FOLDS folds, stratified by class, and links them into WORK/folds.

    An image is in the validation images of exactly one of the folds; "lr" is a split of the training images of fold 0.
    Numbers and folds follow from the classes, the order of the roots, and names and sizes of the files, wherever these
    are. Raises UserError if earlier results are those of other images.
    """
    path = work / "images.csv"
    if path.exists():
        kinds = {"class": str, "path": str, "name": str}
        frame = pd.read_csv(path, dtype=kinds, keep_default_na=False, encoding_errors="surrogateescape")
    elif roots:
        frame = listed(roots)
        require(work, IMAGES, digest_of(frame), "--images")
        frame.to_csv(path, index=False, errors="surrogateescape")
    else:
        raise UserError(f"--images: not given, and {work} holds no images yet")
    for fold in folds:
        link(frame, frame["fold"] == fold, work / "folds" / str(fold))
    inner = frame[frame["fold"] != 0]
    link(inner, inner["inner"] == 0, work / "folds/lr")


def listed(roots: Sequence[Path]) -> pd.DataFrame:
    """Columns class, root, path, fold, inner (fold within the training images of fold 0) and name of all images."""
    pooled = sorted(
        (os.fsdecode(name).partition("/")[0], number, str(found.folder / os.fsdecode(name)))
        for number, found in enumerate(map(folders.walk, roots))
        for name in found.names.to_pylist()
    )
    frame = pd.DataFrame(pooled, columns=["class", "root", "path"])
    rng = np.random.default_rng(0)
    place = frame.groupby("class")["path"].transform(lambda paths: rng.permutation(len(paths)))
    frame["fold"], frame["inner"] = place % FOLDS, place // FOLDS % 5
    frame["name"] = [f"{number:06d}{Path(path).suffix.lower()}" for number, path in enumerate(frame["path"])]
    logger.info("{} images of {} classes in {} folds", len(frame), frame["class"].nunique(), FOLDS)
    return frame


def digest_of(frame: pd.DataFrame) -> str:
    """Of classes, names and sizes of the images in their order."""
    paths = map(Path, frame["path"])
    lines = (f"{label}/{path.name} {path.stat().st_size}\n" for label, path in zip(frame["class"], paths, strict=True))
    return hashlib.blake2b("".join(lines).encode(errors="surrogateescape"), digest_size=16).hexdigest()


def link(frame: pd.DataFrame, val: pd.Series, folder: Path) -> None:
    """Links images into FOLDER/train and FOLDER/val, unless it is there."""
    if folder.exists():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for (name, label, path), out in zip(frame[["name", "class", "path"]].itertuples(index=False), val, strict=True):
        target = unfinished / ("val" if out else "train") / label / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    unfinished.rename(folder)


@cache
def images_in(folder: Path) -> int:
    if not folder.is_dir():
        raise UserError(f"{folder}: not there yet; --only prepare with this fold makes it")
    return sum(1 for _ in folder.rglob("*.*"))


# ---------------------------------------------------------------------------------------------------- time


def measure(arms: Sequence[str], work: Path, threads: int) -> None:
    """Times of a step of every arm, one thread, in interleaved rounds; run it on an idle machine.

    Writes times.json, wall-clock time with DALI's threads on other cores where there are some, and cpu_times.json, CPU
    time with DALI's threads. An arm of growing images is timed at each of its sizes; a distilled one with the forward
    pass of its teacher. Arms that are new are timed beside the baseline, and brought to its earlier time. As in the
    runs, cuDNN does not try its algorithms for growing images.

    `threads`: of DALI, as in the runs.
    """
    known = times_of(work, [])
    new = set(arms) - set(known)
    if not new:
        return
    new |= {TEACHERS[arm] for arm in new & set(TEACHERS)}
    torch.set_num_threads(1)
    subjects, sizes = [], {}
    with joined() as ranks:
        for arm in sorted({*new, BASELINE}):
            keys = [f"data.root={(work / 'folds/lr').absolute()}", f"data.threads={threads}"]
            config = config_of(arm, keys)
            sizes[arm] = sorted({config.image_size_at(epoch) for epoch in range(config.train.epochs)})
            for size in sizes[arm]:
                plain = config.with_values({"data": {"image_size": size}, "augment": {"progressive": None}})
                plain = plain.model_copy(update={"name": f"{arm} {size}", "distillation": None})
                subject = step.of_config(plain, ranks, synthetic=False)
                if config.augment.progressive:
                    subject.parts.update({name: partial(untried, part) for name, part in subject.parts.items()})
                subjects.append(subject)
        seconds, cpu_seconds, _ = step.timed(subjects, 7, 5, ranks.device)
    for subject in subjects:
        waiting = float(np.median(subject.waited) / np.median(seconds[subject.name]["step"]))
        if waiting > WAITING:
            logger.warning("{}: {:.0%} of a step is waiting for images; more CPUs would help", subject.name, waiting)
    wall = {name: of["step"] for name, of in seconds.items()}
    for file, found in ((CPU_TIMES, cpu_seconds), (TIMES, wall)):  # the arms in the last are known
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


def untried(part: Callable[[], object]) -> None:
    """Calls it with cuDNN as it is without `cudnn.benchmark`, which sessions of one image size set."""
    torch.backends.cudnn.benchmark = False
    part()
    torch.backends.cudnn.benchmark = True


def times_of(work: Path, arms: Collection[str]) -> Times:
    path = work / TIMES
    times: Times = json.loads(path.read_text()) if path.exists() else {}
    if missing := set(arms) - set(times):
        raise UserError(f"{path}: no times of {', '.join(sorted(missing))}; --only time with --arms measures them")
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


@dataclass(frozen=True)
class Place:
    """Where and how runs are done."""

    work: Path
    jobs: int
    """Runs at once."""
    threads: int
    """Of DALI, in each run."""
    gpus: Sequence[str] = ()
    """Shared by the runs at once."""
    shard: tuple[int, int] = (0, 1)
    """Number, counted from 0, of the part that is done here, and number of parts."""


def try_rates(arms: Sequence[str], place: Place) -> None:
    """Trains and evaluates every arm with each of LRS, where it has no results yet."""
    run_all([Task(arm, "lr", 0.5, lr, 0) for arm in arms for lr in LRS], place)


def train(
    arms: Sequence[str], place: Place, folds: Sequence[int], budgets: Sequence[float], seeds: Sequence[int]
) -> None:
    """Trains and evaluates what has no results yet, several runs at once, fold by fold.

    Raises UserError if the learning rate of an arm has not been chosen.
    """
    rates = {arm: lr for arm in arms if (lr := best_lr(arm, place.work)) is not None}
    if missing := set(arms) - set(rates):
        raise UserError(f"no learning rates yet: {', '.join(sorted(missing))}; --only rates tries them, in all shards")
    tasks = [
        Task(arm, str(fold), budget, rate, seed)
        for budget in budgets
        for seed in seeds
        for fold in folds
        for arm, rate in rates.items()
    ]
    run_all(tasks, place)


def teacher_of(task: Task) -> Task | None:
    """The run whose logits a distilled arm learns from."""
    if task.arm not in TEACHERS:
        return None
    return replace(task, arm=TEACHERS[task.arm], budget=task.budget / 2, lr=TEACHER_LR)


def run_all(tasks: Sequence[Task], place: Place) -> None:
    """Trains what has no results yet of a shard of these runs, and the teachers that it needs, teachers first.

    The result of a teacher may come from another machine, or be older than a run that was stopped: what counts is that
    its run has ended here.
    """
    work, (number, count) = place.work, place.shard
    firsts, students = [], []
    for first, *learning in groups_of(tasks)[number::count]:
        missing = [task for task in learning if not result_of(task, work).exists()]
        ended = not missing or Metrics(work / "runs" / first.name / "metrics.jsonl").ended
        if (missing or first in tasks) and not (ended and result_of(first, work).exists()):
            firsts.append(first)
        students += missing
    run_each(firsts, place)
    run_each(students, place)


def groups_of(tasks: Sequence[Task]) -> list[list[Task]]:
    """Runs that belong into one shard: a teacher, which need not be among the tasks, and its students."""
    groups: dict[Task, list[Task]] = {}
    for task in tasks:
        first = teacher_of(task) or task
        group = groups.setdefault(first, [first])
        if first != task:
            group.append(task)
    return list(groups.values())


def run_each(tasks: Sequence[Task], place: Place) -> None:
    """Trains runs, several at once. Raises UserError for those that have failed, when all have ended."""

    free: SimpleQueue[str] = SimpleQueue()
    for number in range(place.jobs):
        free.put(place.gpus[number % len(place.gpus)] if place.gpus else "")

    def error_of(task: Task) -> str:
        gpu = free.get()
        try:
            run_one(task, place, gpu)
        except UserError as error:
            return str(error)
        finally:
            free.put(gpu)
        return ""

    with ThreadPoolExecutor(place.jobs) as pool:
        errors = [*tqdm(pool.map(error_of, tasks), total=len(tasks), unit="run", disable=None)]
    if any(errors):
        raise UserError("\n".join(filter(None, errors)))


def result_of(task: Task, work: Path) -> Path:
    return work / "results" / f"{task.name.replace('/', '-')}.json"


def run_one(task: Task, place: Place, gpu: str) -> None:
    """Trains a run, or goes on with it, evaluates its last checkpoint, and writes its result."""
    work, teacher = place.work, teacher_of(task)
    times = times_of(work, {task.arm, BASELINE} | ({teacher.arm} if teacher else set()))
    root = (work / "folds" / task.fold).absolute()
    images = images_in(root / "train")
    config = config_of(task.arm)
    run_dir = work / "runs" / task.name
    planned = epochs_of(task.arm, task.budget, images, times)
    keys = [*grown(task.arm, planned), f"optim.lr={task.lr}", f"seed={task.seed}"]
    keys += [f"data.root={root}", f"data.threads={place.threads}"]
    env = {"CONTROLS": str(root), "TEACHER": ""} | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
    if teacher:
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
    steps, epochs = steps_of(task.arm, images), epochs_in(run_dir)
    seconds = seconds_of(task.arm, epochs, steps, times)
    if teacher:
        before = epochs_in(work / "runs" / teacher.name)
        seconds += seconds_of(teacher.arm, before, steps_of(teacher.arm, images), times)
    table = {**asdict(task), "epochs": epochs, "steps": epochs * steps, "seconds": seconds, "evaluations": evaluations}
    result = result_of(task, work)
    result.parent.mkdir(exist_ok=True)
    replace_text(result, json.dumps(table) + "\n")


def epochs_in(run_dir: Path) -> int:
    """For how many epochs a run has trained, which began perhaps with other times."""
    epochs: int = tomli.loads((run_dir / "config.toml").read_text(encoding="utf-8"))["train"]["epochs"]
    return epochs


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
