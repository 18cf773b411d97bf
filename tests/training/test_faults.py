"""Cluster faults at random moments: nothing before the last checkpoint is lost, and the message helps.

Seed 0 of every case is part of the usual tests; `python -m pytest -m long` runs the others.
"""

from __future__ import annotations

import contextlib
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bandsplit.runs import checkpoint
from tests.compare import assert_same_run, metrics, wait_for
from tests.conftest import REPOSITORY, Done, Launch, command, run

pytestmark = pytest.mark.slow

LONGER = "train.epochs=3"  # 39 steps, a checkpoint every 3
SEEDS = [pytest.param(0), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 5))]


@pytest.fixture(params=SEEDS)
def chance(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.param)


class Victim:
    """A run of two ranks in which a fault is injected, and the uninterrupted run to compare it with."""

    def __init__(self, config: Path, run_dir: Path, undisturbed: Path, groups: int) -> None:
        self.run_dir, self._undisturbed = run_dir, undisturbed
        self._arguments = (config, "--run-dir", run_dir, "--resume", "--set", LONGER)
        self._arguments += ("--set", f"parallel.branch_groups={groups}")

    def start(self, *more: object) -> Launch:
        return Launch("train.py", *self._arguments, *more, ranks=2)

    def reach(self, launch: Launch, chance: random.Random) -> None:
        """Waits until a random moment between the first checkpoint and the last epoch."""
        wait_for(self.run_dir / f"checkpoints/step_{chance.choice(range(3, 28, 3)):08d}", launch)
        time.sleep(chance.random() * 0.15)

    def steps(self) -> list[int]:
        """Steps of the existing checkpoints."""
        return sorted(int(path.name[-8:]) for path in (self.run_dir / "checkpoints").glob("step_*"))

    def finish(self, at_least: int) -> Done:
        """Resumes from step `at_least` or later to the end; the result is bit-equal to the uninterrupted run."""
        done = self.start().wait()
        assert done.returncode == 0, done.stderr
        assert int(re.findall(r"resuming after step (\d+)", done.stderr)[0]) >= at_least
        assert_same_run(self.run_dir, self._undisturbed)
        return done


@pytest.fixture
def victim(config_file: Path, tmp_path: Path, finished: Callable[..., Path], chance: random.Random) -> Victim:
    groups = chance.choice([1, 2])
    return Victim(config_file, tmp_path / "run", finished(2, LONGER, f"parallel.branch_groups={groups}"), groups)


def test_all_ranks_are_killed(victim: Victim, chance: random.Random) -> None:
    launch = victim.start()
    victim.reach(launch, chance)
    launch.signal(signal.SIGKILL)
    launch.wait()
    victim.finish(at_least=max(victim.steps()))


def test_one_rank_is_killed(victim: Victim, chance: random.Random) -> None:
    launch = victim.start()
    victim.reach(launch, chance)
    launch.signal(signal.SIGKILL, chance.randrange(2))
    done = launch.wait(60)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, "a broken connection is not what went wrong"
    victim.finish(at_least=max(victim.steps()))


def test_all_ranks_are_killed_while_a_checkpoint_is_written(victim: Victim, chance: random.Random) -> None:
    launch = victim.start()
    before = 3 * chance.randrange(1, 9)
    wait_for(victim.run_dir / f"checkpoints/step_{before:08d}", launch)
    while not list(victim.run_dir.glob("checkpoints/.step_*")):
        assert launch.running
    launch.signal(signal.SIGKILL)
    launch.wait()
    victim.finish(at_least=before)


def test_sigterm_loses_nothing(victim: Victim, chance: random.Random) -> None:
    launch = victim.start()
    victim.reach(launch, chance)
    rank = chance.randrange(2)
    launch.signal(signal.SIGTERM, rank)  # one rank is enough to stop all
    done = launch.wait(60)
    assert done.returncode == 128 + signal.SIGTERM
    (stopped,) = re.findall(r"stopped by SIGTERM after step (\d+)", done.stderr)
    assert max(victim.steps()) == int(stopped)
    victim.finish(at_least=int(stopped))


def stopped_run(config: Path, run_dir: Path, number: int, *rank: int, ranks: int = 1) -> tuple[Launch, Done]:
    """Stops a run with a signal after its first checkpoint."""
    launch = Launch("train.py", config, "--run-dir", run_dir, "--set", LONGER, ranks=ranks)
    wait_for(run_dir / "checkpoints/step_00000003", launch)
    launch.signal(number, *rank)
    return launch, launch.wait(60)


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.long) for n in (signal.SIGHUP, signal.SIGUSR1))],
    ids=lambda number: number.name,
)
def test_other_signals_lose_nothing_either(config_file: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C, a terminal that is closed, the end of a Slurm job."""
    run_dir = tmp_path / "run"
    _, done = stopped_run(config_file, run_dir, number)
    assert done.returncode == 128 + number
    (stopped,) = re.findall(rf"stopped by {number.name} after step (\d+); the same command with --resume", done.stderr)
    good = checkpoint.latest(run_dir / "checkpoints")
    assert good is not None
    assert checkpoint.step_of(good) == int(stopped)
    assert "Traceback" not in done.stderr


def test_a_terminal_that_is_closed_loses_nothing(config_file: Path, tmp_path: Path) -> None:
    """The progress bar uses the terminal, and cannot be written any more when SIGHUP arrives."""
    run_dir = tmp_path / "run"
    line = [sys.executable, str(REPOSITORY / "src/train.py"), str(config_file), "--run-dir", str(run_dir)]
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [*line, "--set", LONGER])
    reader = threading.Thread(target=read_until_closed, args=(terminal, run_dir / "checkpoints/step_00000003"))
    reader.start()
    _, status = os.waitpid(child, 0)
    reader.join()
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    (stopped,) = re.findall(r"stopped by SIGHUP after step (\d+)", (run_dir / "logs/rank0.log").read_text())
    good = checkpoint.latest(run_dir / "checkpoints")
    assert good is not None
    assert checkpoint.step_of(good) == int(stopped)


def read_until_closed(terminal: int, path: Path) -> None:
    """Reads what a terminal shows until a file or folder is there, then closes it."""
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if select.select([terminal], [], [], 0.01)[0]:
                os.read(terminal, 4096)
    os.close(terminal)


def test_killed_before_the_first_checkpoint(config_file: Path, tmp_path: Path, finished: Callable[..., Path]) -> None:
    """With an incomplete last line of metrics.jsonl; the result equals the uninterrupted run, with each step once."""
    sets = ("train.log_every=1", "checkpoint.every_steps=1000")
    run_dir = tmp_path / "run"
    arguments = (config_file, "--run-dir", run_dir, *(part for key in sets for part in ("--set", key)))
    launch = Launch("train.py", *arguments)
    wait_for(run_dir / "metrics.jsonl", launch)
    while len((run_dir / "metrics.jsonl").read_text().splitlines()) < 3:
        assert launch.running
    launch.signal(signal.SIGKILL)
    launch.wait()
    assert not checkpoint.saved(run_dir / "checkpoints")
    path = run_dir / "metrics.jsonl"
    half = path.read_text()[:-60]
    path.write_text(half)
    done = run("train.py", *arguments, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_run(run_dir, finished(1, *sets))
    assert (run_dir / "metrics_set_aside.jsonl").read_text() == half + "\n"


@pytest.mark.parametrize("links", ["as folders", pytest.param("not at all", marks=pytest.mark.long)])
def test_a_copy_without_links_resumes(
    config_file: Path, tmp_path: Path, finished: Callable[..., Path], links: str
) -> None:
    run_dir, copy = tmp_path / "run", tmp_path / "copy"
    stopped_run(config_file, run_dir, signal.SIGTERM)
    shutil.copytree(run_dir, copy)
    if links == "not at all":
        for path in (copy / "checkpoints/last", copy / "checkpoints/best"):
            shutil.rmtree(path, ignore_errors=True)
    done = run("train.py", config_file, "--run-dir", copy, "--set", LONGER, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stderr
    assert_same_run(copy, finished(1, LONGER))


def test_a_disk_that_cannot_be_read_costs_no_checkpoint(
    config_file: Path, tmp_path: Path, finished: Callable[..., Path]
) -> None:
    """A circular link simulates the stale file handle of a network disk."""
    run_dir = tmp_path / "run"
    stopped_run(config_file, run_dir, signal.SIGTERM)
    newest = checkpoint.saved(run_dir / "checkpoints")[-1]
    good, file = newest / "kept.pt", newest / "branch_02.pt"
    file.rename(good)
    file.symlink_to(file)
    arguments = (config_file, "--run-dir", run_dir, "--set", LONGER, "--resume")

    def times() -> dict[Path, int]:
        """Modification time of each file except the lock."""
        return {path: path.lstat().st_mtime_ns for path in run_dir.rglob("*") if not path.name.startswith(".lock")}

    before = times()
    done = run("train.py", *arguments)
    assert done.returncode == 2
    assert f"error: {file}: cannot be read: Too many levels of symbolic links. Nothing was changed" in done.stderr
    assert times() == before
    file.unlink()
    good.rename(file)
    done = run("train.py", *arguments)
    assert f"resuming after step {checkpoint.step_of(newest)} " in done.stderr
    assert_same_run(run_dir, finished(1, LONGER))


def test_the_last_checkpoint_is_damaged(victim: Victim, chance: random.Random) -> None:
    launch = victim.start()
    victim.reach(launch, chance)
    launch.signal(signal.SIGUSR1)
    launch.wait(60)
    before, last = victim.steps()[-2:]
    damaged = chance.choice(sorted((victim.run_dir / f"checkpoints/step_{last:08d}").glob("*.pt")))
    damaged.write_bytes(damaged.read_bytes()[: chance.randrange(damaged.stat().st_size)])
    kept = damaged.read_bytes()
    done = victim.finish(at_least=before)
    assert f"step_{last:08d} is damaged ({damaged.name}: " in done.stderr
    assert f"resuming after step {before} " in done.stderr
    aside = victim.run_dir / f"checkpoints/set_aside/step_{last:08d}"
    assert f"step_{last:08d} is not used; it is kept as {aside}" in done.stderr
    assert (aside / damaged.name).read_bytes() == kept


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_the_disk_is_full(victim: Victim, chance: random.Random, small_disk: Path) -> None:
    victim.run_dir.symlink_to(small_disk / "run")
    (small_disk / "run").mkdir()
    launch = victim.start()
    victim.reach(launch, chance)
    filler = small_disk / "filler"
    deadline = time.monotonic() + 60
    with filler.open("wb", buffering=0) as file:
        while launch.running and time.monotonic() < deadline:  # old checkpoints that are removed leave room again
            with contextlib.suppress(OSError):
                file.write(b"0" * 4096)
    done = launch.wait(60)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "cannot be written: [Errno 28] No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    good = checkpoint.latest(victim.run_dir / "checkpoints")
    assert good is not None
    filler.unlink()
    victim.finish(at_least=int(good.name[-8:]))


def test_the_run_directory_goes_away(victim: Victim, chance: random.Random) -> None:
    """As if its mount were lost."""
    launch = victim.start()
    victim.reach(launch, chance)
    victim.run_dir.rename(victim.run_dir.with_name("elsewhere"))
    done = launch.wait(60)
    assert done.returncode == 2
    assert re.search(r"error: .*cannot be written: .*(No such file or directory|is missing)", done.stderr)
    shutil.rmtree(victim.run_dir, ignore_errors=True)
    victim.run_dir.with_name("elsewhere").rename(victim.run_dir)
    victim.finish(at_least=3)


def test_the_images_go_away(victim: Victim, chance: random.Random, image_root: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(image_root, tmp_path / "copy"))
    data = tmp_path / "data.toml"
    data.write_text(data.read_text().replace(str(image_root), str(root)))
    launch = victim.start()
    victim.reach(launch, chance)
    root.rename(tmp_path / "away")
    done = launch.wait(60)
    assert done.returncode == 2
    assert f"{root}" in done.stderr
    assert "cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
    (tmp_path / "away").rename(root)
    # the config contains the path of the images, so compare everything except that
    again = victim.start().wait()
    assert again.returncode == 0, again.stderr
    assert_same_run(victim.run_dir, victim._undisturbed)


def test_a_rank_that_hangs_is_named(config_file: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    sets = ("--set", LONGER, "--set", "parallel.timeout_seconds=5")
    launch = Launch("train.py", config_file, "--run-dir", run_dir, *sets, ranks=4)
    wait_for(run_dir / "checkpoints/step_00000006", launch)
    launch.signal(signal.SIGSTOP, 2)
    try:
        for rank in (0, 1, 3):
            launch.ranks[rank].join(60)
            assert launch.ranks[rank].exitcode in (1, 2)
    finally:
        launch.signal(signal.SIGKILL, 2)
    done = launch.wait()
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "error: rank 2 has exited or hangs" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_error_of_one_rank_is_reported(config_file: Path, image_root: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(image_root, tmp_path / "copy"))
    (tmp_path / "data.toml").write_text((tmp_path / "data.toml").read_text().replace(str(image_root), str(root)))
    bad = sorted((root / "train").rglob("*.jpg"))[40]
    bad.write_bytes(bad.read_bytes()[:400])
    sets = ("--set", "data.check=off", "--set", "data.on_bad=error")
    done = run("train.py", config_file, "--run-dir", tmp_path / "run", *sets, ranks=3)
    assert done.returncode in (1, 2)
    assert done.stderr.count("error: ") == 1, done.stderr
    assert f"error: {bad}: this image cannot be read or decoded" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_runs_do_not_share_a_directory(config_file: Path, tmp_path: Path) -> None:
    arguments = (config_file, "--run-dir", tmp_path / "run", "--resume", "--set", "train.epochs=40")
    first = Launch("train.py", *arguments)
    wait_for(tmp_path / "run/checkpoints/step_00000003", first)
    second = run("train.py", *arguments)
    assert second.returncode == 2
    assert f"{tmp_path / 'run'} is in use by process {first.ranks[0].pid} on " in second.stderr
    first.signal(signal.SIGTERM)
    assert first.wait().returncode == 128 + signal.SIGTERM


def test_a_run_resumes_on_fewer_ranks(config_file: Path, tmp_path: Path, finished: Callable[..., Path]) -> None:
    """Four ranks, then two, then one: the same images in the same steps, so the same losses up to rounding."""
    keys = ("train.batch_size=16", "model.bn_batch_size=4", "model.stem=small", "optim.lr=0.01")
    undisturbed, run_dir = finished(4, *keys), tmp_path / "run"
    sets = [argument for key in keys for argument in ("--set", key)]
    for ranks in (4, 2, 1):
        launch = Launch("train.py", config_file, "--run-dir", run_dir, "--resume", *sets, ranks=ranks)
        if ranks > 1:
            wait_for(run_dir / f"checkpoints/step_{ {4: 6, 2: 12}[ranks]:08d}", launch)
            launch.signal(signal.SIGTERM, 0)
        done = launch.wait()
    assert done.returncode == 0, done.stderr
    assert "written by 2 ranks with 2 branch groups; resuming on 1 with 1" in done.stderr
    for line, wanted in zip(metrics(run_dir), metrics(undisturbed), strict=True):
        assert (line["event"], line["step"], line["images"]) == (wanted["event"], wanted["step"], wanted["images"])
        if line["event"] == "train":
            assert line["branch_loss"] == pytest.approx(wanted["branch_loss"], rel=1e-3)


def test_minutes_make_checkpoints_too(config_file: Path, tmp_path: Path) -> None:
    """Every 6 ms here, without checkpoint.every_steps."""
    text = config_file.read_text().replace("every_steps = 3", "every_minutes = 0.0001")
    config_file.write_text(text)
    done = run("train.py", config_file, "--run-dir", tmp_path / "run", ranks=2)
    assert done.returncode == 0, done.stderr
    steps = [int(step) for step in re.findall(r"checkpoint of step (\d+)", done.stderr)]
    assert len(steps) > 4
    assert any(step % 13 for step in steps)


@pytest.fixture
def torchrun() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts torchrun itself, and kills the processes that a failed test leaves behind."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object, ranks: int, options: tuple[str, ...]) -> subprocess.Popen[str]:
        line = command("train.py", *arguments, ranks=ranks, torchrun=options)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


def test_a_restart_by_torchrun_resumes(config_file: Path, tmp_path: Path, finished: Callable[..., Path]) -> None:
    """From the last checkpoint, without --resume: torchrun says that it is a restart."""
    run_dir = tmp_path / "run"
    launch = Launch("train.py", config_file, "--run-dir", run_dir, ranks=2)
    wait_for(run_dir / "checkpoints/step_00000006", launch)
    launch.signal(signal.SIGKILL)
    launch.wait()
    again = run("train.py", config_file, "--run-dir", run_dir, ranks=2, env={"TORCHELASTIC_RESTART_COUNT": "1"})
    assert again.returncode == 0, again.stderr
    assert re.search(r"resuming after step ([6-9]|1\d)", again.stderr)
    assert_same_run(run_dir, finished(2))


@pytest.mark.long
def test_a_restart_of_a_launch_that_was_refused_is_refused_too(
    config_file: Path, finished: Callable[..., Path], torchrun: Callable[..., subprocess.Popen[str]]
) -> None:
    """The folder holds a run of another launch, that may be longer: two attempts, and nothing is written."""
    run_dir = finished(1)
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    longer = ("--set", "train.epochs=3")
    options = ("--nnodes=1", "--master-port=0", "--max-restarts=1")  # whose run id is "none"
    process = torchrun(config_file, "--run-dir", run_dir, *longer, ranks=1, options=options)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert output.count("already holds a run; --resume continues it") == 2, output
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


@pytest.mark.long
def test_torchrun_starts_again_after_a_rank_was_killed(
    config_file: Path, tmp_path: Path, finished: Callable[..., Path], torchrun: Callable[..., subprocess.Popen[str]]
) -> None:
    run_dir = tmp_path / "run"
    process = torchrun(config_file, "--run-dir", run_dir, ranks=2, options=("--standalone", "--max-restarts=1"))
    deadline = time.monotonic() + 180
    while not (run_dir / "checkpoints/step_00000006").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert re.search(r"resuming after step ([6-9]|1\d)", output)
    assert_same_run(run_dir, finished(2))


@pytest.mark.long  # tests/slurm trains on two nodes too
def test_two_nodes_are_one_training(
    config_file: Path, tmp_path: Path, finished: Callable[..., Path], torchrun: Callable[..., subprocess.Popen[str]]
) -> None:
    """Two torchrun agents with one rank each, with the Slurm script's rendezvous: equal to two ranks on one node."""
    options = ("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:29613", "--rdzv-id=test")
    nodes = [torchrun(config_file, "--run-dir", tmp_path / "run", ranks=1, options=options) for _ in range(2)]
    for node in nodes:
        output, _ = node.communicate(timeout=240)
        assert node.returncode == 0, output
    assert_same_run(tmp_path / "run", finished(2))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run(config_file: Path, tmp_path: Path, groups: int) -> None:
    sets = [
        f"parallel.branch_groups={groups}",
        "optim.lr=1e30",
        "checkpoint.every_steps=1",
        "schedule.warmup_epochs=0.5",
    ]
    arguments = [argument for key in sets for argument in ("--set", key)]
    done = run("train.py", config_file, "--run-dir", tmp_path / "run", *arguments, ranks=2)
    assert done.returncode == 2
    (told,) = re.findall(
        r"error: branch (\d): the loss of step (\d+) is not finite \(learning rate (.*?)\)", done.stderr
    )
    assert "Traceback" not in done.stderr
    good = checkpoint.latest(tmp_path / "run/checkpoints")
    if good is not None:
        assert int(good.name[-8:]) < int(told[1])
        for path in good.glob("branch_*.pt"):
            assert all(w.isfinite().all() for w in checkpoint.read(good, path.name)["network"].values())


def test_weights_that_overflow_in_the_last_step_end_the_run_with_an_error(config_file: Path, tmp_path: Path) -> None:
    """Loss and gradients of that step are finite; only the updated weights are not."""
    keys = ["optim.type=rmsprop", "optim.momentum=0", "optim.lr=3e38", "train.batch_size=160", "train.epochs=1"]
    keys += ["schedule.warmup_epochs=0", "checkpoint.every_steps=1000", "train.grad_accum_steps=10"]
    arguments = [part for key in keys for part in ("--set", key)]
    run_dir = tmp_path / "run"
    done = run("train.py", config_file, "--run-dir", run_dir, *arguments, ranks=2)
    assert done.returncode == 2, done.stderr
    assert "done after" not in done.stderr
    assert done.stderr.count("error: ") == 1
    assert re.search(r"branch \d: the state .* after step 1 is not finite", done.stderr)
    assert not list((run_dir / "checkpoints").iterdir())
    assert not (run_dir / "metrics.jsonl").exists()
