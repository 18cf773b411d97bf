"""What trackers have written, read back: TensorBoard by its own reader, a .wandb file by its published layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb import teardown
from wandb.proto.wandb_internal_pb2 import Record

Values = dict[tuple[str, int], float]
"""By name and step."""


def tensorboard(run_dir: Path) -> tuple[Values, dict[tuple[str, int], float]]:
    """Values, and the wall time of each."""
    read = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    events = [(tag, event) for tag in read.Tags()["scalars"] for event in read.Scalars(tag)]
    values = {(tag, event.step): event.value for tag, event in events}
    assert len(values) == len(events), "a value is there twice"
    return values, {(tag, event.step): event.wall_time for tag, event in events}


def tensorboard_figures(run_dir: Path) -> list[str]:
    read = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    tags: list[str] = read.Tags()["images"]
    return tags


def wandb(run_dir: Path) -> tuple[Values, list[Record]]:
    """Values of the history and of the summary's `end/…` (at the last step), and all records."""
    teardown()  # waits for the process that writes the files, which goes on after the end of a run
    records = [record for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")) for record in _records(file)]
    values: Values = {}
    for record in records:
        if record.WhichOneof("record_type") != "history":
            continue
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for key, value in items.items():
            if not key.startswith(("_", "figures/")):
                assert (key, items["_step"]) not in values, "a value is there twice"
                values[key, items["_step"]] = value
    last = max(step for _, step in values)
    for record in records:
        for item in record.summary.update:
            key = item.key or "/".join(item.nested_key)
            if key.startswith("end/"):
                values[key, last] = json.loads(item.value_json)
    return values, records


def _records(file: Path) -> Iterator[Record]:
    """LevelDB's log format: blocks of 32 KiB, whose pieces have a header of checksum, length and kind."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield Record.FromString(whole)
            whole = b""
