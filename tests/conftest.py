"""Shared fixtures and helpers: a small JPEG data set, a config that trains on it in seconds, and entry points."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from bandsplit.data import demo, folders
from bandsplit.data.images import ImageFiles, Paths

REPOSITORY = Path(__file__).resolve().parent.parent
TRAIN_PER_CLASS, VAL_PER_CLASS = 16, 5  # 160 and 50 images: not multiples of the batch sizes below

TRAIN_TOML = """
data = "data.toml"
[model]
arch = "resnet18"
width = 0.125
[split]
block = 2
[optim]
lr = 0.05
[schedule]
warmup_epochs = 0.5
[train]
epochs = 2
batch_size = 12
log_every = 4
[checkpoint]
every_steps = 3
"""

DATA_TOML = """
root = "{root}"
classes = 10
image_size = 32
resize_size = 40
threads = 1
"""


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs from all tests but those of `-m gpu`, which alone expect the numbers and ranks of a GPU."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In parallel runs, groups (Slurm, compilation) and slow tests start first, so that no worker finishes late."""
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("xdist_group", "slow")])


class Shared:
    """A folder of this test session, shared by all workers of pytest-xdist."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def once(self, name: str, make: Callable[[Path], None]) -> Path:
        """Path of what `make` creates; the first caller with this name creates it, others wait."""
        path, made = self._folder / name, self._folder / f"{name}.made"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._folder / f"{name}.lock"):
            if not made.exists():
                make(path)
                made.touch()
        return path


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    own = tmp_path_factory.getbasetemp()
    return Shared((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared")


@pytest.fixture(scope="session")
def image_root(shared: Shared) -> Path:
    """Root of a data set with train/ and val/; tests must not change it."""

    def make(root: Path) -> None:
        demo.generate(root, seed=1, train_per_class=TRAIN_PER_CLASS, val_per_class=VAL_PER_CLASS)

    return shared.once("images/demo", make)


def image_files(folder: Path) -> ImageFiles:
    """The images in class folders, unexamined."""
    found = folders.walk(folder)
    return ImageFiles(Paths(found.folder, found.names), found.labels, found.classes)


@pytest.fixture
def config_file(tmp_path: Path, image_root: Path) -> Path:
    """A train config next to its data config; tests may change both."""
    (tmp_path / "data.toml").write_text(DATA_TOML.format(root=image_root))
    path = tmp_path / "tiny.toml"
    path.write_text(TRAIN_TOML)
    return path


def command(script: str, *arguments: object, ranks: int, torchrun: tuple[str, ...] = ("--standalone",)) -> list[str]:
    """``torchrun --nproc-per-node <ranks> src/<script>``."""
    launcher = [sys.executable, "-m", "torch.distributed.run", *torchrun, "--nproc-per-node", str(ranks)]
    return [*launcher, str(REPOSITORY / "src" / script), *map(str, arguments)]


@dataclass(frozen=True)
class Done:
    """Result of an entry point; with several ranks, the largest exit code of a failure."""

    returncode: int
    stdout: str
    stderr: str


_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    [
        "tests.conftest",
        "bandsplit.training.loop",
        "bandsplit.training.dry_run",
        "bandsplit.evaluation.runs",
        "bandsplit.reporting.report",
        "scipy.stats",
    ]
)


class Launch:
    """An entry point on one or several ranks, as torchrun would start it.

    Each rank is forked from a process that has already imported everything, which saves seconds.
    """

    def __init__(self, script: str, *arguments: object, ranks: int = 1, env: dict[str, str] | None = None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="launch"))
        argv = [str(REPOSITORY / "src" / script), *map(str, arguments)]
        self.ranks = _start(ranks, env or {}, _script, argv, self._folder)

    @property
    def running(self) -> bool:
        return any(process.is_alive() for process in self.ranks)

    def signal(self, number: int, *ranks: int) -> None:
        """Sends a signal to these ranks, or to all."""
        for rank in ranks or range(len(self.ranks)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.ranks[rank].pid or 0, number)

    def wait(self, seconds: float = 300) -> Done:
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        late = self.running
        if late:
            self.signal(signal.SIGKILL)
        out, err = (
            "".join(path.read_text() for path in sorted(self._folder.glob(f"*.{end}"))) for end in ("out", "err")
        )
        assert not late, f"still running after {seconds} s: {err}"
        shutil.rmtree(self._folder)
        codes = [process.exitcode or 0 for process in self.ranks]
        return Done(max((code for code in codes if code), default=0), out, err)


def _start(count: int, env: dict[str, str], function: Callable[..., None], *args: object) -> list[Any]:
    """Processes that call ``function(rank, *args)``, with the environment variables that torchrun sets."""
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    processes = []
    for rank in range(count):
        place = {key: str(value) for key, value in {**common, "RANK": rank, "LOCAL_RANK": rank, **env}.items()}
        processes.append(_forks.Process(target=_rank, args=(place, function, rank, *args)))
        processes[-1].start()
    return processes


def _rank(env: dict[str, str], function: Callable[..., None], *args: object) -> None:
    import torch

    os.environ.update(env)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it is ignored if the tests run under nohup
    torch.set_num_threads(1)
    function(*args)


def _script(rank: int, argv: list[str], output: Path) -> None:
    for number, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(output / f"{rank}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))  # as Python does
    runpy.run_path(argv[0], run_name="__main__")


def on_ranks(count: int, function: Callable[..., Any], *args: object) -> list[Any]:
    """Return values of a function on `count` ranks."""
    with tempfile.TemporaryDirectory() as folder:
        processes = _start(count, {}, _call, Path(folder), function, *args)
        for process in processes:
            process.join(120)
            assert process.exitcode == 0
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(count)]


def _call(rank: int, folder: Path, function: Callable[..., Any], *args: object) -> None:
    (folder / str(rank)).write_bytes(pickle.dumps(function(*args)))


def _free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port: int = any_port.getsockname()[1]
        return port


def run(script: str, *arguments: object, ranks: int = 1, env: dict[str, str] | None = None) -> Done:
    """Runs an entry point to its end."""
    return Launch(script, *arguments, ranks=ranks, env=env).wait()


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Like `run`, but in this process, which saves the seconds of importing torch."""

    def call(script: str, *arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(REPOSITORY / "src" / script), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture
def unprivileged() -> Callable[..., Done]:
    """Runs Python without root's permission to read every file."""
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    if drop and not shutil.which("setpriv"):
        pytest.skip("root may read every file, and there is no setpriv")

    def call(*arguments: object) -> Done:
        done = subprocess.run([*drop, sys.executable, *map(str, arguments)], capture_output=True, text=True)
        return Done(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture(scope="session")
def finished(image_root: Path, shared: Shared) -> Callable[..., Path]:
    """Run directories of uninterrupted runs on `ranks` processes with overrides; created on first use."""

    def configs(folder: Path) -> None:
        folder.mkdir()
        (folder / "data.toml").write_text(DATA_TOML.format(root=image_root))
        (folder / "tiny.toml").write_text(TRAIN_TOML)

    def make(ranks: int, *overrides: str) -> Path:
        config = shared.once("finished", configs) / "tiny.toml"
        sets = [argument for override in overrides for argument in ("--set", override)]

        def train(run_dir: Path) -> None:
            done = run("train.py", config, "--run-dir", run_dir, *sets, ranks=ranks)
            assert done.returncode == 0, done.stderr

        return shared.once("finished/" + "-".join([str(ranks), *overrides]), train)

    return make
