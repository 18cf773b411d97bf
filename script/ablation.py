"""Ablation of training tricks: each one alone added to a plain recipe, over several seeds; one table and one figure.

    python script/ablation.py [CONFIG] [--data DATA] [--set KEY=VALUE …] [--seeds 3] [--jobs 2] [--output runs/ablation]

The plain recipe is CONFIG (a ResNet; default: the demo) with the learning rate divided by 10 after each third of the
epochs, cross-entropy, random crops and hflips, and no other tricks. Each run is one src/train.py in a folder below
--output. Finished runs are skipped, so the same command resumes a stopped ablation.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from tqdm import tqdm

from bandsplit.cli import entry
from bandsplit.config import loading
from bandsplit.config.schema import RunConfig
from bandsplit.cpus import available_cpus
from bandsplit.errors import UserError
from bandsplit.reporting.figures import STYLE, WIDTH
from bandsplit.reporting.runs import read_run
from bandsplit.reporting.tables import mean_two_sigma
from bandsplit.runs.directory import RunDirectory

REPOSITORY = Path(__file__).resolve().parent.parent
BASE, TEACHER = "plain recipe", "teacher"

BAG = {  # He et al., Bag of Tricks (CVPR 2019)
    "warm-up of one epoch": ["schedule.warmup_epochs=1"],
    "cosine": ['schedule={type="cosine"}'],
    "no decay of norms and biases": ["optim.decay_norm_and_bias=false"],
    "zero γ": ["model.zero_gamma=true"],
    "ResNet-D": ['model.tweaks=["b", "c", "d"]'],
    "label smoothing 0.1": ["loss.smoothing=0.1"],
    "mixup 0.2": ["mix.mixup=0.2"],
    "color": ["augment.color={brightness=[0.6, 1.4], saturation=[0.6, 1.4], hue=144}"],
    "lighting noise 0.1": ["augment.pca_noise=0.1"],
}
TOGETHER = f"the {len(BAG)} above together"
OTHERS = {
    TOGETHER: [key for name in ("cosine", *BAG) for key in BAG[name]],  # cosine replaces the table, warm-up adds to it
    "distillation": [],  # see `overrides_of`
    "CutMix 1.0": ["mix.cutmix=1.0"],
    "RandAugment, n = 2, m = 7": ['augment.auto={type="rand_augment", n=2, m=7}'],
    "random erasing": ["augment.erasing={}"],
    "progressive size": [],
    "running mean of weights": ["train.ema_decay=0.98"],
}


def overrides_of(config: RunConfig, output: Path) -> dict[str, list[str]]:
    """Config overrides of each row: those that turn all tricks off, then those of the trick."""
    plain = [
        f'schedule={{type="step", every_epochs={config.train.epochs / 3:.10g}}}',
        "loss={}",
        "mix={}",
        "augment={}",
        "optim.decay_norm_and_bias=true",
        "model.zero_gamma=false",
        'model.tweaks=["b"]',
    ]
    multiple = math.lcm(config.split.block, 8)
    size = round(0.75 * config.data.image_size / multiple) * multiple
    growing = f"{{min_size={size}, ramp_end={config.train.epochs * 2 // 3}, multiple={multiple}}}"
    tricks = {**BAG, **OTHERS, "progressive size": [f"augment.progressive={growing}"]}
    tricks["distillation"] = [f"distillation.teacher={json.dumps(str(output / folder_of(TEACHER, 0)))}"]
    wide = [*BAG["cosine"], f"model.width={2 * config.model.width}"]
    return {row: [*plain, *keys] for row, keys in {BASE: [], **tricks, TEACHER: wide}.items()}


def folder_of(row: str, seed: int) -> str:
    return f"{''.join(c if c.isalnum() else '_' for c in row)}-seed{seed}"


def train(
    arguments: argparse.Namespace, overrides: Sequence[str], row: str, seed: int, bar: tqdm[Any]
) -> dict[str, object]:
    """Trains one run unless it is finished; returns its row, seed and final accuracy in percent.

    Raises UserError with the last line of stderr if training fails.
    """
    folder = arguments.output / folder_of(row, seed)
    if not (folder / "metrics.jsonl").exists() or not read_run(folder).ended:
        command = [sys.executable, str(REPOSITORY / "src/train.py"), str(arguments.config), "--resume"]
        command += ["--run-dir", str(folder), *(["--data", str(arguments.data)] if arguments.data else [])]
        for override in (*arguments.set, *overrides, f"seed={seed}"):
            command += ["--set", override]
        threads = max(1, available_cpus() // arguments.jobs)
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(f"{row}, seed {seed}: {done.stderr.strip().splitlines()[-1].removeprefix('error: ')}")
    bar.update()
    last = read_run(folder).validation.iloc[-1]
    return {"row": row, "seed": seed, "top1": last["top1"], "top5": last["top5"]}


def table(results: pd.DataFrame) -> str:
    """Markdown table, one row per trick, with the difference to the plain run of the same seed."""
    base = results[results["row"] == BASE].set_index("seed")["top1"]
    lines = ["| | n | top-1 | top-5 | difference in top-1 |", "|---|---:|---:|---:|---:|"]
    for row, of_row in results.groupby("row", observed=True):
        differences = of_row.set_index("seed")["top1"] - base
        change = "" if row == BASE else ("+" if differences.mean() >= 0 else "") + mean_two_sigma(list(differences))
        cells = [str(row), str(len(of_row)), *(mean_two_sigma(list(of_row[key])) for key in ("top1", "top5")), change]
        lines.append(f"| {' | '.join(cells)} |")
    caption = (
        "± is twice the sample standard deviation over the n seeds. Differences are between runs of the same seed, "
        "which share crops and initial weights."
    )
    return "\n".join([*lines, "", caption]) + "\n"


def draw(results: pd.DataFrame, output: Path) -> None:
    """One row per trick: a dot per seed and a bar at the mean."""
    base = results[results["row"] == BASE].set_index("seed")["top1"]
    tricks = results.assign(difference=results["top1"] - results["seed"].map(base))
    tricks = tricks[tricks["row"] != BASE].assign(row=lambda frame: frame["row"].cat.remove_unused_categories())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH * 0.8, 0.5 + 0.22 * tricks["row"].nunique()), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color="0.4", linewidth=0.8)
        sns.stripplot(tricks, x="difference", y="row", ax=axes, color="#0173b2", size=4, alpha=0.7, jitter=False)
        means = tricks.groupby("row", observed=True)["difference"].mean()
        axes.plot(means, range(len(means)), linestyle="", marker="|", markersize=11, markeredgewidth=2, color="black")
        axes.set(xlabel=f"Top-1 against the {BASE} ({base.mean():.1f} %), percentage points", ylabel="")
        axes.set_ylim(len(means) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        for end in ("png", "svg"):
            figure.savefig(output / f"ablation.{end}", **({"metadata": {"Date": None}} if end == "svg" else {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=REPOSITORY / "config/train/demo.toml")
    parser.add_argument("--data", type=Path, help="data config to use instead of the one that the train config names")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (default: 3)")
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs, which share the cores (default: 1)")
    parser.add_argument("--only", action="append", choices=[*BAG, *OTHERS], help="run only this trick; may be repeated")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    arguments = parser.parse_args()

    config = loading.load(arguments.config, arguments.set, arguments.data)
    overrides = overrides_of(config, arguments.output)
    chosen = arguments.only or [*BAG, *OTHERS]
    rows = [row for row in overrides if row in (BASE, *chosen)]
    jobs = [(row, seed) for seed in range(arguments.seeds) for row in rows]
    teachers = [(TEACHER, 0)] if "distillation" in rows else []
    for row, seed in (*teachers, *jobs):  # fail on config errors before the first run
        keys = [*arguments.set, *overrides[row], f"seed={seed}"]
        run = loading.load(arguments.config, keys, arguments.data)
        RunDirectory(arguments.output / folder_of(row, seed)).check(run, resume=True)
    with ThreadPoolExecutor(arguments.jobs) as pool, tqdm(total=len(teachers) + len(jobs), unit="run") as bar:
        for row, seed in teachers:
            train(arguments, overrides[row], row, seed, bar)
        results = pd.DataFrame(pool.map(lambda job: train(arguments, overrides[job[0]], *job, bar), jobs))
    results["row"] = pd.Categorical(results["row"], categories=rows, ordered=True)
    results = results.sort_values(["row", "seed"])
    text = table(results)
    (arguments.output / "ablation.md").write_text(text, encoding="utf-8")
    (arguments.output / "ablation.json").write_text(json.dumps(results.to_dict("records"), indent=2) + "\n")
    draw(results, arguments.output)
    print(f"{text}\ntable, numbers and figure: {arguments.output}")


if __name__ == "__main__":
    entry.run(main)
