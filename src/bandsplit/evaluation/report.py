"""The results of an evaluation: printed, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bandsplit.evaluation.cascade import Cascaded, branch_macs
from bandsplit.evaluation.detailed import Evaluation
from bandsplit.evaluation.joined import Joined
from bandsplit.models.cascade import Cascade
from bandsplit.models.fusion import MEAN
from bandsplit.runs.files import replace_text
from bandsplit.runs.fitted import Fitted

_CROPS = {"center": "", "flip": ", with their mirror images", "ten": ", ten crops each"}


def show(
    evaluation: Evaluation,
    runs: Joined,
    crops: str,
    fusion: str,
    fitted: Fitted | None,
    cascaded: Cascaded | None,
    output: Path | None,
) -> None:
    """Prints the results, and writes them to `output`.

    Args:
        crops: those that were averaged.
        fusion: whose accuracy is the ensemble's.
    """
    for run in runs.runs:
        print(f"{run.config.name}, step {run.step}, {run.run_dir}")
    fused, several = evaluation.fused[fusion], len(runs.branches) > 1
    left_out = f" ({evaluation.left_out} left out, which cannot be decoded)" * bool(evaluation.left_out)
    of = f"{evaluation.images} images{left_out}{_CROPS[crops]}"
    print(f"{of}: loss {fused.loss:.4f}, calibration error {fused.ece:.2f} %")
    print(_row("ensemble" if fusion == MEAN else f"ensemble ({fusion})", fused.top1, fused.top5))
    for k, branch in enumerate(runs.branches):
        row = _row(_bands(branch.bands), evaluation.branch_top1[k], evaluation.branch_top5[k])
        top1, top5 = evaluation.cumulative_top1[k], evaluation.cumulative_top5[k]
        print(row + f"   mean up to here  top-1 {top1:6.2f} %  top-5 {top5:6.2f} %" * several)
    if fitted is not None:
        _show_fusions(evaluation, fitted)
        _show_dropped(runs, fitted)
        if cascaded is not None and fitted.cascade is not None:
            _show_cascade(cascaded, fitted.cascade, fitted.held_out.images, runs)
    if output is not None:
        replace_text(output, json.dumps(_as_dict(evaluation, runs, crops, fusion, fitted, cascaded), indent=2) + "\n")


def _show_fusions(evaluation: Evaluation, fitted: Fitted) -> None:
    held_out = fitted.held_out
    sampled = f" of {held_out.of:,}" * (held_out.images < held_out.of)
    print(f"\nfusion, fitted on {held_out.images:,}{sampled} held-out images:")
    print(f"{'':>54}     ECE    loss   top-1 above the mean (95 %)   weights")
    for name, each in evaluation.fused.items():
        low, high = each.gain_interval
        gain = "" if name == MEAN else f"{each.gain:+.2f} ({low:+.2f} to {high:+.2f})"
        weights = fitted.fusions[name].weights
        shown = " ".join(f"{weight:.3f}" for weight in weights[:8]) + " …" * (len(weights) > 8)
        print(f"{_row(name, each.top1, each.top5)}  {each.ece:>6.2f}  {each.loss:>6.4f}   {gain:>27}   {shown}")


def _show_dropped(runs: Joined, fitted: Fitted) -> None:
    """What `drop` leaves out, if anything."""
    drop = fitted.fusions.get("drop")
    dropped = [k for k, weight in enumerate(drop.weights) if not weight] if drop else []
    if dropped:
        macs = branch_macs(runs)
        saved = sum(macs[k] for k in dropped)
        names = "; ".join(_bands(runs.branches[k].bands) for k in dropped)
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
    print(f"{'stage':>7}  {'branch':<14}  {'images leave':>16}  top-1 of these")
    for stage, (k, left, correct) in enumerate(zip(cascade.order, cascaded.left, cascaded.correct, strict=True), 1):
        accuracy = f"{100 * correct / left:6.2f} %" if left else ""
        share = f"{left:>7,} ({100 * left / images:4.1f} %)"
        print(f"{stage:>7}  {_bands(runs.branches[k].bands):<14}  {share:>16}  {accuracy:>13}")
    print(
        f"top-1 {cascaded.top1:.2f} %, all branches {cascaded.full_top1:.2f} %: "
        f"{cascaded.gain:+.2f} ({low:+.2f} to {high:+.2f}, 95 %)"
    )
    branches, macs, seconds = (
        100 * (1 - part / whole)
        for part, whole in (
            (cascaded.branches, len(runs.branches)),
            (cascaded.macs, cascaded.all_macs),
            (cascaded.seconds, cascaded.all_seconds),
        )
    )
    print(
        f"per image: {cascaded.branches:.2f} of {len(runs.branches)} branches ({branches:.0f} % saved), "
        f"{cascaded.macs / 1e6:,.2f} of {cascaded.all_macs / 1e6:,.2f} MMACs ({macs:.0f} %), forward "
        f"{1e3 * cascaded.seconds / images:.3f} of {1e3 * cascaded.all_seconds / images:.3f} ms ({seconds:.0f} %)"
    )


def _as_dict(
    evaluation: Evaluation,
    runs: Joined,
    crops: str,
    fusion: str,
    fitted: Fitted | None,
    cascaded: Cascaded | None,
) -> dict[str, Any]:
    fused = evaluation.fused[fusion]
    table: dict[str, Any] = {
        "step": runs.first.step if len(runs.runs) == 1 else [run.step for run in runs.runs],
        "val_images": evaluation.images,
        **({"left_out": evaluation.left_out} if evaluation.left_out else {}),
        "crops": crops,
        "fusion": fusion,
        "loss": fused.loss,
        "top1": fused.top1,
        "top5": fused.top5,
        "ece": fused.ece,
        "branch_top1": evaluation.branch_top1,
        "branch_top5": evaluation.branch_top5,
        "cumulative_top1": evaluation.cumulative_top1,
        "cumulative_top5": evaluation.cumulative_top5,
    }
    if fitted is not None:
        table["fusions"] = {
            name: {**asdict(each), "weights": fitted.fusions[name].weights} for name, each in evaluation.fused.items()
        }
        if cascaded is not None and fitted.cascade is not None:
            table["cascade"] = {**asdict(fitted.cascade), **asdict(cascaded)}
    return table


def _row(name: str, top1: float, top5: float) -> str:
    return f"{name:>24}  top-1 {top1:6.2f} %  top-5 {top5:6.2f} %"


def _bands(bands: Sequence[int]) -> str:
    return f"band{'s' * (len(bands) > 1)} {', '.join(map(str, bands[:6]))}{' …' * (len(bands) > 6)}"
