"""Events for TensorBoard in the folder `tensorboard` of a run directory."""

from __future__ import annotations

import io
import json
from contextlib import suppress
from datetime import datetime

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event as Written
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from bandsplit.paths import writing_to
from bandsplit.reporting.events import Event
from bandsplit.runs.directory import RunDirectory
from bandsplit.runs.files import read_text
from bandsplit.tracking.tracker import Figures, branch_numbers, scalars


class TensorBoard:
    """Values become float32. The wall time of an event is the start of the run plus `seconds`, its time of training."""

    def __init__(self, directory: RunDirectory) -> None:
        self._folder = directory.path / "tensorboard"
        with writing_to(self._folder):
            self._writer = EventFileWriter(str(self._folder))
        self._numbers, self._start = branch_numbers(directory), started(directory)
        self._step, self._seconds = 0, 0.0

    def restart(self) -> None:
        """TensorBoard forgets what it has read of these steps from older files or earlier in this one."""
        self._write(0, 0.0, session_log=SessionLog(status=SessionLog.START))

    def log(self, event: Event) -> None:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(event, self._numbers)]
        self._write(event["step"], event["seconds"], summary=Summary(value=values))
        self._step, self._seconds = event["step"], event["seconds"]

    def _write(self, step: int, seconds: float, **content: SessionLog | Summary) -> None:
        with writing_to(self._folder):
            self._writer.add_event(Written(step=step, wall_time=self._start + seconds, **content))

    def flush(self) -> None:
        with writing_to(self._folder):
            self._writer.flush()

    def finish(self, figures: Figures) -> str:
        for name, png in figures().items():
            width, height = Image.open(io.BytesIO(png)).size
            image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
            value = Summary.Value(tag=f"figures/{name}", image=image)
            self._write(self._step, self._seconds, summary=Summary(value=[value]))
        with writing_to(self._folder):
            self._writer.close()
        return f"{self._folder}: written; tensorboard --logdir {self._folder.parent} shows it"


def started(directory: RunDirectory) -> float:
    """When a run was first launched, in seconds since the epoch; 0 if environment.json does not say."""
    with suppress(ValueError, KeyError, IndexError, TypeError):
        first = json.loads(read_text(directory.environment) or "")[0]["started"]
        return datetime.strptime(first, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    return 0.0
