"""fusion.json beside a checkpoint: fitted weights of the branches, a cascade, and what they were fitted on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loguru import logger

from bandsplit.config.schema import Data
from bandsplit.errors import UserError
from bandsplit.models.cascade import Cascade
from bandsplit.models.fusion import Fusion
from bandsplit.runs.files import read_text, replace_text

FILE = "fusion.json"

FORMAT = 2
"""Format 1 had no cascade; it is still read."""


def preparation(data: Data) -> dict[str, Any]:
    """The keys of the preprocessing of validation images that an evaluation may change."""
    return {"val_image_size": data.val_size, "resize_size": data.resize_size, "interpolation": data.interpolation}


def _alike(one: Any, other: Any, key: str) -> bool:
    """Whether two dataclasses are equal; `key` counts only where both have a value for it."""
    known = getattr(one, key) and getattr(other, key)
    return bool(one == (other if known else replace(other, **{key: getattr(one, key)})))


@dataclass(frozen=True)
class FittedBranch:
    """A branch by the run and step that it comes from, wherever the run directory is now."""

    run: str
    """Name of the run."""
    seed: int
    step: int
    bands: list[int]
    digest: str = ""
    """Of its weights; none in files of earlier versions."""

    def is_that_of(self, other: FittedBranch) -> bool:
        return _alike(self, other, "digest")


@dataclass(frozen=True)
class HeldOut:
    """The images that fusion was fitted on."""

    images: int
    """How many of the held-out images."""
    of: int
    """All held-out images."""
    holdout: int | float
    """`data.holdout`."""
    seed: int
    digest: str
    """Of all training images, held out or not."""
    prepared: dict[str, Any] | None = None
    """Keys of their preprocessing; none in files of earlier versions."""

    def are_those_of(self, other: HeldOut) -> bool:
        return _alike(self, other, "prepared")


@dataclass(frozen=True)
class Fitted:
    """Fitted fusions of the branches of a run, or of several joined runs."""

    branches: list[FittedBranch]
    held_out: HeldOut
    fusions: dict[str, Fusion]
    cascade: Cascade | None = None

    def tell_other_preparation(self, data: Data, path: Path) -> None:
        """Warns if the images that these were fitted on, read from `path`, were prepared in another way than now."""
        now, then = preparation(data), self.held_out.prepared
        if then not in (None, now):
            logger.warning("{}: fusion was fitted on images prepared with {}, not {}", path, then, now)

    def is_for(self, branches: Sequence[FittedBranch]) -> bool:
        return len(self.branches) == len(branches) and all(map(FittedBranch.is_that_of, self.branches, branches))

    def write(self, path: Path) -> None:
        """Raises UserError if it cannot be written."""
        replace_text(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Fitted | None:
        """None if there is no such file. Raises UserError if it cannot be read or understood."""
        text = read_text(path)
        if text is None:
            return None
        try:
            table = json.loads(text)
            if not isinstance(table, dict) or table.pop("format", None) not in (1, FORMAT):
                raise ValueError("it has another format")
            cascade = table.get("cascade")
            fitted = cls(
                [FittedBranch(**branch) for branch in table["branches"]],
                HeldOut(**table["held_out"]),
                {name: Fusion(**each) for name, each in table["fusions"].items()},
                Cascade(**cascade) if cascade else None,
            )
            if any(len(each.weights) != len(fitted.branches) for each in fitted.fusions.values()):
                raise ValueError("weights and branches differ in number")
            if fitted.cascade is not None:
                fitted.cascade.check(len(fitted.branches))
                if "learned" not in fitted.fusions:
                    raise ValueError("a cascade without learned fusion, whose weights it needs")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: cannot be understood: {error}; write it anew with --fit-fusion") from error
        return fitted
