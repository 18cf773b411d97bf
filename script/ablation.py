"""What single training tricks are worth: each alone on a plain recipe, over several seeds, in one table and figure.

    python script/ablation.py [CONFIG] [--data DATA] [--set KEY=VALUE …] [--seeds 3] [--jobs 2] [--output runs/ablation]

The plain recipe is CONFIG (default: the demo, a ResNet) with steps down to 0.1 at every third of the epochs, plain
cross-entropy, crops and flips alone.  Runs are src/train.py's, one folder each below --output; what has finished is not
run again, so a stopped ablation goes on with the same line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from tqdm import tqdm

from bandsplit import cli, configuration
from bandsplit.errors import UserError
from bandsplit.reporting import STYLE, WIDTH, mean_two_sigma, read_run

REPOSITORY = Path(__file__).resolve().parent.parent
BASE = "plain recipe"

BAG = {  # He et al., Bag of Tricks (CVPR 2019)
    "warm-up of one epoch": ["schedule.warmup_epochs=1"],
    "cosine": ['schedule={type="cosine"}'],
    "no decay of norms and biases": ["optim.decay_norm_and_bias=false"],
    "zero γ": ["model.zero_gamma=true"],
    "ResNet-D": ['model.tweaks=["b", "c", "d"]'],
    "label smoothing 0.1": ["loss.smoothing=0.1"],
    "mixup 0.2": ["mix.mixup=0.2"],
    "colour": ["augment.color={brightness=[0.6, 1.4], saturation=[0.6, 1.4], hue=144}"],
    "lighting noise 0.1": ["augment.pca_noise=0.1"],
}
OTHERS = {
    "CutMix 1.0": ["mix.cutmix=1.0"],
    "RandAugment, n = 2, m = 7": ['augment.auto={type="rand_augment", n=2, m=7}'],
    "random erasing": ["augment.erasing={}"],
    "running mean of weights": ["train.ema_decay=0.98"],
}
ALL_OF_BAG = "all but the last four"  # warm-up after cosine, which takes the place of the whole table
TRICKS = {**BAG, **OTHERS, ALL_OF_BAG: [key for name in ("cosine", *BAG) for key in BAG[name]]}


def plain(epochs: int) -> list[str]:
    """Overrides that turn every trick off."""
    return [
        f'schedule={{type="step", every_epochs={epochs / 3:.10g}}}',
        "loss={}",
        "mix={}",
        "augment={}",
        "optim.decay_norm_and_bias=true",
        "model.zero_gamma=false",
        'model.tweaks=["b"]',
    ]


def train(
    arguments: argparse.Namespace, overrides: Sequence[str], row: str, seed: int, bar: tqdm[None]
) -> dict[str, object]:
    """One run, unless it has finished already; returns its row, seed and last accuracy in percent."""
    folder = arguments.output / f"{''.join(c if c.isalnum() else '_' for c in row)}-seed{seed}"
    if not (folder / "metrics.jsonl").exists() or not read_run(folder).ended:
        command = [sys.executable, str(REPOSITORY / "src/train.py"), str(arguments.config), "--resume"]
        command += ["--run-dir", str(folder), *(["--data", str(arguments.data)] if arguments.data else [])]
        for override in (*overrides, f"seed={seed}"):
            command += ["--set", override]
        threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(f"{row}, seed {seed}: {done.stderr.strip().splitlines()[-1].removeprefix('error: ')}")
    bar.update()
    last = read_run(folder).validation.iloc[-1]
    return {"row": row, "seed": seed, "top1": last["top1"], "top5": last["top5"]}


def table(results: pd.DataFrame) -> str:
    """Markdown: a row a trick, with the difference to the plain run of the same seed."""
    base = results[results["row"] == BASE].set_index("seed")["top1"]
    lines = ["| | n | top-1 | top-5 | difference in top-1 |", "|---|---:|---:|---:|---:|"]
    for row, of_row in results.groupby("row", sort=False):
        differences = of_row.set_index("seed")["top1"] - base
        change = "" if row == BASE else ("+" if differences.mean() >= 0 else "") + mean_two_sigma(list(differences))
        cells = [str(row), str(len(of_row)), *(mean_two_sigma(list(of_row[key])) for key in ("top1", "top5")), change]
        lines.append(f"| {' | '.join(cells)} |")
    caption = (
        "± is twice the sample standard deviation over the n seeds; differences are taken seed by seed, which share "
        "crops and first weights."
    )
    return "\n".join([*lines, "", caption]) + "\n"


def draw(results: pd.DataFrame, output: Path) -> None:
    """A dot a seed and a bar at the mean, by trick."""
    base = results[results["row"] == BASE].set_index("seed")["top1"]
    tricks = results[results["row"] != BASE]
    tricks = tricks.assign(difference=tricks["top1"] - tricks["seed"].map(base))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH * 0.8, 0.5 + 0.22 * tricks["row"].nunique()), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color="0.4", linewidth=0.8)
        sns.stripplot(tricks, x="difference", y="row", ax=axes, color="#0173b2", size=4, alpha=0.7, jitter=False)
        means = tricks.groupby("row", sort=False)["difference"].mean()
        axes.plot(means, range(len(means)), linestyle="", marker="|", markersize=11, markeredgewidth=2, color="black")
        axes.set(xlabel=f"Top-1 against the {BASE} ({base.mean():.1f} %), percentage points", ylabel="")
        axes.grid(axis="y", visible=False)
        for end in ("png", "svg"):
            figure.savefig(output / f"ablation.{end}", **({"metadata": {"Date": None}} if end == "svg" else {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=REPOSITORY / "config/train/demo.toml")
    parser.add_argument("--data", type=Path, help="data config to use instead of the one that the train config names")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override any key")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (default: 3)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores (default: 1)")
    parser.add_argument("--only", action="append", choices=TRICKS, help="this trick alone; may be repeated")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    arguments = parser.parse_args()

    config = configuration.load(arguments.config, arguments.set, arguments.data)
    rows = {BASE: [], **{name: keys for name, keys in TRICKS.items() if name in (arguments.only or TRICKS)}}
    for row, keys in rows.items():
        rows[row] = [*arguments.set, *plain(config.train.epochs), *keys]
        configuration.load(arguments.config, rows[row], arguments.data)
    with (
        ThreadPoolExecutor(arguments.jobs) as pool,
        tqdm(total=len(rows) * arguments.seeds, unit="run") as bar,
    ):
        found = pool.map(
            lambda job: train(arguments, rows[job[1]], job[1], job[0], bar),
            [(seed, row) for seed in range(arguments.seeds) for row in rows],
        )
        results = pd.DataFrame(list(found))
    results["row"] = pd.Categorical(results["row"], categories=list(rows), ordered=True)
    results = results.sort_values(["row", "seed"])
    text = table(results)
    (arguments.output / "ablation.md").write_text(text, encoding="utf-8")
    (arguments.output / "ablation.json").write_text(json.dumps(results.to_dict("records"), indent=2) + "\n")
    draw(results, arguments.output)
    print(f"{text}\ntable, numbers and figure: {arguments.output}")


if __name__ == "__main__":
    cli.run(main)
