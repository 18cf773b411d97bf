"""Bytes that a rank sends per step, and the number of branch groups that minimizes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bandsplit.config.schema import RunConfig
from bandsplit.errors import UserError

GRADIENT_BYTES = 4  # gradients are float32 whatever the precision


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends per optimizer step with `branch_groups` branch groups.

    Gradients: in a ring all-reduce over D ranks, each rank sends 2 (D - 1) / D times the size of the gradients
    (Patarasuk and Yuan, 2009). Bands: each rank sends the bands of its images that the other branch groups read.
    """

    branch_groups: int
    branches: int
    """Number of branches per rank."""
    gradients: float
    bands: float

    @property
    def bytes(self) -> float:
        return self.gradients + self.bands


def step_traffic(config: RunConfig, world_size: int, groups: int, parameters: Sequence[int], half: bool) -> Traffic:
    """Traffic of the busiest rank: gradients of the largest branch group, bands of the group that reads the fewest.

    If these are different branch groups, it is an upper bound.

    Args:
        config: the run.
        world_size: number of ranks.
        groups: number of branch groups; must divide the ranks and the branches.
        parameters: number of parameters of each branch that are trained.
        half: whether bands are float16 instead of float32.
    """
    replicas = world_size // groups
    of_group = [range(b * len(parameters) // groups, (b + 1) * len(parameters) // groups) for b in range(groups)]
    pixels = (config.data.image_size // config.split.block) ** 2
    values = [3 * pixels * len(group) for group in config.split.groups]
    own = min(sum(values[k] for k in group) for group in of_group)
    most = max(sum(parameters[k] for k in group) for group in of_group)
    return Traffic(
        groups,
        len(parameters) // groups,
        2 * (replicas - 1) / replicas * most * GRADIENT_BYTES,
        config.train.batch_size / world_size * (sum(values) - own) * (2 if half else 4) if groups > 1 else 0,
    )


def possible_groups(config: RunConfig, world_size: int) -> list[int]:
    """Numbers of branch groups that divide both the ranks and the branches."""
    branches = len(config.split.groups)
    return [g for g in range(1, branches + 1) if branches % g == 0 and world_size % g == 0]


def branch_groups(config: RunConfig, world_size: int, parameters: Sequence[int], half: bool) -> int:
    """The number of branch groups of a run: `parallel.branch_groups`, or with "auto" the one with the least traffic.

    Among equals, "auto" takes the smallest. `parameters` and `half` are as for `step_traffic`. Raises UserError if the
    number given does not divide both the ranks and the branches.
    """
    wanted, possible = config.parallel.branch_groups, possible_groups(config, world_size)
    if wanted == "auto":
        return min(possible, key=lambda g: step_traffic(config, world_size, g, parameters, half).bytes)
    if wanted not in possible:
        raise UserError(
            f"parallel.branch_groups: {wanted} given, but it has to divide {world_size} ranks and "
            f"{len(config.split.groups)} branches: {', '.join(map(str, possible))} or 'auto'"
        )
    return wanted
