"""metrics.jsonl and the clock of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bandsplit.runs.files import replace_text, writing_to


class Metrics:
    """metrics.jsonl: one JSON object a line, each on disk as soon as it is written."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, event: str, **values: Any) -> None:
        line = json.dumps({"event": event, **values})
        with writing_to(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def forget_after(self, step: int) -> None:
        """Drops what a killed run wrote after its last checkpoint: those steps are done again."""
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            replace_text(self._path, "".join(line for line in lines if _is_up_to(line, step)))


def _is_up_to(line: str, step: int) -> bool:
    """Whether a line of metrics is complete, not later than a step, and not the end that comes again."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError:  # the process was killed while it wrote this line
        return False
    return bool(values["step"] <= step and values["event"] != "end")


class Stopwatch:
    """Seconds of training: stands still during validation and checkpoints, goes on where a resumed run stopped."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._before, self._since = seconds, time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._since

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._before = self.seconds
        try:
            yield
        finally:
            self._since = time.perf_counter()
