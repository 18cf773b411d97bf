"""A wheel, installed where no clone is: it holds the configs, and the command finds them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, Shared

RESOLVED = """
import json, sys
from bandsplit.config import loading, shipped
from bandsplit.runs.directory import resolved
names = [file.stem for file in shipped.files("train") if not file.stem.startswith("recipe_")]
print(json.dumps([str(shipped.FOLDER), {name: resolved(loading.load(name)) for name in names}]))
"""


@dataclass(frozen=True)
class Installed:
    python: Path
    folder: Path
    """Where it is run: an empty folder."""

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Runs a program of the environment, with nothing of the clone on its path."""
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        program = self.python.parent / str(words[0])
        return subprocess.run(
            [program, *map(str, words[1:])], capture_output=True, text=True, cwd=self.folder, env=env, timeout=120
        )


@pytest.fixture
def installed(tmp_path: Path, shared: Shared) -> Installed:
    def make(folder: Path) -> None:
        source = folder / "source"
        ours = shutil.ignore_patterns("__pycache__", "*.egg-info")
        for name in ("src", "config"):
            shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=ours)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(REPOSITORY / name, source)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        offline = ["--quiet", "--no-deps", "--no-index"]
        call([*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", folder, source])
        call([sys.executable, "-m", "venv", "--without-pip", folder / "venv"])
        python = folder / "venv/bin/python"
        call([*pip, "--python", python, "install", *offline, *folder.glob("*.whl")])
        shutil.rmtree(source)
        (packages,) = (folder / "venv/lib").glob("python*/site-packages")
        (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read

    return Installed(shared.once("wheel", make) / "venv/bin/python", tmp_path)


def call(words: list[object]) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_demo_and_shipped_configs_in_a_fresh_environment(installed: Installed) -> None:
    torchrun = ("python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1, "-m", "bandsplit")
    for command, first in (
        ((*torchrun, "train", "--dry-run"), "demo: 4 x resnet18, demo at 64 pixels"),
        (
            ("bandsplit", "train", "resnet34_sub16", "--dry-run", "--world-size", 8),
            "resnet34_sub16: 16 x resnet34, imagenet1k at 224 pixels",
        ),
    ):
        done = installed.run(*command)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0] == first
    assert list(installed.folder.iterdir()) == []


@pytest.mark.slow
def test_configs_of_the_wheel_are_those_of_the_clone(installed: Installed) -> None:
    """All of them, with what they extend and their data configs; and a config beside the user's own."""
    theirs = installed.run("python", "-c", RESOLVED)
    ours = subprocess.run([sys.executable, "-c", RESOLVED], capture_output=True, text=True, check=True)
    assert theirs.returncode == 0, theirs.stderr
    folder, configs = re.match(r'\["(.*?)", (.*)\]', theirs.stdout).groups()  # type: ignore[union-attr]
    assert Path(folder).is_relative_to(installed.python.parents[1])
    assert ours.stdout == f'["{REPOSITORY}/config", {configs}]\n'
    own = installed.folder / "own.toml"
    own.write_text(f'extends = "{folder}/train/resnet34_sub36.toml"\n[optim]\nlr = 0.5\n')
    done = installed.run("bandsplit", "config", "show", "own.toml")
    assert done.returncode == 0, done.stderr
    assert 'name = "own"' in done.stdout
    assert "lr = 0.5" in done.stdout
    assert "image_size = 336" in done.stdout
    wrong = installed.run("bandsplit", "train", "resnet34_sub16", "--set", "optim.lrr=1", "--dry-run")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: --set optim.lrr=1: optim.lrr: unknown key; did you mean optim.lr?\n"
