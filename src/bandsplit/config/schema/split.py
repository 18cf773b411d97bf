"""[split]: the spectral split and which branch reads which bands."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from bandsplit.config.schema.base import Fraction, Table, mistake


def _branches(value: object) -> object:
    """Accepts "each", "all" or a list of lists of band numbers, with one message for everything else."""
    if value in ("each", "all"):
        return value
    groups = value if isinstance(value, list | tuple) else []
    if groups and all(isinstance(g, list | tuple) and g and all(type(k) is int for k in g) for g in groups):
        return tuple(tuple(g) for g in groups)
    raise mistake("split.branches", value, '"each", "all" or lists of band numbers such as [[0], [0, 1], [0, 2, 3]]')


def _only(value: object) -> object:
    if value is None:
        return None
    if isinstance(value, list | tuple) and value and all(type(k) is int and k >= 0 for k in value):
        return tuple(value)
    raise mistake("split.only", value, "numbers of branches, such as [0, 3]")


class Split(Table):
    """The spectral split, and which branch reads which bands."""

    block: int = Field(1, ge=1, le=32)
    """Side s of the pixel block; s² bands. 1: an ordinary RGB classifier."""
    transform: Literal["dct2d", "dct1d", "hadamard", "identity", "random"] = "dct2d"
    """What makes s² coefficients of a block (doc/method.md). `identity`: its pixels; `random`: a random rotation or
    reflection."""
    norm: Literal["ortho", "none"] = "ortho"
    """`none`: the unnormalized transform, as in the published dct1d runs."""
    scale: Fraction = 0.0
    """γ: band k is divided by σ_k^γ, a power of its standard deviation. 0: bands as they are; 1: all of deviation 1."""
    sigma: Annotated[tuple[Annotated[float, Field(gt=0)], ...] | None, Field(strict=False)] = None
    """σ of every band, over all colors; unset: measured at the start of a run that needs it, and kept in its config."""
    branches: Annotated[Literal["each", "all"] | tuple[tuple[int, ...], ...], BeforeValidator(_branches)] = "each"
    """Bands of each branch. "each": one branch per band; "all": one network for all bands; or explicit groups."""
    only: Annotated[tuple[int, ...] | None, BeforeValidator(_only)] = None
    """Branches that this run trains; unset: all."""

    @property
    def bands(self) -> int:
        return self.block**2

    @property
    def count(self) -> int:
        """Number of branches of the full ensemble."""
        return len(self._all_groups())

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Band numbers of every branch of this run."""
        groups = self._all_groups()
        return groups if self.only is None else tuple(groups[k] for k in self.only)

    @property
    def numbers(self) -> tuple[int, ...]:
        """For each branch of this run, its index in the full ensemble."""
        return self.only or tuple(range(len(self._all_groups())))

    def _all_groups(self) -> tuple[tuple[int, ...], ...]:
        if self.branches == "each":
            return tuple((k,) for k in range(self.bands))
        if self.branches == "all":
            return (tuple(range(self.bands)),)
        return self.branches

    @model_validator(mode="after")
    def _check(self) -> Split:
        groups = self._all_groups()
        if self.only is not None and (len(set(self.only)) < len(self.only) or max(self.only) >= len(groups)):
            raise mistake("split.only", list(self.only), f"branches 0 to {len(groups) - 1}, each once")
        if self.sigma is not None and len(self.sigma) != self.bands:
            allowed = f"{self.bands} positive numbers, since block = {self.block} has as many bands"
            raise mistake("split.sigma", list(self.sigma), allowed)
        for group in groups:
            if len(set(group)) != len(group):
                raise mistake("split.branches", list(group), "each band once in a branch")
            if not all(0 <= k < self.bands for k in group):
                last = self.bands - 1
                raise mistake("split.branches", list(group), f"bands 0 to {last}, since block = {self.block}")
        if self.transform == "hadamard" and self.block & (self.block - 1):
            raise mistake("split.block", self.block, 'a power of two with transform = "hadamard"')
        return self
