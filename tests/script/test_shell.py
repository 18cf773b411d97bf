"""Shell scripts parse, and the Slurm scripts hold resources alone."""

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
    assert text.splitlines()[-1].startswith(("train ", "report "))
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
