"""What the branches of a run read and cost: written once into its directory, for reports."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial

import torch

from bandsplit.config.schema import RunConfig
from bandsplit.data.loader import Batch
from bandsplit.models.costs import costs_of
from bandsplit.runs.directory import RunDirectory
from bandsplit.runs.files import replace_text
from bandsplit.training.session import Session


def describe(directory: RunDirectory, session: Session, parts: Sequence[Batch]) -> None:
    """Writes branches.json: cost and bands of every branch, and the energy of every band in the batches `parts`.

    Every rank must call it.
    """
    energy = band_energy(session, parts)
    session.mesh.ranks.from_first(partial(_write, directory, session.config, energy))


def band_energy(session: Session, parts: Sequence[Batch]) -> list[float | None]:
    """Mean square of each band over images, pixels and colors of all ranks; None for a band that no branch reads."""
    split, ranks = session.config.split, session.mesh.ranks
    sums = torch.zeros(2, split.bands, dtype=torch.float64, device=ranks.device)
    for part in parts:
        for k, x in zip(session.mesh.own, part.inputs, strict=True):
            bands = list(split.groups[k])
            sums[0, bands] += x.float().square().mean(dim=(0, 2, 3)).view(len(bands), -1).mean(dim=1)
            sums[1, bands] += 1
    total, count = ranks.sum(sums).tolist()
    return [value / n if n else None for value, n in zip(total, count, strict=True)]


def _write(directory: RunDirectory, config: RunConfig, energy: Sequence[float | None]) -> None:
    branches = [
        {"bands": group, "parameters": cost.parameters, "macs": cost.macs}
        for group, cost in zip(config.split.groups, costs_of(config), strict=True)
    ]
    known = [value if value is not None and math.isfinite(value) else None for value in energy]
    replace_text(directory.branches, json.dumps({"branches": branches, "band_energy": known}, indent=1) + "\n")
