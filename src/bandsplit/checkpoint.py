"""Checkpoints that are whole or not there: a folder a step, a file a branch, written in the background.

    checkpoints/step_00000026/run.pt            config, progress, losses since the last line of metrics
                              branch_00.pt …    weights, optimizer and loss scale of one branch, whoever trained it
                              stream_00.pt …    position of one stream of pictures
    checkpoints/last, best                      links to such folders

Every rank writes its own files. Each carries the CRC-32 of every record, as zip archives do, and is read back once
before the folder gets its name.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from bandsplit.errors import ToldElsewhere, UserError
from bandsplit.parallel import Ranks
from bandsplit.schema import RunConfig

State = dict[str, Any]

RUN = "run.pt"


def branch_file(number: int) -> str:
    return f"branch_{number:02d}.pt"


def stream_file(number: int) -> str:
    return f"stream_{number:02d}.pt"


def files_of(numbers: Sequence[int], streams: int) -> list[str]:
    """Names of the files of a checkpoint with these branches and so many streams."""
    return [RUN, *(branch_file(k) for k in numbers), *(stream_file(s) for s in range(streams))]


# ---------------------------------------------------------------------------------------------------- reading


def read(folder: Path, name: str) -> State:
    """One file of a checkpoint onto the CPU, tensors and plain values only.

    Raises UserError where there is none or it cannot be read.
    """
    path = folder / name
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    try:
        state: State = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: this checkpoint cannot be read: {error}") from error
    return state


def read_ensemble(folder: Path, numbers: Sequence[int]) -> State:
    """State of an `Ensemble` of these branches as they were validated: running means of the weights where there are."""
    branches = [read(folder, branch_file(k)) for k in numbers]
    return {
        f"branches.{i}.{key}": value
        for i, branch in enumerate(branches)
        for key, value in (branch["ema"] if "ema" in branch else branch["network"]).items()
    }


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: a file that is missing or differs from its checksums; None: it is good."""
    wrong = _damage_of_file(folder / RUN)
    if wrong:
        return wrong
    run = read(folder, RUN)
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(_damage_of_file, [folder / name for name in files_of(run["branches"], run["streams"])])
        return next((wrong for wrong in found if wrong), None)


def _damage_of_file(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except FileNotFoundError:
        return f"{path.name} is missing"
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        return f"{path.name}: {error}"
    return record and f"{path.name}: {record} differs from its checksum"


def latest(folder: Path) -> Path | None:
    """The newest good checkpoint of a run; None where there are none at all.

    Says which ones are damaged.  Raises UserError where all are.
    """
    found = sorted(folder.glob("step_*"), reverse=True)
    for path in found:
        wrong = damage(path)
        if wrong is None:
            return path
        logger.warning("{} is damaged ({}) and will not be used", path, wrong)
    if found:
        raise UserError(f"{folder}: every checkpoint is damaged; to start over, remove them or name another --run-dir")
    return None


# ---------------------------------------------------------------------------------------------------- writing


def on_host(state: Any) -> Any:
    """A copy on the CPU that later steps do not change."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: on_host(value) for key, value in state.items()}
    return [on_host(value) for value in state] if isinstance(state, list | tuple) else state


def clean_up(folder: Path, resumed: Path | None) -> None:
    """Removes what a killed run left half written, and damaged checkpoints later than the one that is resumed."""
    for path in folder.glob(".step_*"):
        shutil.rmtree(path)
    for path in folder.glob("step_*"):
        if resumed is None or path.name > resumed.name:
            shutil.rmtree(path)


class Writer:
    """Writes this rank's files of one checkpoint after the other, in a thread.

    The first rank's thread waits until the files of all ranks are there, then gives the folder its name, points
    ``last`` (and ``best``) to it and removes checkpoints that are not kept.  A kill at any moment leaves the previous
    links and what they point to.
    """

    def __init__(self, folder: Path, leads: bool, keep: int) -> None:
        self._folder, self._leads, self._keep = folder, leads, keep
        self._thread: threading.Thread | None = None
        self._given_up = threading.Event()
        self.error: UserError | None = None
        """Why the last checkpoint could not be written."""

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, step: int, files: Mapping[str, State], everybodys: Sequence[str], best: bool) -> None:
        """Begins to write `files` of a checkpoint that consists of `everybodys`; not while `busy`.

        Nothing may change the states from here on.
        """
        assert not self.busy
        self._thread = threading.Thread(target=self._run, args=(step, files, everybodys, best), daemon=True)
        self._thread.start()

    def give_up(self) -> None:
        """Ends the wait for ranks that could not write, and removes what is half written."""
        self._given_up.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, step: int, files: Mapping[str, State], everybodys: Sequence[str], best: bool) -> None:
        began = time.perf_counter()
        temporary = self._folder / f".step_{step:08d}"
        try:
            temporary.mkdir(exist_ok=True)
            for name, state in files.items():
                _write_file(temporary / name, state)
            if self._leads and self._all_there(temporary, everybodys):
                size = sum(path.stat().st_size for path in temporary.iterdir()) / 2**20
                self._name(temporary, best)
                seconds = time.perf_counter() - began
                logger.debug(f"checkpoint of step {step}: {size:,.1f} MiB in {seconds:.1f} s beside the training")
        except Exception as error:  # whatever it is, the run has to hear of it
            good = self._folder / "last"
            left = f"the last good one is {good.resolve().name}" if good.exists() else "there is none before it"
            self.error = UserError(
                f"{self._folder}: the checkpoint of step {step} cannot be written: {_cause(error)}; {left}. "
                "Once that is mended, --resume goes on from there"
            )
            self.error.one_rank = True
            shutil.rmtree(temporary, ignore_errors=True)

    def _all_there(self, temporary: Path, names: Sequence[str]) -> bool:
        while not all((temporary / name).exists() for name in names):
            if self._given_up.wait(0.02):
                shutil.rmtree(temporary, ignore_errors=True)
                return False
        return True

    def _name(self, temporary: Path, best: bool) -> None:
        _sync_folder(temporary)
        path = self._folder / temporary.name.removeprefix(".")
        temporary.rename(path)
        for name in ("last", *(("best",) if best else ())):
            link = self._folder / f".{name}"
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            link.replace(self._folder / name)
        _sync_folder(self._folder)
        found = sorted(self._folder.glob("step_*"))
        best_path = (self._folder / "best").resolve()
        for old in found[: -self._keep]:
            if old.resolve() != best_path:
                shutil.rmtree(old)


def _cause(error: BaseException) -> BaseException:
    """The system's error behind torch's: when a disk is full, torch.save tells of an unexpected position."""
    while not isinstance(error, OSError) and error.__context__ is not None:
        error = error.__context__
    return error


def _write_file(path: Path, state: State) -> None:
    """The file has its name only when it is complete on disk and was read back without an error."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    wrong = _damage_of_file(temporary)
    if wrong:
        raise OSError(f"read back after writing, it is not what was written: {wrong}")
    temporary.replace(path)


def _sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Saver:
    """When checkpoints are written, and whether they were: what the ranks have to agree on."""

    def __init__(self, folder: Path, config: RunConfig, ranks: Ranks) -> None:
        self._folder, self._config, self._ranks = folder, config, ranks
        self._writer = Writer(folder, ranks.is_first, config.checkpoint.keep)
        self._last = time.monotonic()

    def agree(self, signal_here: int) -> tuple[int, bool]:
        """A signal that any rank has received (0: none), and whether `checkpoint.every_minutes` are over.

        Raises UserError where this rank could not write the last checkpoint, ToldElsewhere where another could not.
        """
        minutes = self._config.checkpoint.every_minutes
        over = self._ranks.is_first and minutes is not None and time.monotonic() - self._last >= 60 * minutes
        signal_anywhere, over_anywhere, failed = self._ranks.largest([signal_here, over, self._failed])
        self._end_if(failed)
        return signal_anywhere, bool(over_anywhere)

    def settle(self) -> None:
        """Waits until the last checkpoint is written on every rank; raises as `agree` does."""
        deadline = time.monotonic() + self._config.parallel.timeout_seconds
        while True:
            busy, failed, late = self._ranks.largest([self._writer.busy, self._failed, time.monotonic() > deadline])
            self._end_if(failed)
            if not busy:
                return
            if late:
                raise UserError(f"{self._folder}: a checkpoint is still not written; does the file system answer?")
            time.sleep(0.01)

    def save(self, step: int, files: Mapping[str, State], streams: int, best: bool) -> None:
        names = files_of(self._config.split.numbers, streams)
        self._writer.start(step, files, names, best)
        self._last = time.monotonic()

    @property
    def _failed(self) -> int:
        """0: nothing; otherwise larger, the earlier this rank comes, since the first of those that failed tells it."""
        return self._ranks.world_size - self._ranks.rank if self._writer.error is not None else 0

    def _end_if(self, failed: int) -> None:
        if failed:
            self._writer.give_up()
            raise self._writer.error if self._writer.error and failed == self._failed else ToldElsewhere()
