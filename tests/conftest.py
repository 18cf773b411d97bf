"""Shared by the tests: a small data set of real JPEG files, a config that trains on it in seconds, and commands."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from bandsplit import demo_data

REPOSITORY = Path(__file__).resolve().parent.parent
TRAIN_PER_CLASS, VAL_PER_CLASS = 16, 5  # 160 and 50 pictures: no multiple of the batch sizes below

TRAIN_TOML = """
data = "data.toml"
[model]
arch = "resnet18"
width = 0.125
[split]
block = 2
[optim]
lr = 0.05
[schedule]
warmup_epochs = 0.5
[train]
epochs = 2
batch_size = 12
log_every = 4
[checkpoint]
every_steps = 3
"""

DATA_TOML = """
root = "{root}"
classes = 10
image_size = 32
resize_size = 40
threads = 1
"""


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a data set with train/ and val/; not to be changed."""
    root = tmp_path_factory.mktemp("pictures") / "demo"
    demo_data.generate(root, seed=1, train_per_class=TRAIN_PER_CLASS, val_per_class=VAL_PER_CLASS)
    return root


@pytest.fixture
def config_file(tmp_path: Path, pictures: Path) -> Path:
    """A train config beside its data config, free to be changed."""
    (tmp_path / "data.toml").write_text(DATA_TOML.format(root=pictures))
    path = tmp_path / "tiny.toml"
    path.write_text(TRAIN_TOML)
    return path


def command(script: str, *arguments: object, ranks: int | None = None) -> list[str]:
    """``python src/<script>``, or torchrun with a number of ranks."""
    launcher = [sys.executable]
    if ranks is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, str(REPOSITORY / "src" / script), *map(str, arguments)]


def run(script: str, *arguments: object, ranks: int | None = None) -> subprocess.CompletedProcess[str]:
    """Runs an entry point to its end; one thread a process, as torchrun gives each of several ranks."""
    return subprocess.run(
        command(script, *arguments, ranks=ranks),
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@dataclass(frozen=True)
class Done:
    """What an entry point did, as `subprocess.CompletedProcess` tells it."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Like `run`, within this process: saves the seconds that importing torch takes."""

    def call(script: str, *arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(REPOSITORY / "src" / script), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        return Done(code, *capsys.readouterr())

    return call
