"""Events of a run and who listens to them: metrics.jsonl, the console, and whatever follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Listener = Callable[..., None]
"""Called as `listener(event, **values)`; events are "train", "validation" and "end"."""


class Events:
    """Hands every event to each listener in turn; a rank other than the first has none."""

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = listeners

    def emit(self, event: str, **values: Any) -> None:
        for listener in self._listeners:
            listener(event, **values)
