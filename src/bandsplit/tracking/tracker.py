"""What a tracker is, and which there are."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from bandsplit.errors import UserError
from bandsplit.reporting.events import Event
from bandsplit.reporting.settings import read_settings
from bandsplit.runs.directory import RunDirectory

TRACKERS = ("tensorboard", "wandb")
"""Their names, which are also those of their packages and of the extras that install these."""


Figures = Callable[[], dict[str, bytes]]
"""Draws them, as PNG."""


class Tracker(Protocol):
    """Takes the events of one run."""

    def restart(self) -> None:
        """The events come from the first on, also those that were logged before: a resumed run may have other ones."""

    def log(self, event: Event) -> None: ...

    def flush(self) -> None:
        """What was logged is kept if this process is killed."""

    def finish(self, figures: Figures) -> str:
        """Takes the figures of a run that has ended; none if it has not. Returns what to tell the user."""


def require(names: Sequence[str], key: str = "log.trackers") -> None:
    """Raises UserError for the first tracker whose package is not installed. `key`: where it was asked for."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{key}: {name!r} given, but the package {name} is not installed: pip install -e .[{name}]")


def opener(name: str) -> Callable[[RunDirectory], Tracker]:
    """Opens the tracker of this name for a run. Imports its package."""
    if name == "tensorboard":
        from bandsplit.tracking.tensorboard import TensorBoard

        return TensorBoard
    from bandsplit.tracking.wandb import WandB

    return WandB


def branch_numbers(directory: RunDirectory) -> list[int] | None:
    """Numbers, in the full ensemble, of the branches of a run that trains some of them; None: it trains all."""
    settings, *_ = read_settings(directory.config)
    only: list[int] | None = json.loads(settings.get("split.only", "null"))
    return only


def scalars(event: Event, numbers: Sequence[int] | None = None) -> Iterator[tuple[str, float]]:
    """The numbers of an event by name, such as `train/loss`, or `train/branch_loss/0` for an entry of a list.

    Args:
        numbers: of the branches of the run, if they are not 0, 1, …
    """
    for key, value in event.items():
        if key in ("event", "step"):
            continue
        name = f"{event['event']}/{key}"
        if isinstance(value, list):
            named = numbers if numbers is not None and len(numbers) == len(value) else range(len(value))
            yield from ((f"{name}/{k}", each) for k, each in zip(named, value, strict=True) if _is_number(each))
        elif _is_number(value):
            yield name, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
