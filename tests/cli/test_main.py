"""The command `bandsplit`: its commands, the names of configs, and the hints that it prints."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bandsplit import commands
from bandsplit.cli import main
from bandsplit.config import loading
from bandsplit.errors import UserError
from tests.conftest import REPOSITORY, Done

Run = Callable[..., Done]


@pytest.fixture
def bandsplit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`python -m bandsplit`, in this process."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["bandsplit", *map(str, arguments)])
        code = 0
        try:
            runpy.run_module("bandsplit", run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        return Done(code, *capsys.readouterr())

    return call


@pytest.mark.parametrize(
    ("own", "told"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "")]
)
def test_threads_that_wait_sleep_soon_unless_the_user_says_otherwise(own: dict[str, str], told: str) -> None:
    """OpenMP reads its variables when torch is imported."""
    lines = "import os, sys; from bandsplit.cli import entry, train; assert 'torch' not in sys.modules; "
    lines += "entry.run(lambda: print(os.environ.get('GOMP_SPINCOUNT', '')))"
    env = {key: value for key, value in os.environ.items() if not key.startswith(("GOMP_", "OMP_"))}
    done = subprocess.run([sys.executable, "-c", lines], env={**env, **own}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{told}\n", "")


def test_both_doors_lead_to_the_same(bandsplit: Run, run_here: Run, tmp_path: Path) -> None:
    for arguments in (
        ("resnet34_sub16", "--set", "seed=7", "--print-run-dir"),
        ("--set", "optim.lrr=1", "--dry-run"),
        ("resnet34_sub61", "--dry-run"),
        ("--resume", "--run-dir", tmp_path / "none"),
    ):
        ours, script = bandsplit("train", *arguments), run_here("train.py", *arguments)
        assert ours == script
        assert ours.returncode == (0 if "--print-run-dir" in arguments else 2)
        assert len((ours.stdout + ours.stderr).splitlines()) == 1
    usage = bandsplit("train", "--world-size", "2").stderr
    assert usage.startswith("usage: bandsplit train ")
    assert "--world-size needs --dry-run" in usage
    for arguments in ((), ("trian",), ("config",)):
        assert bandsplit(*arguments).returncode == 2


@pytest.mark.parametrize(
    ("command", "told"),
    [
        *((f"train --dry-run --world-size {n}", f"'{n}' given, expected a positive integer") for n in ("0", "-2", "x")),
        *(
            (f"data prepare split --from a --to b --count 1 --seed {n}", f"'{n}' given, expected an integer from 0 to ")
            for n in ("-1", "x", str(2**31))
        ),
        *((f"data pack --to a --workers {n}", f"'{n}' given, expected a positive integer") for n in ("0", "x")),
        ("data pack --to a --quality 101", "'101' given, expected a number from 1 to 100"),
        ("find-lr --steps -1", "--steps: expected at least 10"),
        ("find-lr --from nan", "--from and --to: expected 0 < from < to, both finite"),
    ],
)
def test_numbers_that_an_option_does_not_take(bandsplit: Run, command: str, told: str) -> None:
    done = bandsplit(*command.split())
    assert done.returncode == 2
    assert told in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "command", [*main.COMMANDS, *(f"data {name}" for name in ("scan", "prepare", "pack", "verify"))]
)
def test_examples_of_the_help_are_understood(bandsplit: Run, command: str) -> None:
    """Every help has some, of that command, and every option in them is told by the help of what they call."""
    done = bandsplit(*command.split(), "--help")
    assert done.returncode == 0
    lines = done.stdout.partition("\nExamples:\n")[2].splitlines()
    examples = [re.fullmatch(r"  (?:torchrun .*-m )?bandsplit (.*?)(?: > \S+)?(?:   .*)?", line) for line in lines]
    assert examples
    for example in examples:
        assert example is not None, lines
        assert example[1].startswith(command)
        path, words = [], shlex.split(example[1])
        told = bandsplit("--help")
        while words and re.search(rf"^    {re.escape(words[0])}\b", told.stdout, re.MULTILINE):  # a command in it
            path.append(words.pop(0))
            told = bandsplit(*path, "--help")
        assert " ".join(path).startswith(command)
        for option in [word for word in words if word.startswith("--")]:
            assert option in told.stdout, example[1]


def test_a_shipped_config_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless there is a file of that name; a path is never taken for a name."""
    monkeypatch.chdir(tmp_path)
    by_path = loading.load(REPOSITORY / "config/train/resnet34_sub16.toml", data=REPOSITORY / "config/data/demo.toml")
    assert loading.load("resnet34_sub16", data="demo") == by_path
    for text, message in (
        ("train/resnet34_sub16", "train/resnet34_sub16: no such config file; did you mean resnet34_sub16"),
        ("alexnet_sub166", "alexnet_sub166: no such config file; did you mean alexnet_sub16"),
        ("resnet34_sub16.tml", "resnet34_sub16.tml: no such config file$"),
        ("q", "q: no such config file; `bandsplit config list` shows"),
    ):
        monkeypatch.setattr(sys, "argv", ["bandsplit"])
        with pytest.raises(UserError, match=message):
            loading.load(text)
    Path("resnet34_sub16").write_text(f'extends = "{REPOSITORY}/config/train/demo.toml"\nseed = 5\n')
    assert loading.load("resnet34_sub16").seed == 5


def test_hints_are_in_the_form_that_was_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    for started, command, launch in (
        ("/usr/bin/bandsplit", "bandsplit find-lr", "torchrun -m bandsplit find-lr"),
        (f"{REPOSITORY}/src/bandsplit/__main__.py", "python -m bandsplit find-lr", "torchrun -m bandsplit find-lr"),
        ("src/train.py", "python src/find_lr.py", "torchrun src/find_lr.py"),
        ("script/ablation.py", "bandsplit find-lr", "torchrun -m bandsplit find-lr"),
    ):
        monkeypatch.setattr(sys, "argv", [started])
        assert (commands.command("find-lr"), commands.launch("find-lr")) == (command, launch)


def test_any_name_can_be_printed() -> None:
    """Names that are not UTF-8, and terminals that are not either."""
    code = r"from bandsplit.cli import entry; entry.run(lambda: print('caf\udce9', 'ä'))"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "caf\\udce9 \\xe4\n", done.stderr


def test_output_that_nobody_reads_ends_without_a_traceback() -> None:
    command = [sys.executable, "-m", "bandsplit", "config", "--keys", "--markdown"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait() == 141
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_standard_output_may_be_closed() -> None:
    """Then Python has none, and prints nothing."""
    code = "from bandsplit.cli import entry; entry.run(lambda: print('done'))"
    done = subprocess.run(["bash", "-c", '"$0" -c "$1" >&-', sys.executable, code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_hint_can_be_followed(tmp_path: Path) -> None:
    """Neither the error nor the list needs torch."""
    code = "import runpy, sys; runpy.run_module('bandsplit', run_name='__main__', alter_sys=True)"
    watched = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); {code}"
    failed = subprocess.run([sys.executable, "-c", watched, "config", "show", "q"], capture_output=True, text=True)
    assert (failed.returncode, failed.stderr.splitlines()[-1]) == (2, "False")
    hint = re.search("`(.*)`", failed.stderr)
    assert hint is not None
    words = [sys.executable if word == "python" else word for word in shlex.split(hint[1])]
    listed = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert listed.returncode == 0
    names = {line.split()[0] for line in listed.stdout.splitlines() if line.startswith("  ")}
    assert names == {path.stem for folder in ("train", "data") for path in REPOSITORY.glob(f"config/{folder}/*.toml")}
