"""The results of an evaluation: printed, and as JSON."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bandsplit.evaluation.cascade import Cascaded, branch_macs
from bandsplit.evaluation.corrupted import Corrupted
from bandsplit.evaluation.detailed import Evaluation, Fused, Restricted
from bandsplit.evaluation.joined import Joined
from bandsplit.evaluation.speed import Speed
from bandsplit.models.cascade import Cascade
from bandsplit.models.fusion import MEAN
from bandsplit.runs.files import replace_text
from bandsplit.runs.fitted import Fitted

_CROPS = {"center": "", "flip": ", with their mirror images", "ten": ", ten crops each"}


@dataclass(frozen=True)
class Results:
    """All that one evaluation has found; None for what was not asked for, or is not there."""

    evaluation: Evaluation
    crops: str
    """Those that were averaged; a key of `CROPS`."""
    fusion: str
    """Whose accuracy is the ensemble's."""
    fitted: Fitted | None = None
    cascaded: Cascaded | None = None
    speed: Speed | None = None
    corrupted: list[Corrupted] | None = None


def show(results: Results, runs: Joined, output: Path | None) -> None:
    """Prints the results, and writes them to `output`."""
    evaluation, fusion, fitted = results.evaluation, results.fusion, results.fitted
    for run in runs.runs:
        print(f"{run.config.name}, step {run.step}, {run.run_dir}")
    fused, mean, several = evaluation.fused[fusion], evaluation.fused[MEAN], len(runs.branches) > 1
    left_out = f" ({evaluation.left_out} left out, which cannot be decoded)" * bool(evaluation.left_out)
    of = f"{evaluation.images} images{left_out}{_CROPS[results.crops]}"
    loss = "no loss, since they have several labels" if fused.loss is None else f"loss {fused.loss:.4f}"
    print(f"{of}: {loss}, calibration error {fused.ece:.2f} %")
    name, within = "ensemble" if fusion == MEAN else f"ensemble ({fusion})", evaluation.restricted
    print(_row(name, fused.top1, fused.top5))
    if within is not None:
        print(
            f"{_row(name, within.top1[fusion], within.top5[fusion])}   among the {within.classes} classes of the images"
        )
    for k, branch in enumerate(runs.branches):
        row = _row(branch.label, evaluation.branch_top1[k], evaluation.branch_top5[k])
        top1, top5 = mean.cumulative_top1[k], mean.cumulative_top5[k]
        print(row + f"   mean up to here  top-1 {top1:6.2f} %  top-5 {top5:6.2f} %" * several)
    if fitted is not None:
        _show_fusions(evaluation, fitted, runs.branch_numbers)
        _show_dropped(runs, fitted)
        if results.cascaded is not None and fitted.cascade is not None:
            _show_cascade(results.cascaded, fitted.cascade, fitted.held_out.images, runs)
    if results.speed is not None:
        _show_speed(results.speed)
    if results.corrupted is not None:
        _show_corrupted(results.corrupted, evaluation, runs, fusion)
    if output is not None:
        replace_text(output, json.dumps(_as_dict(results, runs), indent=2) + "\n")


def _show_fusions(evaluation: Evaluation, fitted: Fitted, numbers: Sequence[int]) -> None:
    held_out = fitted.held_out
    sampled = f" of {held_out.of:,}" * (held_out.images < held_out.of)
    print(f"\nfusion, fitted on {held_out.images:,}{sampled} held-out images:")
    print(f"{'':>54}     ECE    loss   top-1 above the mean (95 %)   weights")
    for name, each in evaluation.fused.items():
        low, high = each.gain_interval
        gain = "" if name == MEAN else f"{each.gain:+.2f} ({low:+.2f} to {high:+.2f})"
        weights = fitted.fusions[name].weights
        shown = " ".join(f"{weight:.3f}" for weight in weights[:8]) + " …" * (len(weights) > 8)
        print(f"{_row(name, each.top1, each.top5)}  {each.ece:>6.2f}  {_loss(each):>6}   {gain:>27}   {shown}")
    _show_branches_by_weight(evaluation, fitted, numbers)


def _show_branches_by_weight(evaluation: Evaluation, fitted: Fitted, numbers: Sequence[int]) -> None:
    """Accuracy by number of branches, for the fusions that weight them differently. `numbers`: of the branches."""
    several = {name: each for name, each in evaluation.fused.items() if len({*fitted.fusions[name].weights}) > 1}
    if several:
        names = "".join(f"{name:>26}" for name in several)
        print(f"\ntop-1 of the first branches, largest weight first:\n{'branches':>24}{names}")
    columns = [
        [
            f"{'+' if n else ''}{numbers[k]}  {top1:6.2f} %"
            for n, (k, top1) in enumerate(zip(each.order, each.cumulative_top1, strict=True))
        ]
        for each in several.values()
    ]
    for n, cells in enumerate(itertools.zip_longest(*columns, fillvalue="")):
        print(f"{n + 1:>24}" + "".join(f"{cell:>26}" for cell in cells))


def _corruption(corrupted: Sequence[Corrupted]) -> dict[str, Any]:
    return {
        "mean_top1": np.mean([row.top1 for row in corrupted]).item(),
        "branch_mean_top1": np.mean([row.branch_top1 for row in corrupted], axis=0).tolist(),
        "results": [asdict(row) for row in corrupted],
    }


def _show_corrupted(corrupted: Sequence[Corrupted], evaluation: Evaluation, runs: Joined, fusion: str) -> None:
    """Top-1 of the ensemble by kind and strength, and of every branch by kind."""
    rows = pd.DataFrame({"kind": row.kind, "strength": row.strength, "top1": row.top1} for row in corrupted)
    table = rows.pivot(index="kind", columns="strength", values="top1").loc[rows["kind"].unique()]
    table.insert(0, 0, evaluation.fused[fusion].top1)
    table["mean 1 to 5"] = table.drop(columns=0).mean(axis=1)
    table.loc["mean"] = table.mean()
    print(f"\ntop-1 of the ensemble in percent by corruption and its strength:\n{_table(table)}")
    if len(runs.branches) > 1:
        names = [branch.label for branch in runs.branches]
        of = pd.DataFrame([[row.top1, *row.branch_top1] for row in corrupted], rows["kind"], ["ensemble", *names])
        means = of.groupby(level=0, sort=False).mean().T
        means.insert(0, "none", [evaluation.fused[fusion].top1, *evaluation.branch_top1])
        means["mean"] = of.mean()
        print(f"\ntop-1 of the ensemble and of each branch in percent, mean of strengths 1 to 5:\n{_table(means)}")


def _table(values: pd.DataFrame) -> str:
    values = values.rename_axis(index=None, columns=None)
    return str(values.to_string(float_format="{:.2f}".format))


def _show_dropped(runs: Joined, fitted: Fitted) -> None:
    """What `drop` leaves out, if anything."""
    drop = fitted.fusions.get("drop")
    dropped = [k for k, weight in enumerate(drop.weights) if not weight] if drop else []
    if dropped:
        macs = branch_macs(runs)
        saved = sum(macs[k] for k in dropped)
        names = "; ".join(runs.branches[k].label for k in dropped)
        print(
            f"drop does without {len(dropped)} of {len(macs)} branches ({names}): {saved / 1e6:,.1f} of "
            f"{sum(macs) / 1e6:,.1f} MMACs per image saved"
        )


def _show_cascade(cascaded: Cascaded, cascade: Cascade, held_out: int, runs: Joined) -> None:
    images, (low, high) = sum(cascaded.left), cascaded.gain_interval
    print(
        f"\ncascade: an image leaves when its confidence is above {cascade.threshold:.4f}, fitted on {held_out:,} "
        f"held-out images to lose at most {cascade.loss:g} points of top-1"
    )
    many = f"{len(cascade.order)} branch{'es' * (len(cascade.order) > 1)}"
    print(f"{'stage':>7}  {'branch':<14}  {'images leave':>16}  top-1 of these")
    for stage, (k, left, correct) in enumerate(zip(cascade.order, cascaded.left, cascaded.correct, strict=True), 1):
        accuracy = f"{100 * correct / left:6.2f} %" if left else ""
        share = f"{left:>7,} ({100 * left / images:4.1f} %)"
        print(f"{stage:>7}  {runs.branches[k].label:<14}  {share:>16}  {accuracy:>13}")
    print(
        f"top-1 {cascaded.top1:.2f} %, learned fusion of {many} {cascaded.full_top1:.2f} %: "
        f"{cascaded.gain:+.2f} ({low:+.2f} to {high:+.2f}, 95 %)"
    )
    branches, macs, seconds = (
        100 * (1 - part / whole)
        for part, whole in (
            (cascaded.branches, len(cascade.order)),
            (cascaded.macs, cascaded.all_macs),
            (cascaded.seconds, cascaded.all_seconds),
        )
    )
    print(
        f"per image: {cascaded.branches:.2f} of {many} ({branches:.0f} % saved), "
        f"{cascaded.macs / 1e6:,.2f} of {cascaded.all_macs / 1e6:,.2f} MMACs ({macs:.0f} %), forward "
        f"{1e3 * cascaded.seconds / images:.3f} of {1e3 * cascaded.all_seconds / images:.3f} ms ({seconds:.0f} %)"
    )


def _show_speed(speed: Speed) -> None:
    print(
        f"\n{speed.images_per_second:,.0f} images/s with reading, decoding and split; networks alone "
        f"{speed.networks_images_per_second:,.0f} images/s; batches of {speed.batch_size} per rank"
        f"\none image, from its pixels to fused logits: median {speed.latency_ms:,.1f} ms, 95 % within "
        f"{speed.latency_p95_ms:,.1f} ms"
    )


def _as_dict(results: Results, runs: Joined) -> dict[str, Any]:
    evaluation, fusion, fitted = results.evaluation, results.fusion, results.fitted
    fused = evaluation.fused[fusion]
    table: dict[str, Any] = {
        "step": runs.first.step if len(runs.runs) == 1 else [run.step for run in runs.runs],
        "val_images": evaluation.images,
        **({"left_out": evaluation.left_out} if evaluation.left_out else {}),
        "crops": results.crops,
        "fusion": fusion,
        "loss": fused.loss,
        "top1": fused.top1,
        "top5": fused.top5,
        "ece": fused.ece,
        **({"restricted": _restricted(evaluation.restricted, fusion)} if evaluation.restricted else {}),
        "branches": runs.branch_numbers,  # of what follows by branch; `order` counts its places from 0
        "branch_top1": evaluation.branch_top1,
        "branch_top5": evaluation.branch_top5,
        "cumulative_top1": evaluation.fused[MEAN].cumulative_top1,
        "cumulative_top5": evaluation.fused[MEAN].cumulative_top5,
    }
    if fitted is not None:
        table["fusions"] = {
            name: {**asdict(each), "weights": fitted.fusions[name].weights} for name, each in evaluation.fused.items()
        }
        if results.cascaded is not None and fitted.cascade is not None:
            table["cascade"] = {**asdict(fitted.cascade), **asdict(results.cascaded)}
    if results.speed is not None:
        table["speed"] = asdict(results.speed)
    if results.corrupted is not None:
        table["corruption"] = _corruption(results.corrupted)
    return table


def _restricted(within: Restricted, fusion: str) -> dict[str, Any]:
    return {**asdict(within), "top1": within.top1[fusion], "top5": within.top5[fusion]}


def _loss(fused: Fused) -> str:
    return "" if fused.loss is None else f"{fused.loss:.4f}"


def _row(name: str, top1: float, top5: float) -> str:
    return f"{name:>24}  top-1 {top1:6.2f} %  top-5 {top5:6.2f} %"
