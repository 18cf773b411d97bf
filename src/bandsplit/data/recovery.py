"""Pipelines that survive bad images: an image that cannot be decoded any more is found, named and replaced.

DALI ends a pipeline at the first file that it cannot read or decode, without always naming it. The files of each batch
are known, though, and so is the pipeline's state after the last good one. The files of the batch that failed are
examined, the bad ones replaced, and a new pipeline continues from that state, with the same random numbers.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from loguru import logger
from numpy.typing import NDArray

from bandsplit import seeds
from bandsplit.config.schema import RunConfig
from bandsplit.data import check
from bandsplit.data.images import ImageFiles, LazyPaths
from bandsplit.data.order import Indices
from bandsplit.errors import UserError
from bandsplit.paths import writing_to

_SAMPLE = 16
"""Images that are looked up to tell a lost disk from bad images."""


class BadImage(TypedDict):
    """An image that went bad, as checkpoints have it."""

    index: int
    """Place in the list of images."""
    file: str
    reason: str
    batch: int
    """Number of the first batch of the stream in which another image took its place; -1: none so far."""
    replacement: int
    """Place in the list of the image that took its place there; -1: none so far."""
    replacement_file: str


class UndecodableImage(UserError):
    """A file that DALI cannot decode, where `data.on_bad` is "error"."""

    one_rank = True


class TooManyBadImages(UserError):
    """More images went bad than `data.max_bad`, or all of a class."""

    bad: Sequence[tuple[str, str]] = ()
    """Files and what is wrong with each."""

    @classmethod
    def of(cls, message: str, bad: Sequence[tuple[str, str]]) -> TooManyBadImages:
        named = "".join(f"\n  {file}: {reason}" for file, reason in bad[:20]) + "\n  …" * (len(bad) > 20)
        error = cls(f"{message}:{named}")
        error.bad = bad
        return error


def too_many(bad: Sequence[tuple[str, str]], allowed: int) -> TooManyBadImages:
    return TooManyBadImages.of(
        f"{len(bad)} images cannot be read or decoded any more, and data.max_bad = {allowed}; repair them, or allow "
        f"more with --set data.max_bad={len(bad)}. Training can be resumed from its last checkpoint",
        bad,
    )


class Substituted(LazyPaths):
    """Paths of which some stand for others."""

    def __init__(self, paths: Sequence[str], instead: Mapping[int, int]) -> None:
        """`instead`: the index of a path → the one that takes its place; may change."""
        self._paths, self._instead = paths, instead

    def __len__(self) -> int:
        return len(self._paths)

    def at(self, i: int) -> str:
        return self._paths[self._instead.get(i, i)]


class RecoveringPipeline:
    """A DALI pipeline that continues with other images where some cannot be read or decoded.

    Which image takes the place of a bad one follows from the seed and from what is known to be bad when its batch is
    handed out, not from when it was found. So a run that was killed and repeats some batches uses the same ones.

    Raises UndecodableImage if `data.on_bad` is "error", and TooManyBadImages.
    """

    def __init__(
        self,
        build: Callable[[ImageFiles, bytes | None], Any],
        indices: Callable[[int], Indices],
        config: RunConfig,
        files: ImageFiles,
        threads: int,
        training: bool,
        batches: int = 0,
        checkpoint: bytes | None = None,
        bad: Iterable[BadImage] = (),
    ) -> None:
        """
        Args:
            build: makes the pipeline over files from a DALI checkpoint.
            indices: those of the images of a batch, given its number, before any is replaced.
            training: whether only an image of the same class can replace another. In validation, where its place is
                not counted, any can.
            batches, checkpoint, bad: where another such pipeline was, to continue from there.
        """
        self._build, self._indices, self._config, self._threads = build, indices, config, threads
        self._training = training
        self.batches = batches
        """Handed out so far."""
        self.checkpoint = checkpoint
        """DALI's, after the last batch that was handed out; None: the beginning."""
        self._labels: NDArray[Any] = np.asarray(files.labels)
        self._originals, self._classes = files.paths, files.classes
        self._bad: dict[int, BadImage] = {each["index"]: self._here(each) for each in bad}
        self._instead = {i: self._replacement(i) for i in self._bad}
        self._files = replace(files, paths=Substituted(files.paths, self._instead))
        self._pipe: Any = build(self._files, checkpoint)

    @property
    def bad(self) -> list[BadImage]:
        """Copies, in the order of the list of images."""
        return [self._bad[i].copy() for i in sorted(self._bad)]

    def run(self, stream: Any = None) -> Any:
        """Outputs of the next batch."""
        outputs = self._attempt(stream)
        retried = False
        while isinstance(outputs, RuntimeError):
            self._pipe = None  # its memory first; after an error it is of no use
            gc.collect()
            found = self._find_bad([self.batches])
            if not found and (retried or not _is_about_files(outputs)):
                raise outputs
            retried = retried or not found  # a file system may have been away for a moment
            self._pipe = self._build(self._files, self.checkpoint)
            outputs = self._attempt(stream)
        self._note_replaced()
        self.batches += 1
        self.checkpoint = bytes(self._pipe.checkpoint())
        return outputs

    def examine(self, first: int, count: int) -> None:
        """Finds bad images in `count` batches from number `first` on, before they are decoded."""
        if self._find_bad(range(first, first + count)):
            self._pipe = None
            self._pipe = self._build(self._files, self.checkpoint)

    def bad_places(self, number: int) -> list[int]:
        """Places in a batch whose image is bad."""
        return [n for n, i in enumerate(self._indices(number).tolist()) if i in self._bad] if self._bad else []

    def _here(self, record: BadImage) -> BadImage:
        """A record of a run that had its images elsewhere."""
        instead = record["replacement"]
        named = self._originals[instead] if instead >= 0 else ""
        return {**record, "file": self._originals[record["index"]], "replacement_file": named}

    def _attempt(self, stream: Any) -> Any:
        """Outputs of the next batch, or the error that came instead; its traceback would keep the pipeline alive."""
        try:
            return self._pipe.run(stream)
        except RuntimeError as error:
            return error.with_traceback(None)

    def _find_bad(self, numbers: Iterable[int]) -> bool:
        """Examines the images that are used in batches; whether more are bad than was known."""
        used = {self._instead.get(i, i): None for number in numbers for i in self._indices(number).tolist()}
        verdicts = check.examine([self._originals[i] for i in used], self._threads)
        found = {i: verdict.reason for i, verdict in zip(used, verdicts, strict=True) if verdict.reason}
        if found:
            self._require_data()
        if found and self._config.data.on_bad == "error":
            i, reason = next(iter(found.items()))
            raise UndecodableImage(
                f"{self._originals[i]}: this image cannot be read or decoded ({reason}); repair or remove it, or let "
                'others take the place of such images with --set data.on_bad="replace"'
            )
        for i, reason in found.items():
            self._bad[i] = {
                "index": i, "file": self._originals[i], "reason": reason, "batch": -1,
                "replacement": -1, "replacement_file": "",
            }  # fmt: skip
        if len(self._bad) > self._config.data.max_bad:
            raise _of_one_rank(too_many(self._named(), self._config.data.max_bad))
        for i in self._bad:
            if self._instead.get(i, i) in found:
                self._instead[i] = self._replacement(i)
        return bool(found)

    def _require_data(self) -> None:
        """Raises UserError if the data set is gone, such as a disk that is no longer mounted: no image is to blame."""
        some = np.linspace(0, len(self._originals) - 1, _SAMPLE, dtype=int).tolist()
        if not any(os.path.exists(self._originals[i]) for i in some):  # noqa: PTH110  # False without permission, too
            error = UserError(
                f"data.root: {self._config.data.root}: cannot be read any more: none of {_SAMPLE} images that were "
                f"looked at exists, such as {self._originals[0]}. Nothing was changed; once it can be read, resume "
                "from the last checkpoint"
            )
            error.one_rank = True
            raise error

    def _replacement(self, index: int) -> int:
        """The image for the place of a bad one: of the same class, drawn from the run's seed, and not known to be bad.

        If it is bad too, the batch fails again.
        """
        others = np.flatnonzero(self._labels == self._labels[index]) if self._training else np.arange(len(self._labels))
        np.random.default_rng(seeds.derived(self._config.seed, "replacement", index)).shuffle(others)
        for i in others.tolist():
            if i not in self._bad:
                return i
        of = f" of class {self._classes[self._labels[index]]}" if self._training else ""
        message = f"{self._originals[index]}: all other images{of} are bad too, so that none can take its place"
        raise _of_one_rank(TooManyBadImages.of(message, self._named()))

    def _note_replaced(self) -> None:
        """Completes the records of bad images whose place another one has taken in this batch for the first time."""
        for i in self._indices(self.batches).tolist() if self._bad else []:
            record = self._bad.get(i)
            if record and record["batch"] < 0:
                instead = self._originals[self._instead[i]]
                record["batch"] = self.batches
                record["replacement"], record["replacement_file"] = self._instead[i], instead
                effect = f"{instead} takes its place" if self._training else "it does not count"
                logger.warning("{}: {}; {}", record["file"], record["reason"], effect)

    def _named(self) -> list[tuple[str, str]]:
        return [(each["file"], each["reason"]) for each in self.bad]


def _is_about_files(error: RuntimeError) -> bool:
    return "fn.decoders" in str(error) or "fn.io.file" in str(error)


def _of_one_rank(error: TooManyBadImages) -> TooManyBadImages:
    error.one_rank = True
    return error


class Position:
    """A small file with the number of the batch that a stream is about to use.

    It outlives a crash of the process, but nothing else. Images of that batch and of those that were prepared ahead may
    have caused the crash.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError if the file cannot be written."""
        self._path = path
        with writing_to(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            content = os.pread(self._file, 32, 0)
        self.left_at = int(content) if content.strip().isdigit() else None
        """Where a process that crashed was; None: none did."""

    def note(self, batch: int) -> None:
        with suppress(OSError):  # a full disk: without this file a restart examines nothing beforehand
            os.pwrite(self._file, b"%020d\n" % batch, 0)

    def remove(self) -> None:
        os.close(self._file)
        with suppress(OSError):
            self._path.unlink()
