"""Writing metrics.jsonl, and the clock of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loguru import logger

from bandsplit.runs.files import read_text, replace_text, writing_to


class Metrics:
    """metrics.jsonl: one JSON object per line, flushed after each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._forgotten = path.with_name(f"{path.stem}_set_aside{path.suffix}")
        """Lines that a killed run wrote after its last checkpoint."""

    def write(self, event: str, **values: Any) -> None:
        line = json.dumps({"event": event, **values})
        with writing_to(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    @property
    def ended(self) -> bool:
        """Whether the last line is the "end" event."""
        lines = _lines(read_text(self._path) or "")
        return bool(lines) and (values_of(lines[-1]) or {}).get("event") == "end"

    def forget_after(self, step: int) -> None:
        """Moves damaged lines and lines of later steps, which will be repeated, to metrics_set_aside.jsonl."""
        text = read_text(self._path) or ""
        lines = _lines(text)
        kept = [line for line in lines if _is_up_to(line, step)]
        forgotten = [line for line in lines if not _is_up_to(line, step)]
        if forgotten:
            with (
                writing_to(self._forgotten),
                self._forgotten.open("a", encoding="utf-8", errors="surrogateescape") as file,
            ):
                file.writelines(f"{line}\n" for line in forgotten)
            logger.info("{}: {} lines after step {} moved to {}", self._path, len(forgotten), step, self._forgotten)
        whole = "".join(f"{line}\n" for line in kept)
        if whole != text:  # also if only the final newline is missing
            replace_text(self._path, whole)


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line]


def values_of(line: str) -> dict[str, Any] | None:
    """Values of a line of metrics; None if it is damaged."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None


def _is_up_to(line: str, step: int) -> bool:
    """Whether a line is intact, not later than `step`, and not the "end" event, which will be repeated."""
    values = values_of(line)
    return values is not None and values["step"] <= step and values.get("event") != "end"


class Stopwatch:
    """Wall-clock seconds of training, paused during validation and checkpoints. `seconds`: those before a resume."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._since: float | None = time.perf_counter()
        """When it last began to run; None while it is paused."""

    @property
    def seconds(self) -> float:
        return self._before if self._since is None else self._before + time.perf_counter() - self._since

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._before, self._since = self.seconds, None
        try:
            yield
        finally:
            self._since = time.perf_counter()
