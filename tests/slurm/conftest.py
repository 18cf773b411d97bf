"""A private Slurm on 127.0.0.1: two nodes with fake devices for eight A100 and four A40 each."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PROGRAMS = ("sbatch", "scontrol", "scancel", "slurmctld", "slurmd", "munged", "mungekey")
NODES = ("127.0.0.1", "127.0.0.2")  # names that resolve everywhere

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1
GresTypes=gpu
ReturnToService=2
KillWait=20
NodeName={nodes[0]} NodeAddr=127.0.0.1 Port={ports[1]} {resources}
NodeName={nodes[1]} NodeAddr=127.0.0.1 Port={ports[2]} {resources}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""
RESOURCES = "CPUs=256 RealMemory=20000 Gres=gpu:a100:8,gpu:a40:4 State=UNKNOWN"


class Slurm:
    """Slurm commands, as a user types them in their own folder."""

    def __init__(self, conf: Path) -> None:
        here = Path(sys.executable).parent
        self._env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        self._env |= {"SLURM_CONF": str(conf), "PATH": f"{here}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        if self._env.pop("PYTHONDONTWRITEBYTECODE", None):  # compiling torch anew takes half of a job's time
            self._env["PYTHONPYCACHEPREFIX"] = str(conf.with_name("pycache"))

    def command(self, *words: object, cwd: Path = REPOSITORY, **env: str) -> str:
        done = subprocess.run(
            [*map(str, words)], cwd=cwd, env=self._env | env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def sbatch(self, *words: object, cwd: Path, **env: str) -> str:
        """Submits a job; returns its number."""
        return self.command("sbatch", "--parsable", *words, cwd=cwd, **env).strip()

    def show(self, job: str) -> dict[str, str]:
        """Output of ``scontrol show job``; for a whole array, of one task."""
        return dict(word.partition("=")[::2] for word in self.command("scontrol", "show", "job", job).split())

    def until(self, job: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """Waits until a job, or every task of an array, is in one of these states."""
        deadline = time.monotonic() + seconds
        while True:
            told = self.command("scontrol", "--oneliner", "show", "job", job)
            if all(any(f" JobState={state} " in line for state in states) for line in told.splitlines()):
                return self.show(job)
            assert time.monotonic() < deadline, told
            time.sleep(0.2)

    def wait_for_the_end_of_its_processes(self, job: str, seconds: float = 60) -> None:
        """A requeued job is pending while its previous run still ends; Slurm could take that for the end of the new."""

        def ending() -> bool:
            if any(f"slurmstepd: [{job}." in _command_line(path) for path in Path("/proc").glob("[0-9]*/cmdline")):
                return True
            return "COMPLETING" in self.command("scontrol", "show", "nodes")  # until the controller has heard of it

        deadline = time.monotonic() + seconds
        while ending():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1)  # the controller may hear of it later still

    def running_until(self, job: str, condition: Callable[[], object], seconds: float = 120) -> None:
        """Waits for a condition while a job runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            told = self.show(job)
            assert told["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), told
            assert time.monotonic() < deadline, told
            time.sleep(0.1)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (packages slurm-wlm and munge)")
    if os.geteuid() != 0:
        pytest.skip("not root, as which slurmd has to run")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # not pytest's folders: munge needs one that everyone can enter
    folder.chmod(0o755)
    daemons: list[subprocess.Popen[bytes]] = []
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(*words: str) -> None:
        with (folder / f"{words[0]}.out").open("ab") as output:
            daemons.append(subprocess.Popen(words, env=env, stdout=output, stderr=output, start_new_session=True))

    try:
        _configure(folder)
        munge = folder / "munge"
        files = {key: str(munge / key) for key in ("socket", "key-file", "log-file", "pid-file", "seed-file")}
        subprocess.run(["mungekey", "--create", "--keyfile", files["key-file"]], check=True)
        start("munged", "--foreground", *(f"--{key}={value}" for key, value in files.items()))
        _until(lambda: (munge / "socket").exists(), folder)
        start("slurmctld", "-D", "-i")
        for node in NODES:
            start("slurmd", "-D", "-N", node)
        slurm = Slurm(folder / "slurm.conf")
        _until(lambda: slurm.command("sinfo", "--noheader", "--format=%t %D").split() == ["idle", "2"], folder)
        yield slurm
    finally:
        _stop(daemons, folder)


def _configure(folder: Path) -> None:
    for name in ("munge", "state"):
        (folder / name).mkdir(mode=0o755)
    for name, count in (("a100", 8), ("a40", 4)):
        for i in range(count):
            os.mknod(folder / f"{name}_{i}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # another /dev/null
    (folder / "gres.conf").write_text(
        f"Name=gpu Type=a100 File={folder}/a100_[0-7]\nName=gpu Type=a40 File={folder}/a40_[0-3]\n"
    )
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for any_port in sockets:
            any_port.bind(("127.0.0.1", 0))
        ports = [any_port.getsockname()[1] for any_port in sockets]
    text = SLURM_CONF.format(folder=folder, host=socket.gethostname(), ports=ports, nodes=NODES, resources=RESOURCES)
    (folder / "slurm.conf").write_text(text)


def _until(condition: Callable[[], object], folder: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(AssertionError):  # a command before the daemon has started
            if condition():
                return
        if time.monotonic() > deadline:
            logs = "".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("*.out")))
            pytest.fail(f"Slurm does not start:\n{logs}")
        time.sleep(0.1)


def _stop(daemons: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Ends the daemons and every process that belongs to this Slurm, and removes its folder."""
    for daemon in reversed(daemons):
        daemon.terminate()
    for daemon in daemons:
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(5)
    ours = f"SLURM_CONF={folder}/slurm.conf".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if ours in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
    for daemon in daemons:
        daemon.kill()
        daemon.wait()
    shutil.rmtree(folder)


def _command_line(path: Path) -> str:
    try:
        return path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:  # it has ended meanwhile
        return ""
