"""Run directory: files, lock, resolved config, class names and the environment of each launch."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import tomli_w
from filelock import FileLock, Timeout
from loguru import logger

from bandsplit import __version__
from bandsplit.config import loading
from bandsplit.config.schema import RunConfig
from bandsplit.cpus import available_cpus
from bandsplit.data.images import require_same_classes
from bandsplit.errors import UserError
from bandsplit.runs.files import make_folder, read_text, reading, replace_text, set_aside

NO_EFFECT = (
    "parallel.", "checkpoint.", "data.threads", "data.prefetch", "data.check", "data.on_bad", "data.max_bad",
    "data.in_memory", "data.class_names", "train.log_every", "train.activation_checkpointing", "train.cuda_graphs",
    "train.branches_at_once", "train.profile", "validation.batch_size", "fusion.", "log.",
)  # fmt: skip
"""Keys, or prefixes of keys, that do not affect what is computed."""

MAY_CHANGE = (*NO_EFFECT, "data.root", "distillation.teacher", "distillation.checkpoint")
"""Those that may change when a run is resumed: also the places of what is then compared with what the run began with.
"""

PACKAGES = ("torch", "torchvision", "nvidia.dali", "numpy")
"""Import names of the packages whose versions environment.json records."""


class RunDirectory:
    """A run directory: its config, classes, environment and metrics, and data/, checkpoints/, logs/ and plots/."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.toml"
        self.classes = self.path / "classes.json"
        self.class_names = self.path / "class_names.json"
        """Readable names of the classes, in their order, if there are some."""
        self.data = self.path / "data"
        """Indexes of the images that the run began with."""
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.branches = self.path / "branches.json"
        """What the branches read and cost."""
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.bad_images = self.path / "bad_images.csv"
        self.profile = self.path / "profile"
        """Traces of `train.profile`."""
        self.owner = self.path / ".lock_owner"
        """Names the process that holds the lock."""

    @property
    def holds_run(self) -> bool:
        """Whether there is a config.toml. Raises UserError if the folder cannot be read."""
        with reading(self.path):
            return self.config.is_file()

    @property
    def in_progress(self) -> bool:
        """Whether a process trains here. One on another host counts as alive until it has ended by itself."""
        named = re.match(r"process (\d+) on ([^\s,]+)", read_text(self.owner) or "")
        if named is None:
            return False
        if named[2] != socket.gethostname():
            return True
        state = _process_stat(named[1])
        return bool(state) and state[0] not in "ZX"  # killed, and not yet waited for

    def check(self, config: RunConfig, resume: bool, own_only: bool = False) -> dict[str, dict[str, Any]]:
        """Values that the run to resume has found for keys that the config leaves open, by table and key.

        `own_only`: resume only what the same `launcher` has trained last, as in a restart by torchrun.

        Raises UserError if a new run would overwrite another, or a resumed run would change its config. It may only
        become longer, and what is in MAY_CHANGE may differ.
        """
        if not self.holds_run:
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"--run-dir {self.path}: this is a file, not a folder")
            return {}
        if not resume or (own_only and self.last_launch.get("launcher") != launcher()):
            raise UserError(f"{self.path} already holds a run; --resume continues it, --run-dir names another folder")
        # keys added since the run began load as their defaults, which match what the run was computed with
        began = loading.load(self.config)
        found: dict[str, dict[str, Any]] = {}
        if config.split.sigma is None:
            found["split"] = {"sigma": began.split.sigma}
        if config.train.grad_accum_steps == "auto":
            found["train"] = {"grad_accum_steps": began.train.grad_accum_steps}
        before, now = (flatten(resolved(each)) for each in (began, config.with_values(found)))
        if config.data.classes is None:  # counted in the data, which are compared by name
            before.pop("data.classes", None)
        before["train.epochs"] = max(before["train.epochs"], now["train.epochs"])
        changed = [
            f"{key} was {before.get(key, 'unset')!r}, now {now.get(key, 'unset')!r}"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
        ]
        if changed:
            raise UserError(f"{self.path} holds a run of another config: {'; '.join(changed)}")
        return found

    def check_classes(self, found: Sequence[str], where: str) -> None:
        """Raises UserError if the class names that the run began with differ from those `found` in the data."""
        began_with = _names_in(self.classes)
        if began_with is not None:
            require_same_classes(began_with, str(self.path), found, where)

    def readable_names(self, classes: Sequence[str]) -> list[str]:
        """Names of the classes that people read; `classes` if the run has none. Raises UserError for a damaged file."""
        names = _names_in(self.class_names) or list(classes)
        if len(names) != len(classes):
            raise UserError(f"{self.class_names}: {len(names):,} names in it, but there are {len(classes):,} classes")
        return names

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the lock of this directory. Raises UserError, naming the owner, if another process holds it."""
        make_folder(self.path)
        lock, owner = FileLock(self.path / ".lock", blocking=False), self.owner
        try:
            lock.acquire()
        except Timeout:
            by = read_text(owner)
            raise UserError(
                f"{self.path} is in use{f' by {by}' if by else ''}; wait for it to end, or name another --run-dir"
            ) from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be locked: {error}") from error
        try:
            job = os.environ.get("SLURM_JOB_ID")
            described = f"process {os.getpid()} on {socket.gethostname()}{f', Slurm job {job}' if job else ''}"
            replace_text(owner, described)
            yield
        finally:
            with suppress(OSError):  # only informative: the lock decides
                owner.unlink()
            lock.release()

    def create(
        self, config: RunConfig, classes: Sequence[str], environment: Mapping[str, Any], names: Sequence[str] = ()
    ) -> None:
        """Creates the folders, writes config.toml and classes.json, and appends this launch to environment.json.

        `names`: readable ones of the classes, if there are some.
        """
        for folder in (self.path, self.checkpoints, self.logs):
            make_folder(folder)
        replace_text(self.environment, json.dumps([*self._launches(), environment], indent=2) + "\n")
        replace_text(self.config, tomli_w.dumps(resolved(config)))
        replace_text(self.classes, json.dumps(list(classes)) + "\n")
        if names:
            replace_text(self.class_names, json.dumps(list(names), ensure_ascii=False, indent=1) + "\n")

    @property
    def last_launch(self) -> dict[str, Any]:
        """The last entry of environment.json; {} if there is none, or none that can be read."""
        with suppress(ValueError):
            launches = json.loads(read_text(self.environment) or "[]")
            if isinstance(launches, list) and launches and isinstance(launches[-1], dict):
                return launches[-1]
        return {}

    def _launches(self) -> list[Any]:
        """Entries of environment.json; an invalid file is set aside."""
        text = read_text(self.environment)
        if text is None:
            return []
        with suppress(ValueError):
            launches = json.loads(text)
            if isinstance(launches, list):
                return launches
        logger.warning("{} cannot be understood; it is kept as {}", self.environment, set_aside(self.environment))
        return []


def _names_in(path: Path) -> list[str] | None:
    """A JSON list of names; None if there is no such file. Raises UserError if something else is in it."""
    text = read_text(path)
    if text is None:
        return None
    try:
        names = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: not a list of names")
    return names


def resolved(config: RunConfig) -> dict[str, Any]:
    """The config as a TOML table with every default written out; unset keys are left out."""
    return config.model_dump(mode="json", exclude_none=True)


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"epochs": 90}} → {"train.epochs": 90}; a list is one value."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def launcher() -> str | None:
    """The torchrun that has started this process, the same for all of its restarts; None without torchrun.

    Its run id can be that of other launches too, so it is told apart by its process and the time at which that began.
    """
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    if run is None:
        return None
    began = "".join(_process_stat(os.getppid())[19:20])  # in clock ticks since the boot
    return f"torchrun {run}, process {os.getppid()} on {socket.gethostname()}, began at {began}"


def _process_stat(pid: int | str) -> list[str]:
    """Fields of /proc/PID/stat from the third on, which is the state; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def environment(world_size: int, device: str) -> dict[str, Any]:
    """Environment of a launch, for reproducing it: command, commit, versions, host, ranks and device."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "launcher": launcher(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed_files": _git("status", "--porcelain", "--untracked-files=no"),
        "versions": {"python": platform.python_version(), "bandsplit": __version__, **_versions(PACKAGES)},
        "host": socket.gethostname(),
        "cpu_count": os.cpu_count(),
        "available_cpus": available_cpus(),
        "world_size": world_size,
        "device": device,
    }


def _versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Versions of imported packages; None if not imported or without a version.

    Read from the modules: distribution names vary (nvidia-dali-cuda120, -cuda130), and a package on PYTHONPATH has
    none.
    """
    return {name: getattr(sys.modules.get(name), "__version__", None) for name in packages}


def _git(*arguments: str) -> str | None:
    """Output of git in the source folder; None without git or outside a repository."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
