"""Accuracy on corrupted validation images, by kind and strength."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bandsplit.data.corruption import KINDS, Corruption
from bandsplit.data.crops import Crop
from bandsplit.data.source import Images
from bandsplit.errors import UserError
from bandsplit.evaluation.detailed import evaluate_in_detail
from bandsplit.evaluation.evaluate import report_left_out
from bandsplit.evaluation.joined import Joined
from bandsplit.progress import followed


@dataclass(frozen=True)
class Corrupted:
    """Accuracies in percent under one kind of corruption at one strength."""

    kind: str
    strength: int
    """1 to 5; of 0 is the plain evaluation."""
    value: float
    """The parameter that this strength stands for; see `Corruption`."""
    top1: float
    """Of the fusion that was asked for."""
    top5: float
    branch_top1: list[float]
    branch_top5: list[float]


def kinds_of(text: str) -> list[str]:
    """The kinds that --corrupt names: "all", or some of them with commas between. Raises UserError for another one."""
    kinds = [*KINDS] if text == "all" else text.split(",")
    for kind in kinds:
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"--corrupt: {kind!r} given; allowed: all, or some of {','.join(KINDS)}{hint}")
    return list(dict.fromkeys(kinds))


def evaluate_corrupted(
    runs: Joined,
    files: Images,
    kinds: Sequence[str],
    crops: Sequence[Crop],
    fusion: str,
    weights: Mapping[str, Sequence[float]],
) -> list[Corrupted]:
    """One pass over the images for each kind and strength; every rank calls it.

    Args:
        weights: of the branches, for each fusion but the mean.
    """
    needed, rows = {name: w for name, w in weights.items() if name == fusion}, []
    passes = [(kind, strength, value) for kind in kinds for strength, value in enumerate(KINDS[kind], 1)]
    for kind, strength, value in followed(passes, "corruptions", len(passes), "passes", runs.ranks.is_first):
        loader = runs.loader(files, [replace(crop, corruption=Corruption(kind, value)) for crop in crops])
        found = evaluate_in_detail(
            runs.ensemble, loader, len(files), runs.mesh, runs.precision, needed, truth=runs.truth(files)
        )
        report_left_out(found.left_out, loader, runs.config, runs.ranks)
        fused = found.fused[fusion]
        rows.append(Corrupted(kind, strength, value, fused.top1, fused.top5, found.branch_top1, found.branch_top5))
    return rows
