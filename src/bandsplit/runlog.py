"""A run directory and what is written to it: resolved config, environment, metrics, logs."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli
import tomli_w
from filelock import FileLock, Timeout
from loguru import logger
from tqdm import tqdm

from bandsplit.errors import UserError
from bandsplit.schema import RunConfig

MAY_CHANGE = (
    "parallel.", "checkpoint.", "data.root", "data.threads", "data.prefetch", "data.decoder.read_ahead",
    "train.log_every", "validation.batch_size", "distillation.teacher",
)  # fmt: skip
"""Keys that say where and how a run is computed, not what: they may change when it is resumed."""

PACKAGES = ("bandsplit", "torch", "torchvision", "nvidia-dali-cuda120", "numpy")


class RunDirectory:
    """Names in a run directory: config.toml, environment.json, metrics.jsonl, checkpoints/, logs/, plots/."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.toml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"

    def check(self, config: RunConfig, resume: bool) -> None:
        """Raises UserError where a new run would overwrite another, or a resumed one would change its config."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--run-dir {self.path}: this is a file, not a folder")
        if not self.config.exists():
            return
        if not resume:
            raise UserError(f"{self.path} already holds a run; --resume continues it, --run-dir names another folder")
        before = _flat(tomli.loads(self.config.read_text(encoding="utf-8")))
        now = _flat(resolved(config))
        changed = [
            f"{key} was {before.get(key, 'unset')!r}, now {now.get(key, 'unset')!r}"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
        ]
        if changed:
            raise UserError(f"{self.path} holds a run of another config: {'; '.join(changed)}")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process can train into this directory.  Raises UserError where one does, and says which."""
        with _writing_to(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        lock, owner = FileLock(self.path / ".lock", blocking=False), self.path / ".lock_owner"
        try:
            lock.acquire()
        except Timeout:
            by = f" by {owner.read_text(encoding='utf-8')}" if owner.exists() else ""
            raise UserError(f"{self.path} is in use{by}; wait for it to end, or name another --run-dir") from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be locked: {error}") from error
        try:
            job = os.environ.get("SLURM_JOB_ID")
            described = f"process {os.getpid()} on {socket.gethostname()}{f', Slurm job {job}' if job else ''}"
            replace_text(owner, described)
            yield
            owner.unlink(missing_ok=True)
        finally:
            lock.release()

    def create(self, config: RunConfig, environment: Mapping[str, Any]) -> None:
        """Makes the folders, writes config.toml and adds this launch to environment.json."""
        with _writing_to(self.path):
            for folder in (self.path, self.checkpoints, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.config, tomli_w.dumps(resolved(config)))
        launches = json.loads(self.environment.read_text(encoding="utf-8")) if self.environment.exists() else []
        replace_text(self.environment, json.dumps([*launches, environment], indent=2) + "\n")


def resolved(config: RunConfig) -> dict[str, Any]:
    """The config as a TOML table with every default written out; unset keys are left out."""
    return config.model_dump(mode="json", exclude_none=True)


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with _writing_to(path):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


@contextmanager
def _writing_to(path: Path) -> Iterator[None]:
    """Turns what the file system refuses (full, read-only, gone) into a message for the user."""
    try:
        yield
    except OSError as error:
        told = UserError(f"{path}: cannot be written: {error}")
        told.one_rank = True
        raise told from error


def environment(world_size: int, device: str) -> dict[str, Any]:
    """What one needs to know to repeat a launch."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed_files": _git("status", "--porcelain", "--untracked-files=no"),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
        "host": socket.gethostname(),
        "cpu_count": os.cpu_count(),
        "world_size": world_size,
        "device": device,
    }


def _git(*arguments: str) -> str | None:
    """Output of git in the folder of the source; None where there is no git or no repository."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


class Metrics:
    """metrics.jsonl: one JSON object a line, each on disk as soon as it is written."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, event: str, **values: Any) -> None:
        line = json.dumps({"event": event, **values})
        with _writing_to(self._path), self._path.open("a", encoding="utf-8") as file:
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


def start_logging(directory: RunDirectory, rank: int) -> None:
    """A file a rank; rank 0 also to the terminal, above the progress bar, or with its figures where there is none."""
    logger.remove()
    path = str(directory.logs / f"rank{rank}.log").replace("{", "{{").replace("}", "}}")  # loguru fills in braces
    logger.add(path, format="{time:YYYY-MM-DD HH:mm:ss} {level: <7} {message}")
    if rank == 0:
        level = "INFO" if sys.stderr.isatty() else "DEBUG"
        logger.add(
            lambda text: tqdm.write(text, end="", file=sys.stderr), format="{time:HH:mm:ss} {message}", level=level
        )
    else:
        logger.add(sys.stderr, format=f"{{time:HH:mm:ss}} rank {rank}: {{message}}", level="ERROR")


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
