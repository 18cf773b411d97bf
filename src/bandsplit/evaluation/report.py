"""The results of an evaluation: printed, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bandsplit.evaluation.detailed import MEAN, Evaluation
from bandsplit.evaluation.joined import Joined
from bandsplit.runs.files import replace_text


def show(evaluation: Evaluation, runs: Joined, output: Path | None) -> None:
    """Prints the results, and writes them to `output`."""
    for run in runs.runs:
        print(f"{run.config.name}, step {run.step}, {run.run_dir}")
    fused = evaluation.fused[MEAN]
    without = f" ({evaluation.left_out} left out, which cannot be decoded)" * bool(evaluation.left_out)
    print(f"{evaluation.images} images{without}: loss {fused.loss:.4f}, expected calibration error {fused.ece:.2f} %")
    print(f"{'%':>24}   top-1   top-5{'   mean up to here: top-1   top-5' * (len(runs.branches) > 1)}")
    print(_row("ensemble", fused.top1, fused.top5))
    for k, branch in enumerate(runs.branches):
        row = _row(_bands(branch.bands), evaluation.branch_top1[k], evaluation.branch_top5[k])
        up_to_here = f"{evaluation.cumulative_top1[k]:>25.2f}  {evaluation.cumulative_top5[k]:>6.2f}"
        print(row + up_to_here * (len(runs.branches) > 1))
    if output is not None:
        replace_text(output, json.dumps(as_dict(evaluation, runs), indent=2) + "\n")


def as_dict(evaluation: Evaluation, runs: Joined) -> dict[str, Any]:
    fused = evaluation.fused[MEAN]
    return {
        "step": runs.first.step if len(runs.runs) == 1 else [run.step for run in runs.runs],
        "val_images": evaluation.images,
        "loss": fused.loss,
        "top1": fused.top1,
        "top5": fused.top5,
        "ece": fused.ece,
        "branch_top1": evaluation.branch_top1,
        "branch_top5": evaluation.branch_top5,
        "cumulative_top1": evaluation.cumulative_top1,
        "cumulative_top5": evaluation.cumulative_top5,
    }


def _row(name: str, top1: float, top5: float) -> str:
    return f"{name:>24}  {top1:>6.2f}  {top5:>6.2f}"


def _bands(bands: Sequence[int]) -> str:
    return f"band{'s' * (len(bands) > 1)} {', '.join(map(str, bands[:6]))}{' …' * (len(bands) > 6)}"
