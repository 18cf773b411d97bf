"""Reader for metrics.jsonl that tolerates damaged and repeated lines."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Event = dict[str, Any]

KINDS = ("train", "validation", "end")
"""Kinds of events that are read; each has finite `step`, `epoch` and `seconds`."""


def read_events(path: Path) -> tuple[list[Event], list[str]]:
    """The events of a run in order of step, and warnings for the user. Raises OSError if the file cannot be read."""
    *lines, unfinished = path.read_text(encoding="utf-8", errors="replace").split("\n")
    parsed = [parse(line) for line in lines]
    damaged = [number for number, line in enumerate(lines, start=1) if line.strip() and parsed[number - 1] is None]
    parsed.append(parse(unfinished))  # an incomplete last line is still being written: no warning
    events = [event for event in parsed if event and event["event"] in KINDS]
    current = _without_repeated(events)
    remarks = []
    if damaged:
        numbers = ", ".join(map(str, damaged[:5])) + (", …" if len(damaged) > 5 else "")
        remarks.append(f"left out {_count(len(damaged), 'damaged line')}: {numbers}")
    if len(current) < len(events):
        remarks.append(f"left out {_count(len(events) - len(current), 'event')} of steps that were trained again")
    return current, [f"{path}: {remark}" for remark in remarks + _not_finite(current)]


def parse(line: str) -> Event | None:
    """The event of a line; None if the line is damaged."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    if not isinstance(event, dict) or "event" not in event:
        return None
    if event["event"] in KINDS:
        position = [event.get(key) for key in ("step", "epoch", "seconds")]
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in position):
            return None
        if event["event"] == "validation":
            top1, branches = event.get("top1"), event.get("branch_top1")
            if not isinstance(branches, list) or not isinstance(top1, int | float) or not math.isfinite(top1):
                return None
    return event


def _without_repeated(events: Sequence[Event]) -> list[Event]:
    """Drops repeated steps: a run that was killed and resumed may have trained them twice; the last time counts."""
    kept: list[Event] = []
    earliest, seen = math.inf, set()
    for event in reversed(events):
        key = (event["event"], event["step"])
        if event["step"] <= earliest and key not in seen:
            kept.append(event)
        earliest = min(earliest, event["step"])
        seen.add(key)
    return kept[::-1]


def _not_finite(events: Sequence[Event]) -> list[str]:
    """One warning for each key with NaN or infinite values."""
    steps: dict[str, list[int]] = {}
    for event in events:
        for key, value in event.items():
            if isinstance(value, float) and not math.isfinite(value):
                steps.setdefault(f"{event['event']} {key}", []).append(event["step"])
    return [
        f"{name} is not finite in {_count(len(at), 'event')}, first at step {at[0]}; the figures have a gap there"
        for name, at in steps.items()
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
