"""The Slurm scripts, submitted to a real Slurm from a folder outside the clone."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from bandsplit.data import demo
from tests.compare import assert_same_run, metrics
from tests.conftest import DATA_TOML, REPOSITORY, TRAIN_TOML, run
from tests.slurm.conftest import Slurm

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]  # one Slurm for all

SCRIPTS = REPOSITORY / "script/slurm"
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 5))]
TWO_RANKS = {"NPROC_PER_NODE": "2"}


@pytest.fixture(scope="module")
def folder(image_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the jobs: a config long enough for a signal in the middle of it, and one with two branches.

    They read two bands each: the operator rounds differently if it computes fewer than half of all bands.
    """
    folder = tmp_path_factory.mktemp("submitted")
    (folder / "data.toml").write_text(DATA_TOML.format(root=image_root))
    pairs = "block = 2\nbranches = [[0, 3], [1, 2]]"
    (folder / "tiny.toml").write_text(TRAIN_TOML.replace("block = 2", pairs))
    (folder / "long.toml").write_text(TRAIN_TOML.replace("epochs = 2", "epochs = 5"))
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    done = run("train.py", folder / "long.toml", "--run-dir", folder / "undisturbed", ranks=2)
    assert done.returncode == 0, done.stderr
    return folder / "undisturbed"


def steps(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").glob("step_*")}


def last(run_dir: Path) -> Path:
    return (run_dir / "checkpoints/last").resolve()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_job_that_is_requeued_and_cancelled_equals_an_uninterrupted_one(
    slurm: Slurm, folder: Path, finished: Path, seed: int
) -> None:
    """At random moments."""
    chance, run_dir = random.Random(seed), folder / f"runs/disturbed{seed}"
    line = (SCRIPTS / "8xA100.sh", "long.toml", "--run-dir", run_dir.relative_to(folder))
    job = slurm.sbatch(*line, cwd=folder, **TWO_RANKS)
    log = run_dir / f"logs/slurm-{job}.out"
    assert slurm.show(job)["TresPerNode"] == "gres:gpu:a100:8"
    slurm.running_until(job, lambda: steps(run_dir))
    time.sleep(chance.random())
    slurm.command("scancel", "--batch", "--signal=USR1", job)
    told = slurm.until(job, "PENDING")
    assert told["Restarts"] == "1"
    assert "stopped by SIGUSR1 after step" in log.read_text()
    assert metrics(run_dir)[-1]["event"] != "end"
    stopped = last(run_dir)

    slurm.wait_for_the_end_of_its_processes(job)
    slurm.command("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm waits for two minutes otherwise
    slurm.running_until(job, lambda: last(run_dir) != stopped)
    time.sleep(chance.random())
    slurm.command("scancel", job)
    told = slurm.until(job, "CANCELLED")
    assert told["Restarts"] == "1"
    assert f"resuming after step {int(stopped.name.removeprefix('step_'))}" in log.read_text()
    stopped = last(run_dir)
    assert f"stopped by SIGTERM after step {int(stopped.name.removeprefix('step_'))};" in log.read_text()
    assert metrics(run_dir)[-1]["event"] != "end"

    again = slurm.sbatch(*line, cwd=folder, **TWO_RANKS)
    told = slurm.until(again, "COMPLETED", "FAILED")
    log = run_dir / f"logs/slurm-{again}.out"
    assert told["JobState"] == "COMPLETED", log.read_text()
    assert f"resuming after step {int(stopped.name.removeprefix('step_'))}" in log.read_text()
    assert_same_run(run_dir, finished)
    assert (folder / f"slurm-{again}.out").read_text() == f"job {again} writes to {log.relative_to(folder)}\n"


def test_a_config_of_the_repository_on_two_nodes(slurm: Slurm, folder: Path) -> None:
    """Reaches the training loop; on a signal, both nodes write the checkpoint before the job is requeued."""
    run_dir = folder / "runs/two_nodes"
    config = REPOSITORY / "config/train/resnet34_sub16.toml"
    sizes = (
        "model.width=0.125",
        "train.batch_size=8",
        "train.log_every=1",
        "data.image_size=64",
        "data.resize_size=64",
    )
    overrides = [word for size in sizes for word in ("--set", size)]
    arguments = (config, "--data", "data.toml", *overrides, "--run-dir", run_dir)
    job = slurm.sbatch("--nodes=2", SCRIPTS / "nodes_8xA100.sh", *arguments, cwd=folder, NPROC_PER_NODE="1")
    slurm.running_until(job, lambda: (run_dir / "metrics.jsonl").exists() and metrics(run_dir))
    slurm.command("scancel", "--batch", "--signal=USR1", job)
    slurm.until(job, "PENDING")
    slurm.command("scancel", job)
    line = metrics(run_dir)[0]
    assert (line["event"], len(line["branch_loss"])) == ("train", 16)
    assert json.loads((run_dir / "environment.json").read_text())[0]["world_size"] == 2
    log = (run_dir / f"logs/slurm-{job}.out").read_text()
    assert f"stopped by SIGUSR1 after step {int(last(run_dir).name.removeprefix('step_'))};" in log


def test_branches_of_an_array_join_into_the_ensemble(slurm: Slurm, folder: Path) -> None:
    job = slurm.sbatch("--array=0-1", SCRIPTS / "array_branches.sh", "tiny.toml", cwd=folder)
    together = folder / "together"
    done = run("train.py", folder / "tiny.toml", "--run-dir", together)
    assert done.returncode == 0, done.stderr
    told = slurm.until(job, "COMPLETED", "FAILED", seconds=240)
    runs = [folder / f"runs/tiny-seed0-branches{k}" for k in range(2)]
    logs = [(run_dir / f"logs/slurm-{job}_{k}.out").read_text() for k, run_dir in enumerate(runs)]
    assert told["JobState"] == "COMPLETED", logs
    done = run("evaluate.py", *runs, "--checkpoint", "last", "--output", folder / "joined.json")
    assert done.returncode == 0, done.stderr
    joined = json.loads((folder / "joined.json").read_text())
    whole = [line for line in metrics(together) if line["event"] == "validation"][-1]
    for key in ("top1", "top5", "branch_top1", "branch_top5"):
        assert joined[key] == pytest.approx(whole[key])

    report = slurm.sbatch(SCRIPTS / "report.sh", together, cwd=folder)
    told = slurm.until(report, "COMPLETED", "FAILED")
    assert told["JobState"] == "COMPLETED", (folder / f"slurm-{report}.out").read_text()
    assert list((together / "plots").glob("*.png"))


@pytest.fixture
def container(folder: Path) -> dict[str, str]:
    """Environment with a command prefix that replaces torchrun and records every command in a file."""
    path = folder / "container"
    path.write_text(CONTAINER.format(calls=folder / "calls"))
    path.chmod(0o755)
    (folder / "calls").write_text("")
    return {"CONTAINER": f"{path} image"}


CONTAINER = """#!/usr/bin/env bash
trap 'echo stopped; exit 0' USR1 TERM
echo "$@" >>{calls}
[[ $2 == torchrun ]] || exec "${{@:2}}"
[[ $* != *fails* ]] || exit 3
while true; do sleep 0.1; done
"""


def test_a_mistake_is_reported_and_a_failure_fails_the_job(
    slurm: Slurm, folder: Path, container: dict[str, str]
) -> None:
    line = (SCRIPTS / "4xA40.sh", "tiny.toml")
    failure = slurm.sbatch(*line, "--run-dir", "runs/fails", cwd=folder, **container)
    mistake = slurm.sbatch(*line, "--set", "optim.lrr=1", cwd=folder)
    for job, code in ((failure, "3:0"), (mistake, "2:0")):
        told = slurm.until(job, "COMPLETED", "FAILED")
        assert (told["JobState"], told["ExitCode"], told["TresPerNode"]) == ("FAILED", code, "gres:gpu:a40:4")
    asked, trained = (folder / "calls").read_text().splitlines()
    assert asked == f"image python {REPOSITORY}/src/train.py tiny.toml --run-dir runs/fails --print-run-dir"
    assert trained.startswith("image torchrun --standalone --nproc-per-node 4 --max-restarts 3 ")
    assert trained.endswith(f" {REPOSITORY}/src/train.py tiny.toml --run-dir runs/fails --resume")
    text = (folder / f"slurm-{mistake}.out").read_text()
    assert text.startswith("error: ")
    assert "did you mean optim.lr?" in text
    assert len(text.splitlines()) == 1


@pytest.mark.long
def test_stages_of_the_controls_follow_each_other(slurm: Slurm, tmp_path: Path) -> None:
    """A task of an array without learning rates fails, and says why."""
    demo.generate(tmp_path / "images", train_per_class=16, val_per_class=1)
    line = (SCRIPTS / "controls.sh", "--work", "work", "--arms", "rgb64", "--folds", "0", "--budgets", "0.2")
    for tasks, words in (
        ("1", ("--images", "images/train", "--only", "prepare")),
        ("1", ("--only", "time")),
        ("1-2", ("--only", "train")),
        ("1-2", ("--only", "rates")),
        ("1-2", ()),
        ("1", ("--only", "report")),
    ):
        job = slurm.sbatch(f"--array={tasks}", *line, *words, cwd=tmp_path)
        told = slurm.until(job, "COMPLETED", "FAILED", seconds=600)
        text = (tmp_path / f"slurm-{job}_1.out").read_text()
        if words == ("--only", "train"):
            assert (told["JobState"], told["ExitCode"]) == ("FAILED", "2:0")
            assert text.endswith("no learning rates yet: rgb128, rgb64; --only rates tries them, in all shards\n")
        else:
            assert told["JobState"] == "COMPLETED", text
    results = [path.name for path in (tmp_path / "work/results").iterdir()]
    assert (sum("foldlr" in name for name in results), sum("fold0" in name for name in results)) == (4, 2)
    assert "| rgb64 |" in (tmp_path / "work/report/controls.md").read_text()


def test_one_task_of_an_array_is_requeued_alone(slurm: Slurm, folder: Path, container: dict[str, str]) -> None:
    job = slurm.sbatch("--array=0-1", SCRIPTS / "array_branches.sh", "tiny.toml", cwd=folder, **container)
    slurm.running_until(job, lambda: (folder / "calls").read_text().count("torchrun --standalone") == 2)
    tasks = [slurm.show(f"{job}_{k}") for k in (0, 1)]
    asked = next(k for k in (0, 1) if tasks[k]["JobId"] == job)  # its number is that of the whole array as well
    slurm.command("scancel", "--batch", "--signal=USR1", f"{job}_{asked}")
    told = slurm.until(f"{job}_{asked}", "PENDING")
    assert told["Restarts"] == "1"
    other = slurm.show(f"{job}_{1 - asked}")
    assert (other["JobState"], other["Restarts"]) == ("RUNNING", "0")
    slurm.command("scancel", job)
    slurm.until(job, "CANCELLED")
    for k in (0, 1):
        assert "stopped" in (folder / f"runs/tiny-seed0-branches{k}/logs/slurm-{job}_{k}.out").read_text()


def test_a_preempted_job_is_queued_again(slurm: Slurm, folder: Path, container: dict[str, str]) -> None:
    """Although it ends within the grace time, in which Slurm itself would treat it as completed."""
    line = ("--nodelist=127.0.0.1", SCRIPTS / "8xA100.sh", "tiny.toml", "--run-dir")
    job = slurm.sbatch(*line, "runs/preempted", cwd=folder, **container)
    slurm.running_until(job, lambda: "torchrun --standalone" in (folder / "calls").read_text())
    urgent = slurm.sbatch("--partition=urgent", *line, "runs/urgent", cwd=folder, **container)
    told = slurm.until(job, "PENDING")
    assert told["Restarts"] == "1"
    assert "stopped" in (folder / f"runs/preempted/logs/slurm-{job}.out").read_text()
    slurm.command("scancel", job, urgent)
    slurm.until(urgent, "CANCELLED")
