"""Starts the followers of a run, each as a process of its own, and tells once if one has died."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger

import bandsplit
from bandsplit.commands import command
from bandsplit.runs.directory import RunDirectory

SECONDS_TO_FINISH = 60
"""That a job of Slurm, which kills all of its processes at its end, leaves followers for what is left."""


@dataclass(frozen=True)
class Started:
    process: subprocess.Popen[bytes]
    log: Path
    begin: int
    """Bytes of the log that are older than the process."""

    def reason(self) -> str:
        """Why it has ended, as it says itself."""
        text = self.log.read_bytes()[self.begin :].decode(errors="replace") if self.log.exists() else ""
        errors = [line.removeprefix("error: ") for line in text.splitlines() if line.startswith("error: ")]
        return errors[-1] if errors else f"exit code {self.process.returncode}, see {self.log}"


class Followers:
    """Listener of a run's events. No follower holds up or ends the run, whatever happens to it."""

    def __init__(self, directory: RunDirectory, names: Sequence[str]) -> None:
        self._directory = directory
        self._running: dict[str, Started] = {}
        for name in dict.fromkeys(names):
            try:
                self._running[name] = self._start(name)
            except OSError as error:
                self._warn(name, f"cannot be started: {error}")

    def __call__(self, event: str, **values: Any) -> None:
        if event == "end":
            self._leave()
        for name, started in [*self._running.items()]:
            code = started.process.poll()
            if code is not None:
                del self._running[name]
            if code or (code == 0 and event != "end"):
                self._warn(name, f"has ended: {started.reason()}")

    def _start(self, name: str) -> Started:
        source = str(Path(bandsplit.__file__).parents[1])
        env = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC_")}
        env["PYTHONPATH"] = os.pathsep.join([source, *filter(None, [env.get("PYTHONPATH")])])
        words = [sys.executable, "-m", "bandsplit.cli.track", str(self._directory.path), "--to", name, "--follow"]
        path = self._directory.logs / f"track_{name}.log"
        with path.open("ab") as log:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
            )
            return Started(process, path, log.tell())

    def _warn(self, name: str, what: str) -> None:
        later = f"{command('track')} {self._directory.path} --to {name}"
        logger.warning(f"tracker {name} {what}. The training goes on; {later} passes on what is missing afterwards")

    def _leave(self) -> None:
        """They end by themselves after the run."""
        if "SLURM_JOB_ID" not in os.environ:
            return
        for name, started in self._running.items():
            try:
                started.process.wait(SECONDS_TO_FINISH)
            except subprocess.TimeoutExpired:
                self._warn(name, f"is not done after {SECONDS_TO_FINISH} s")
