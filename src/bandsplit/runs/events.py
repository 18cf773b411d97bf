"""Events of a run and their listeners, such as metrics.jsonl and the console."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Listener = Callable[..., None]
"""Called as `listener(event, **values)`; events are "train", "validation" and "end"."""


class Events:
    """Passes each event to all listeners in order. Only rank 0 has listeners."""

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = listeners

    def emit(self, event: str, **values: Any) -> None:
        for listener in self._listeners:
            listener(event, **values)
