"""Shell scripts parse, and the Slurm scripts hold resources and launch alone."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SCRIPTS = sorted((REPOSITORY / "script").rglob("*.sh"))
SLURM = sorted((REPOSITORY / "script/slurm").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_and_shellcheck_accept_it(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", script], check=True, cwd=REPOSITORY)


@pytest.mark.parametrize("script", SLURM, ids=lambda path: path.name)
def test_slurm_scripts_pass_all_arguments_on_and_set_no_key(script: Path) -> None:
    text = script.read_text()
    assert re.search(r'src/train.py( --branches "\$SLURM_ARRAY_TASK_ID")? "\$@"$', text.rstrip())
    assert "--set" not in text.replace("[arguments of src/train.py …]", "")
    assert len(text.splitlines()) <= 20
