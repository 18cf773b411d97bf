"""Shell scripts parse, and the Slurm scripts hold resources alone."""

from __future__ import annotations

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
