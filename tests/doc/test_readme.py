"""README and doc/: every command is run or covered by a test, and the tree in the README matches the folders."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tomli

from bandsplit.config import loading
from bandsplit.data import demo
from tests.conftest import REPOSITORY, Done, run

README = REPOSITORY / "README.md"
PAGES = sorted((REPOSITORY / "doc").glob("*.md"))

# Commands -------------------------------------------------------------------------------------------------------------


def commands(page: Path) -> list[str]:
    """The commands of a page's bash blocks, without comments, one line each."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.join(words) for words in (shlex.split(line, comments=True) for line in lines) if words]


def as_it_is(command: str) -> str:
    return command


def in_two_epochs(command: str) -> str:
    """The demo has 14, and is trained to its end once."""
    return f"{command} --set train.epochs=2"


def offline_in_two_epochs(command: str) -> str:
    """Without an account of Weights & Biases."""
    return f"WANDB_MODE=offline {in_two_epochs(command)}"


def in_ten_steps(command: str) -> str:
    """The curves of all learning rates: tests/training/test_lr_finder.py."""
    return f"{command} --steps 10"


def as_a_dry_run(command: str) -> str:
    """For commands that need eight GPUs and ImageNet: a dry run with the demo's images."""
    line = command.replace("torchrun --nproc-per-node 8", "python")
    return f"{line} --data config/data/demo.toml --dry-run --world-size 8"


def on_the_demo(command: str) -> str:
    """For commands that need eight GPUs and an ImageNet run: one process and the demo's run instead."""
    return command.replace("--nproc-per-node 8 ", "").replace("resnet34_sub16-seed0", "demo-seed0")


def its_help(command: str) -> str:
    """For benchmarks, which take minutes."""
    return f"{command} --help"


def from_another_run(command: str) -> str:
    """That of the README is not there; evaluation.md has trained this one."""
    return in_two_epochs(command.replace("demo-seed0", "demo-holdout"))


def with_few_images(command: str) -> str:
    """So few held-out images can vouch for 10 points only."""
    return re.sub(r"--cascade \S+", "--cascade 10", command)


def with_one_worker(command: str) -> str:
    """Several: tests/data/test_store.py."""
    return f"{command} --workers 1"


def with_this_python(command: str) -> str:
    """The console script, which an installation makes: tests/cli/test_wheel.py."""
    return f"python -m {command}"


def no_more(command: str) -> None:
    """Not run here: another test runs it, or it is checked below."""


Rule = Callable[[str], str | None]
RULES: dict[str, Rule] = {
    r"bash script/demo\.sh": in_two_epochs,
    r"bash script/test\.sh( --quick)?": no_more,  # which runs this test
    r"source \.venv/bin/activate": no_more,
    r"export IMAGENET=\S+": no_more,
    r"torchrun( --nproc-per-node 2)? src/train\.py": as_it_is,
    r"torchrun( --nproc-per-node 2)? src/train\.py( --set split\.\w+=\w+)? --run-dir runs/demo-\w+": in_two_epochs,
    r"torchrun src/train\.py --branches [\d,]+ --run-dir runs/demo-\w+": in_two_epochs,
    r"torchrun src/train\.py --resume --run-dir runs/demo-seed0": as_it_is,
    r"torchrun src/evaluate\.py( runs/demo-\w+)+": as_it_is,
    r"torchrun src/train\.py --set data\.holdout=\S+ --run-dir runs/demo-\w+": in_two_epochs,
    r"torchrun src/evaluate\.py runs/demo-\w+ --(save|fit-fusion|fusion)(?!.*--cascade).*": as_it_is,
    r"torchrun src/evaluate\.py runs/demo-\w+ --fit-fusion --cascade \S+": with_few_images,
    r"python src/report\.py( --compare)?( runs/demo-\w+)+ --output runs/\w+": as_it_is,
    r"python src/report\.py runs/demo-\w+/predictions\.npz": as_it_is,
    r"python src/find_lr\.py": in_ten_steps,
    r"torchrun src/train\.py --set (log\.trackers|train\.profile)=\S+ --run-dir runs/demo-\w+": offline_in_two_epochs,
    r"python src/report\.py runs/demo-\w+ --watch": as_it_is,
    r"python src/train\.py config/train/\w+\.toml .*--dry-run.*": as_it_is,
    r"torchrun --nproc-per-node 8 src/train\.py config/train/\w+\.toml": as_a_dry_run,
    r"torchrun --nproc-per-node 8 src/train\.py --resume --run-dir runs/\w+-seed0": on_the_demo,
    r"torchrun --nproc-per-node 8 src/evaluate\.py runs/\w+-seed0": on_the_demo,
    r"bandsplit train \w+ --dry-run --world-size 8": no_more,  # tests/cli/test_wheel.py
    r"bandsplit train \w+ --set data\.root=data/demo .*--dry-run": with_this_python,
    r"bandsplit (train --help|(config|predict|export|track) .*)": with_this_python,
    r"bandsplit app .*": no_more,  # tests/app/test_page.py
    r"python src/data\.py scan .*": as_it_is,
    r"python src/data\.py pack --to data/demo_bands": with_one_worker,
    r"python src/data\.py verify data/demo_bands": as_it_is,
    r"python src/data\.py pack config/.*": no_more,  # tests/data/test_store.py, test_store_images.py
    r"torchrun src/train\.py --set model\.init_from=.* --run-dir runs/demo-\w+": from_another_run,
    r"torchrun src/train\.py --resume --run-dir runs/demo-\w+ --set train\.epochs=\d+": no_more,  # test_loop.py
    r"torchrun src/train\.py --set data\.kind=bands .* --run-dir runs/demo-bands": in_two_epochs,
    r"sbatch .*": no_more,  # tests/slurm
    r"python src/data\.py prepare .*": no_more,  # tests/data/test_prepare.py
    r"python script/independent\.py .*": as_it_is,
    r"python script/ablation\.py .*": no_more,  # tests/script/test_ablation.py
    r"python bench/\w+\.py": its_help,
    r"python bench/controls\.py .*": no_more,  # tests/script/test_controls.py
}


def rule_of(command: str) -> Rule:
    rules = [rule for pattern, rule in RULES.items() if re.fullmatch(pattern, command)]
    assert len(rules) == 1, f"{command}: {len(rules)} rules; RULES says for each command how it is tested"
    return rules[0]


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_every_command_has_a_rule_and_its_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(re.findall(r"^```\w+\n", text, re.MULTILINE)), "every block names its language"
    for command in commands(page):
        rule_of(command)
        for word in shlex.split(command):
            if word.startswith(("src/", "script/", "config/", "bench/")):
                assert (REPOSITORY / word).is_file(), command


def test_the_virtual_environment_is_where_setup_makes_it() -> None:
    assert "source .venv/bin/activate" in commands(README)
    assert "VENV=${VENV:-.venv}" in (REPOSITORY / "script/setup.sh").read_text()


@pytest.mark.parametrize(
    "command", sorted({line for page in (README, *PAGES) for line in commands(page) if line.startswith("sbatch")})
)
def test_slurm_scripts_of_the_pages_are_submitted_by_the_tests_of_slurm(command: str) -> None:
    options, script, given = command.removeprefix("sbatch ").partition("script/slurm/")
    name, *arguments = (script + given).split()
    assert name.removeprefix("script/slurm/") in (REPOSITORY / "tests/slurm/test_slurm.py").read_text()
    for config in (loading.load(REPOSITORY / word) for word in arguments if word.endswith(".toml")):
        if array := re.search(r"--array=0-(\d+)", options):
            assert int(array[1]) + 1 == len(config.split.groups), command


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The repository after set-up, with few demo images: 14 epochs of four steps."""
    for name in ("src", "config", "bench"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "script").mkdir()
    for path in (REPOSITORY / "script").glob("*.*"):
        (tmp_path / "script" / path.name).symlink_to(path)
    (tmp_path / "script/demo.sh").unlink()
    (tmp_path / "script/demo.sh").write_text((REPOSITORY / "script/demo.sh").read_text())
    (tmp_path / "script/setup.sh").unlink()
    (tmp_path / "script/setup.sh").write_text("# the packages are there\n")
    demo.generate(tmp_path / "data/demo", seed=0, train_per_class=26, val_per_class=5)
    return tmp_path


def lines_to_run(pages: list[Path], but: list[Path]) -> Iterator[str]:
    """The commands to run of `pages`, each once, without those of `but`."""
    told = {rule_of(command)(command) for page in but for command in commands(page)}
    for page in pages:
        for command in commands(page):
            line = rule_of(command)(command)
            if line is not None and line not in told:
                told.add(line)
                yield line


LAUNCHER = r"(?:torchrun(?: --nproc-per-node (\d))?|python)"


@pytest.mark.slow
@pytest.mark.xdist_group("pages")  # starts early: it takes long
@pytest.mark.parametrize(("pages", "but"), [([README], []), (PAGES, [README])], ids=["README.md", "doc"])
def test_the_commands_run(clone: Path, pages: list[Path], but: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom. In the README, the first use of each program is run as a reader would, others are forked."""
    monkeypatch.chdir(clone)
    (clone / "cli.py").write_text("from bandsplit.cli import main\n\nmain.run()\n")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    source = {"PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1", "PATH": path}
    used = {"torchrun src/train.py", "python src/report.py"}  # by script/demo.sh
    used |= {"torchrun src/evaluate.py", "python src/train.py"}  # the one as src/train.py, the other in test_wheel.py
    for line in lines_to_run(pages, but):
        if pages != [README] and "-m bandsplit" in line:
            line = line.replace("demo-seed0", "demo-holdout")  # as in `from_another_run`
        entry = re.fullmatch(rf"(?:(\w+)=(\w+) )?({LAUNCHER} (?:-m bandsplit|\S+\.py)) ?([^|&;<>$]*)", line)
        done: Done | subprocess.CompletedProcess[str]
        if entry and (entry[3] in used or pages != [README]):
            env = {entry[1]: entry[2]} if entry[1] else None
            script = entry[3].split()[-1].replace("bandsplit", "cli.py")
            done = run(str(clone / script), *shlex.split(entry[5]), ranks=int(entry[4] or 1), env=env)
        else:
            shell = ["bash", "-euo", "pipefail", "-c", line]
            done = subprocess.run(shell, env=os.environ | source, capture_output=True, text=True)
            if entry:
                used.add(entry[3])
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


# The tree -------------------------------------------------------------------------------------------------------------


def drawn_tree() -> dict[str, list[str]]:
    """Files of each folder of src/bandsplit, as in the tree of the README."""
    (block,) = re.findall(r"^```text\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    tree: dict[str, list[str]] = {}
    files: list[str] = []
    for line in block.splitlines():
        if line.startswith(" "):
            files += line.split()
        else:
            files = tree.setdefault(line.split()[0].removesuffix("/"), [])
    return tree


def test_the_drawn_tree_is_the_tree() -> None:
    source = REPOSITORY / "src/bandsplit"
    listed = subprocess.run(["git", "ls-files", "."], cwd=source, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git repository")
    tree: dict[str, list[str]] = {}
    for name in listed.stdout.splitlines():
        path = source / name
        if path.exists() and not (path.name == "__init__.py" and path.stat().st_size == 0):
            tree.setdefault(str(Path(name).parent), []).append(path.name)
    assert {folder: sorted(files) for folder, files in drawn_tree().items()} == {
        folder: sorted(files) for folder, files in tree.items()
    }


def test_rooms_are_drawn_in_the_order_of_their_imports() -> None:
    contracts = tomli.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = contracts["contracts"][0]["layers"]
    level = {room.strip(): number for number, layer in enumerate(layers) for room in layer.split("|")}
    rooms = [folder for folder in drawn_tree() if folder in level]
    assert set(rooms) == {room for room in level if (REPOSITORY / "src/bandsplit" / room).is_dir()}
    assert [level[room] for room in rooms] == sorted(level[room] for room in rooms)
