"""A window of steps recorded by torch.profiler (`train.profile`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from loguru import logger
from torch.profiler import ProfilerActivity, record_function

from bandsplit.paths import writing_to
from bandsplit.runs.files import make_folder
from bandsplit.runs.metrics import Stopwatch

TOP = 10
"""Operators in the table."""


class Profile:
    """Records the steps of a window that this launch takes: a Chrome trace in a folder, a table in the log.

    Used as a context manager, it also writes what it has of a run that ends by itself within the window.
    """

    def __init__(self, window: tuple[int, ...], folder: Path, watch: Stopwatch, device: torch.device) -> None:
        """
        Args:
            window: first and last step; empty: none are recorded.
            watch: stands still while the profiler starts and the trace is written.
        """
        self._steps = range(window[0], window[1] + 1) if window else range(0)
        self._folder, self._watch = folder, watch
        self._on_gpu = device.type == "cuda"
        self._running: torch.profiler.profile | None = None
        self._recorded: list[int] = []

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if self._running is None:
            return
        if error is None:
            self._write(self._running)
        else:
            self._running.stop()

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Inside, the arithmetic of a step takes place."""
        if step not in self._steps:
            yield
            return
        if self._running is None:
            with self._watch.paused():
                activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] * self._on_gpu)]
                self._running = torch.profiler.profile(activities=activities, acc_events=True)
                self._running.start()
        with record_function(f"step {step}"):
            yield
        self._recorded.append(step)
        if step == self._steps[-1]:
            with self._watch.paused():
                self._write(self._running)

    def _write(self, profile: torch.profiler.profile) -> None:
        self._running = None
        profile.stop()
        first, last = self._recorded[0], self._recorded[-1]
        path = self._folder / f"steps_{first}-{last}.json.gz"
        make_folder(self._folder)
        with writing_to(path):
            profile.export_chrome_trace(str(path))
        logger.info(f"profile of steps {first} to {last}: {path}, for https://ui.perfetto.dev\n{self._table(profile)}")

    def _table(self, profile: torch.profiler.profile) -> str:
        """The operators that took the most time of their own, on the GPU if there is one."""
        attribute, unit = ("self_device_time_total", "GPU ms") if self._on_gpu else ("self_cpu_time_total", "CPU ms")
        rows = [(event.key, event.count, getattr(event, attribute) / 1000) for event in profile.key_averages()]
        rows = [row for row in rows if not row[0].startswith(("step ", "ProfilerStep"))]
        total = sum(time for _, _, time in rows) or 1.0
        top = sorted(rows, key=lambda row: -row[2])[:TOP]
        lines = [f"  {'operator':<52} {'calls':>8} {unit:>10} {'share':>6}"]
        for name, calls, time in top:
            shown = name if len(name) <= 52 else f"{name[:51]}…"
            lines.append(f"  {shown:<52} {calls:>8,} {time:>10,.1f} {100 * time / total:>4.0f} %")
        return "\n".join(lines)
