"""Background writing of checkpoints: files are read back, and the folder is renamed only when it is complete."""

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
from bandsplit.errors import ReportedElsewhere, UserError
from bandsplit.paths import sync_folder
from bandsplit.runs import checkpoint
from bandsplit.runs.checkpoint import State, damage_of_file, files_of


class Writer:
    """Writes this rank's files of a checkpoint in a background thread, one checkpoint at a time.

    On rank 0 the thread waits for the files of all ranks, renames the temporary folder, updates the links ``last`` and
    ``best`` and deletes old checkpoints. If the run is killed at any point, the previous checkpoints remain valid.
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
        """Starts writing `files`, this rank's part of a checkpoint whose files on all ranks are `everybodys`.

        Must not be called while `busy`. The caller must not modify the states afterwards.
        """
        assert not self.busy
        self._written.clear()
        temporary = self._folder / f".{checkpoint.folder_name(step)}"
        self._own = [temporary / name for name in files]
        self._thread = threading.Thread(target=self._run, args=(temporary, files, everybodys), daemon=True)
        self._thread.start()

    def finish(self, own: float = 60.0, others: float = 5.0) -> None:
        """Waits up to `own` seconds for this rank's files, then up to `others` seconds for those of other ranks."""
        if self._thread is not None and self._written.wait(own):
            self._thread.join(others)

    def give_up(self, seconds: float = 10.0) -> None:
        """Stops waiting for other ranks, and deletes this rank's files of the unfinished checkpoint."""
        self._given_up.set()
        if self._thread is not None:
            self._thread.join(seconds)
        if self.busy:  # the file system does not answer
            return
        with suppress(OSError):  # leftovers are set aside on resume; the last rank can delete the folder
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
        except Exception as error:  # the thread must report every error to the run
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
        except (OSError, UserError) as error:  # the new checkpoint is still valid
            logger.warning("{}: checkpoints that are not kept cannot be removed: {}", self._folder, error)

    def _remove_old(self) -> None:
        """Deletes all but the newest `keep` checkpoints and those that they record as the best."""
        found = checkpoint.saved(self._folder)
        newest = found[-self._keep :]
        kept = {checkpoint.step_of(path) for path in newest}
        kept |= {checkpoint.read_run(path)["progress"]["best_step"] for path in newest}
        for path in found:
            if checkpoint.step_of(path) not in kept:
                shutil.rmtree(path)


def _cause(error: BaseException) -> BaseException:
    """The OSError in the chain of causes, if any: on a full disk, torch.save reports only an unexpected position."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return error if cause is None else cause


def _unfinished(path: Path) -> Path:
    """Temporary name of a file while it is being written."""
    return path.with_name(f".{path.name}")


def _write_file(path: Path, state: State) -> None:
    """Writes under a temporary name, syncs, reads back and renames. Raises OSError if the checksums do not match."""
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
    """Coordinates checkpoints between ranks: when to write one, and whether writing succeeded on every rank.

    As a context manager, it lets a checkpoint in progress finish before an error ends the run.
    """

    def __init__(self, folder: Path, config: RunConfig, ranks: Ranks) -> None:
        self._folder, self._config, self._ranks = folder, config, ranks
        self._writer = Writer(folder, ranks.is_first, config.checkpoint.keep)
        self._last = time.monotonic()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Exception):  # not on a second Ctrl-C, which exits at once
            self._writer.finish()

    def agree(self, signal_here: int) -> tuple[int, bool]:
        """A signal that any rank has received (0: none), and whether `checkpoint.every_minutes` have passed.

        Every rank must call it. If the last checkpoint could not be written, raises UserError on the rank that reports
        it and ReportedElsewhere on all others.
        """
        minutes = self._config.checkpoint.every_minutes
        over = self._ranks.is_first and minutes is not None and time.monotonic() - self._last >= 60 * minutes
        signal_anywhere, over_anywhere, failed = self._ranks.largest([signal_here, over, self._failed])
        self._end_if(failed)
        return signal_anywhere, bool(over_anywhere)

    def settle(self) -> None:
        """Waits until every rank has written the last checkpoint. Raises as `agree` does, and UserError on timeout."""
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
        """Starts writing a checkpoint; call `settle` first. `streams`: number of streams of the whole run."""
        self._writer.start(step, files, files_of(self._config.split.numbers, streams))
        self._last = time.monotonic()

    @property
    def _failed(self) -> int:
        """0 without an error, else world_size - rank: the maximum belongs to the lowest failed rank, which reports."""
        return self._ranks.world_size - self._ranks.rank if self._writer.error is not None else 0

    def _end_if(self, failed: int) -> None:
        if failed:
            self._writer.give_up()
            raise self._writer.error if self._writer.error and failed == self._failed else ReportedElsewhere()
