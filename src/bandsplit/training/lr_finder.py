"""LR finder: the range test of Smith, *Cyclical Learning Rates* (WACV 2017), section 3.3, on the real pipeline."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import seaborn as sns
import torch
from matplotlib.figure import Figure

from bandsplit.config.schema import RunConfig
from bandsplit.distributed.ranks import joined, rank
from bandsplit.errors import UserError
from bandsplit.progress import followed
from bandsplit.reporting.figures import HEIGHT, STYLE, WIDTH
from bandsplit.runs.files import make_folder, replace_text, writing_to
from bandsplit.runs.logs import logged
from bandsplit.training.session import Plan, Session

Floats = npt.NDArray[np.float64]

DIVERGED = 4.0
"""A branch stops when its smoothed loss exceeds this many times its lowest value."""


def find_lr(config: RunConfig, low: float, high: float, steps: int, output: Path) -> float:
    """Trains one step at each of `steps` values of `optim.lr`, log-spaced between two; every rank must call it.

    Prints a suggestion for each branch and for the mean loss, plots the losses, and returns the suggestion for the
    mean loss. Branches that diverge stop. No validation, no checkpoints. Raises UserError if the loss never falls.
    """
    lrs = np.geomspace(low, high, steps)
    losses = _range_test(config, lrs, output)
    curves = [smoothed(branch) for branch in losses]
    every = [suggestion(lrs, curve) for curve in curves]
    together = smoothed(losses.mean(axis=0))  # NaN once any branch has diverged
    best = suggestion(lrs, together)
    if best is None:
        raise UserError(f"no learning rate between {low:g} and {high:g} lowers the loss; try another --from and --to")
    if rank() == 0:
        with writing_to(output):
            _draw(lrs, curves, together, best, config.split.numbers, output)
        table = {
            "suggested": best,
            "suggested_branch": every,
            "lr": lrs.tolist(),
            "branch_loss": [[None if np.isnan(x) else x for x in row] for row in losses],
        }
        replace_text(output / "lr_finder.json", json.dumps(table) + "\n")
        for number, lr in zip(config.split.numbers, every, strict=True):
            print(f"branch {number:>2}  {'none in this range' if lr is None else f'{lr:.2g}'}")
        print(f"all: --set optim.lr={best:.2g}\nfigure and numbers: {output}")
    return best


def _range_test(config: RunConfig, lrs: Floats, output: Path) -> Floats:
    """Losses (branches, steps); NaN once a branch has diverged."""
    with logged(output / "logs", rank()), joined(config.parallel.timeout_seconds) as ranks:
        session = Session(Plan.of(config, ranks))
        ranks.from_first(partial(make_folder, output))  # fail before training if the output is not writable
        mesh, branches = session.mesh, len(session.plan.parameters)
        losses = np.full((branches, len(lrs)), np.nan)
        alive = np.ones(branches, dtype=bool)
        scaling = config.peak_lr / config.optim.lr  # to the batch size, with optim.base_batch
        for step, lr in enumerate(followed(lrs, "learning rates", len(lrs), "steps", ranks.is_first)):
            parts = session.feed.take(session.streams.parts, ahead=step + 1 < len(lrs))
            found = torch.zeros(branches, dtype=torch.float64, device=ranks.device)
            going_on = [i for i, k in enumerate(mesh.own) if alive[k]]
            for i, outcome in session.step(going_on, parts, step, lr * scaling).items():
                found[mesh.own[i]] = torch.where(outcome.failed, torch.inf, outcome.loss)
            together = (ranks.sum(found) / mesh.replicas).cpu().numpy()
            losses[alive, step] = together[alive]
            for k in np.flatnonzero(alive).tolist():
                curve = smoothed(losses[k, : step + 1])
                alive[k] = np.isfinite(together[k]) and curve[-1] <= DIVERGED * curve.min()
                if not np.isfinite(together[k]):
                    losses[k, step] = np.nan
            if not alive.any():
                break
        return losses


def smoothed(losses: Floats, memory: float = 0.9) -> Floats:
    """Bias-corrected exponential moving average, (steps,) -> (steps,); NaN from the first NaN on."""
    mean, curve = 0.0, np.full_like(losses, np.nan)
    for n, loss in enumerate(losses):
        if np.isnan(loss):
            break
        mean = memory * mean + (1 - memory) * loss
        curve[n] = mean / (1 - memory ** (n + 1))
    return curve


def suggestion(lrs: Floats, curve: Floats) -> float | None:
    """Learning rate at which the smoothed loss falls most steeply, over log lr, before its minimum.

    Slopes are differences over a fifth of the range. The first tenth, where smoothing is noisy, is ignored.
    None if the loss does not fall.
    """
    tenth = max(1, len(lrs) // 10)
    known = np.flatnonzero(~np.isnan(curve))[tenth:]
    if not len(known):
        return None
    lowest = known[int(np.argmin(curve[known]))]
    middle = np.arange(known[0] + tenth, lowest - tenth + 1)
    if not len(middle):
        return None
    falls = curve[middle - tenth] - curve[middle + tenth]
    return float(lrs[middle[int(np.argmax(falls))]]) if falls.max() > 0 else None


def _draw(
    lrs: Floats, curves: list[Floats], together: Floats, best: float, numbers: tuple[int, ...], output: Path
) -> None:
    with mpl.rc_context({**STYLE, "text.parse_math": True}):  # powers of ten on the axis
        figure = Figure(figsize=(WIDTH * 0.7, HEIGHT), layout="constrained")
        axes = figure.subplots()
        several = len(curves) > 1
        if several:
            colors = sns.color_palette("viridis", len(curves))
            for k, curve, color in zip(numbers, curves, colors, strict=True):
                axes.plot(lrs, curve, color=color, linewidth=0.9, label=f"branch {k}" if len(curves) <= 6 else None)
        axes.plot(lrs, together, color="black", linewidth=2, label="mean of branches" if several else "loss")
        axes.axvline(best, color="black", linewidth=0.8, linestyle=(0, (4, 3)), label=f"suggested: {best:.2g}")
        top = float(np.nanmax([curve[0] for curve in curves]))
        bottom = float(np.nanmin([np.nanmin(curve) for curve in curves]))
        margin = top - bottom
        axes.set(xscale="log", xlabel="Learning rate (optim.lr)", ylabel="Training loss (smoothed)")
        axes.set_ylim(bottom - 0.15 * margin, top + 0.6 * margin)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        figure.savefig(output / "lr_finder.png")
        figure.savefig(output / "lr_finder.svg", metadata={"Date": None})
