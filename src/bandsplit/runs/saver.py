"""Checkpoints are written in the background, read back, and get their name only when they are complete."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from loguru import logger

from bandsplit.config.schema import RunConfig
from bandsplit.distributed.ranks import Ranks
from bandsplit.errors import ToldElsewhere, UserError
from bandsplit.runs import checkpoint
from bandsplit.runs.checkpoint import State, damage_of_file, files_of
from bandsplit.runs.files import sync_folder


class Writer:
    """Writes this rank's files of one checkpoint after the other, in a thread.

    The first rank's thread waits until the files of all ranks are there, then names the folder, points the links
    ``last`` and ``best`` and removes checkpoints that are not kept.  A kill at any moment leaves the previous
    checkpoints.
    """

    def __init__(self, folder: Path, leads: bool, keep: int) -> None:
        self._folder, self._leads, self._keep = folder, leads, keep
        self._thread: threading.Thread | None = None
        self._written, self._given_up = threading.Event(), threading.Event()
        self._own: list[Path] = []
        """This rank's files of the checkpoint that is being written."""
        self.error: UserError | None = None
        """Why the last checkpoint could not be written."""

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, step: int, files: Mapping[str, State], everybodys: Sequence[str]) -> None:
        """Begins to write `files` of a checkpoint that consists of `everybodys`; not while `busy`.

        Nothing may change the states from here on.
        """
        assert not self.busy
        self._written.clear()
        temporary = self._folder / f".{checkpoint.folder_name(step)}"
        self._own = [temporary / name for name in files]
        self._thread = threading.Thread(target=self._run, args=(temporary, files, everybodys), daemon=True)
        self._thread.start()

    def finish(self, own: float = 60.0, others: float = 5.0) -> None:
        """Waits so many seconds for this rank's files, and then for those of the other ranks, which may have ended."""
        if self._thread is not None and self._written.wait(own):
            self._thread.join(others)

    def give_up(self, seconds: float = 10.0) -> None:
        """Stops waiting for ranks that could not write, and removes this rank's files of the unfinished checkpoint."""
        self._given_up.set()
        if self._thread is not None:
            self._thread.join(seconds)
        if self.busy:  # the file system does not answer
            return
        with suppress(OSError):  # what stays is set aside on resuming; the folder goes with the last rank's files
            for path in self._own:
                path.unlink(missing_ok=True)
                _unfinished(path).unlink(missing_ok=True)
            if self._own:
                self._own[0].parent.rmdir()

    def _run(self, temporary: Path, files: Mapping[str, State], everybodys: Sequence[str]) -> None:
        began, step = time.perf_counter(), checkpoint.step_of(Path(temporary.name[1:]))
        try:
            temporary.mkdir(exist_ok=True)
            for name, state in files.items():
                _write_file(temporary / name, state)
            self._written.set()
            if self._leads and self._all_there(temporary, everybodys):
                size = sum(path.stat().st_size for path in temporary.iterdir()) / 2**20
                self._name(temporary, files[checkpoint.RUN]["progress"]["best_step"])
                seconds = time.perf_counter() - began
                logger.debug(f"checkpoint of step {step}: {size:,.1f} MiB in {seconds:.1f} s beside the training")
        except Exception as error:  # whatever it is, the run has to hear of it
            logger.opt(exception=error).debug("the checkpoint of step {} cannot be written", step)
            self.error = UserError(
                f"{self._folder}: the checkpoint of step {step} cannot be written: {_cause(error)}; "
                f"{self._last_good()}. Once that is fixed, --resume continues from there"
            )
            self.error.one_rank = True
        self._written.set()

    def _last_good(self) -> str:
        try:
            good = checkpoint.saved(self._folder)
        except UserError as error:
            return str(error)
        return f"the last good one is {good[-1].name}" if good else "there is none before it"

    def _all_there(self, temporary: Path, names: Sequence[str]) -> bool:
        while not all((temporary / name).exists() for name in names):
            if self._given_up.wait(0.02):
                return False
        return True

    def _name(self, temporary: Path, best_step: int) -> None:
        sync_folder(temporary)
        path = self._folder / temporary.name[1:]
        temporary.rename(path)
        sync_folder(self._folder)
        checkpoint.link(self._folder, path, best_step)
        try:
            self._remove_old()
        except (OSError, UserError) as error:  # the new one is good all the same
            logger.warning("{}: checkpoints that are not kept cannot be removed: {}", self._folder, error)

    def _remove_old(self) -> None:
        """Keeps the newest ones, and of each of them the one that it remembers as the best."""
        found = checkpoint.saved(self._folder)
        newest = found[-self._keep :]
        kept = {checkpoint.step_of(path) for path in newest}
        kept |= {checkpoint.read_run(path)["progress"]["best_step"] for path in newest}
        for path in found:
            if checkpoint.step_of(path) not in kept:
                shutil.rmtree(path)


def _cause(error: BaseException) -> BaseException:
    """The system's error behind torch's: when a disk is full, torch.save tells of an unexpected position."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return error if cause is None else cause


def _unfinished(path: Path) -> Path:
    """The name of a file while it is written."""
    return path.with_name(f".{path.name}")


def _write_file(path: Path, state: State) -> None:
    """The file has its name only when it is complete on disk and was read back without an error."""
    temporary = _unfinished(path)
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    wrong = damage_of_file(temporary)
    if wrong:
        raise OSError(f"read back after writing, it is not what was written: {wrong}")
    temporary.replace(path)


class Saver:
    """When checkpoints are written, and whether they were: what the ranks have to agree on.

    As a context it lets a checkpoint that is being written become complete before an error ends the run.
    """

    def __init__(self, folder: Path, config: RunConfig, ranks: Ranks) -> None:
        self._folder, self._config, self._ranks = folder, config, ranks
        self._writer = Writer(folder, ranks.is_first, config.checkpoint.keep)
        self._last = time.monotonic()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Exception):  # not where Ctrl-C wants the end at once
            self._writer.finish()

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

    def save(self, step: int, files: Mapping[str, State], streams: int) -> None:
        """Begins to write a checkpoint; `settle` comes first."""
        self._writer.start(step, files, files_of(self._config.split.numbers, streams))
        self._last = time.monotonic()

    @property
    def _failed(self) -> int:
        """0: nothing; otherwise larger, the earlier this rank comes, since the first of those that failed tells it."""
        return self._ranks.world_size - self._ranks.rank if self._writer.error is not None else 0

    def _end_if(self, failed: int) -> None:
        if failed:
            self._writer.give_up()
            raise self._writer.error if self._writer.error and failed == self._failed else ToldElsewhere()
