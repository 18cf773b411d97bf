"""What a trained model is besides its weights, in a form that a file can hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bandsplit.errors import UserError

FORMAT = 1


@dataclass(frozen=True)
class Network:
    """The architecture of a branch: the keys of [model] that it is built from."""

    source: str
    arch: str
    width: float
    stem: str
    tweaks: tuple[str, ...]
    zero_gamma: bool
    drop_path: float
    dropout: float | None
    init: str


@dataclass(frozen=True)
class Branch:
    number: int
    """Its number in the run."""
    bands: tuple[int, ...]
    network: Network


@dataclass(frozen=True)
class Training:
    """Where the weights come from."""

    run: str
    """Name of the run."""
    seed: int
    step: int
    epochs: float | None
    """Epochs up to this step; None: the run does not say."""
    top1: float | None
    """Top-1 accuracy in percent of the mean of all branches of the run, validated at this step; None: it was not."""
    config: str
    """The resolved config of the run, as TOML."""
    versions: dict[str, str | None]
    """Of the packages that it was trained with."""


@dataclass(frozen=True)
class Description:
    """Everything that turns an image into class names, but the weights."""

    classes: tuple[str, ...]
    """Class names as in the data, in the order of the logits."""
    names: tuple[str, ...]
    """Readable names of the classes; where there are none, those of `classes`."""
    block: int
    """Side of the pixel block; N = block²."""
    matrix: tuple[tuple[float, ...], ...]
    """(N, N), the transform of a block with the factors of the bands in its rows (`View.matrix`)."""
    mean: tuple[float, ...]
    """Mean of each color, on the 0..255 scale of the pixels."""
    std: tuple[float, ...]
    """Standard deviation of each color, on the same scale."""
    image_size: int
    """Side in pixels of the images that the networks are built for."""
    val_size: int
    """Side in pixels of the center crop."""
    resize_size: int
    """Length in pixels of the shorter side before the center crop."""
    interpolation: str
    branches: tuple[Branch, ...]
    fusion: str
    """Name of the fusion that `weights` are of."""
    weights: tuple[float, ...]
    """(branches,): the fused logits are Σ_k weights[k] z_k."""
    training: Training

    def only(self, numbers: Sequence[int]) -> Description:
        """The model of some branches, by their numbers in the run.  Mean fusion stays a mean; fitted weights are kept.

        Raises UserError if there is no such branch, one is given twice, or no chosen branch has a weight.
        """
        there = {branch.number: i for i, branch in enumerate(self.branches)}
        if not numbers or len(set(numbers)) < len(numbers) or not set(numbers) <= there.keys():
            given, allowed = (",".join(map(str, each)) for each in (numbers, there))
            raise UserError(f"--branches {given}: allowed are {allowed}, each at most once")
        chosen = [there[number] for number in numbers]
        weights = [self.weights[i] for i in chosen]
        if self.fusion == "mean":
            weights = [1 / len(chosen)] * len(chosen)
        if not any(weights):
            raise UserError(f"--branches {','.join(map(str, numbers))}: fusion {self.fusion!r} gives them no weight")
        return replace(self, branches=tuple(self.branches[i] for i in chosen), weights=tuple(weights))

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, where: str) -> Description:
        """Raises UserError, naming the file `where`, if the text cannot be understood."""
        try:
            table = json.loads(text)
            found = table.pop("format")
            if found != FORMAT:
                raise ValueError(f"it has format {found}, and this version of bandsplit reads format {FORMAT}")
            branches = [
                Branch(**_tuples({**each, "network": Network(**_tuples(each["network"]))}))
                for each in table.pop("branches")
            ]
            matrix = tuple(tuple(row) for row in table.pop("matrix"))
            training = Training(**table.pop("training"))
            return cls(**_tuples(table), matrix=matrix, branches=tuple(branches), training=training)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: its description cannot be understood: {error}") from None


def _tuples(table: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists for tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
