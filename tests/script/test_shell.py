"""Shell scripts parse, and the Slurm scripts only set resources."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SCRIPTS = sorted((REPOSITORY / "script").rglob("*.sh"))
SLURM = [script for script in SCRIPTS if script.parent.name == "slurm" and script.name != "launch.sh"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_and_shellcheck_accept_it(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", script], check=True, cwd=REPOSITORY)


@pytest.mark.parametrize("script", SLURM, ids=lambda path: path.name)
def test_slurm_scripts_hold_resources_and_set_no_key(script: Path) -> None:
    text = script.read_text()
    assert text.splitlines()[-1].startswith(("train ", "report ", "controls "))
    assert text.endswith(' "$@"\n')
    assert "--set" not in text
    assert len(text.splitlines()) <= 25


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("extras", ["", "dev"])
def test_set_up_takes_nvcc_where_there_is_a_gpu(tmp_path: Path, gpu: bool, extras: str) -> None:
    if not gpu and (Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")):
        pytest.skip("there is a GPU")
    programs = ["venv/bin/python", "venv/bin/uv", *(["bin/nvidia-smi"] if gpu else [])]
    for program in programs:
        path = tmp_path / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('#!/bin/sh\necho "$@"\n')
        path.chmod(0o755)
    env = {**os.environ, "VENV": str(tmp_path / "venv"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    script = f"set -euo pipefail; source script/setup.sh {extras}"
    done = subprocess.run(["bash", "-c", script], cwd=REPOSITORY, env=env, capture_output=True, text=True, check=True)
    expected = ",".join([*([extras] if extras else []), *(["nvcc"] if gpu else [])])
    assert done.stdout.split()[-2:] == ["--editable", f".[{expected}]" if expected else "."]


@pytest.mark.parametrize("given", [[], ["-k", "a b"], ["--quick"], ["--quick", "tests/data", "-x"]], ids=str)
def test_what_test_sh_calls(tmp_path: Path, given: list[str]) -> None:
    """Says what it installs, then runs every check, and pytest with its arguments."""
    (tmp_path / "script").mkdir()
    shutil.copy(REPOSITORY / "script/test.sh", tmp_path / "script")
    (tmp_path / "script/setup.sh").write_text('echo "setup $1"\n')
    for tool in ("ruff", "lint-imports", "mypy", "python", "apt-get"):
        (tmp_path / tool).write_text(f"#!/usr/bin/env bash\necho {tool}; printf ' %s\\n' \"$@\"\n")
        (tmp_path / tool).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    line = ["bash", tmp_path / "script/test.sh", *given]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    told, called = done.stdout.split("setup dev\n")
    assert "installing into" in told
    checks, arguments = called.split("python\n")[:2]
    assert "".join(checks.split()) == "ruffcheck.ruffformat--check.lint-importsmypy"
    quick, *rest = given if given[:1] == ["--quick"] else ["", *given]
    selection = ["-m", "not slow and not long"] if quick else []
    module, pytest_, n, _, *options = [argument.strip() for argument in arguments.splitlines()]
    assert [module, pytest_, n] == ["-m", "pytest", "-n"]
    assert options == ["--dist", "loadgroup", "--no-loadscope-reorder", "--durations=15", *selection, *rest]
