"""A run directory: its files, its lock, its resolved config and the environments of its launches."""

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

from bandsplit.config.schema import RunConfig
from bandsplit.errors import UserError
from bandsplit.runs.files import replace_text, writing_to

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
        before = flatten(tomli.loads(self.config.read_text(encoding="utf-8")))
        now = flatten(resolved(config))
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
        with writing_to(self.path):
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
        with writing_to(self.path):
            for folder in (self.path, self.checkpoints, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.config, tomli_w.dumps(resolved(config)))
        launches = json.loads(self.environment.read_text(encoding="utf-8")) if self.environment.exists() else []
        replace_text(self.environment, json.dumps([*launches, environment], indent=2) + "\n")


def resolved(config: RunConfig) -> dict[str, Any]:
    """The config as a TOML table with every default written out; unset keys are left out."""
    return config.model_dump(mode="json", exclude_none=True)


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"epochs": 90}} → {"train.epochs": 90}; a list is one value."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


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
