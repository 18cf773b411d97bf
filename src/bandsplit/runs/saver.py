"""Checkpoints are written in the background, read back, and get their name only when they are complete."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from loguru import logger

from bandsplit.config.schema import RunConfig
from bandsplit.distributed.ranks import Ranks
from bandsplit.errors import ToldElsewhere, UserError
from bandsplit.runs.checkpoint import State, _damage_of_file, files_of


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
