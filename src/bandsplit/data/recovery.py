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
from typing import Any, TypedDict, overload

import numpy as np
from loguru import logger
from numpy.typing import NDArray

from bandsplit import seeds
from bandsplit.config.schema import RunConfig
from bandsplit.data import check
from bandsplit.data.images import ImageFiles
from bandsplit.data.order import Indices
from bandsplit.errors import UserError


class Replaced(TypedDict):
    """An image that went bad, as checkpoints have it."""

    batch: int
    """Number of the first batch of its stream that is without it."""
    index: int
    """Place in the list of images."""
    file: str
    reason: str
    replacement: int
    """Place in the list of the image that is used instead."""
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
        f"more with --set data.max_bad={len(bad)}, and --resume from the last checkpoint",
        bad,
    )


class Substituted(Sequence[str]):
    """Paths of which some stand for others."""

    def __init__(self, paths: Sequence[str], instead: Mapping[int, int]) -> None:
        """`instead`: the index of a path → the one that takes its place; may grow."""
        self._paths, self._instead = paths, instead

    def __len__(self) -> int:
        return len(self._paths)

    def index_of(self, i: int) -> int:
        """The index of the path that stands at a place; what replaces a path may have been replaced later."""
        while i in self._instead:
            i = self._instead[i]
        return i

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return self._paths[self.index_of(i)]


class RecoveringPipeline:
    """A DALI pipeline that continues with other images where some cannot be read or decoded.

    Raises UndecodableImage where `data.on_bad` is "error", and TooManyBadImages.
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
        replaced: Iterable[Replaced] = (),
    ) -> None:
        """
        Args:
            build: makes the pipeline over files from a DALI checkpoint.
            indices: those of the images of a batch, given its number, before any is replaced.
            training: whether only an image of the same class can replace another. In validation, where its place is
                not counted, any can.
            batches, checkpoint, replaced: where another such pipeline was, to continue from there.
        """
        self._build, self._indices, self._config, self._threads = build, indices, config, threads
        self._training = training
        self.batches = batches
        """Handed out so far."""
        self.checkpoint = checkpoint
        """DALI's, after the last batch that was handed out; None: the beginning."""
        self.replaced = list(replaced)
        """In the order in which they were found."""
        self._instead = {each["index"]: each["replacement"] for each in self.replaced}
        self._originals = files.paths
        self._paths = Substituted(files.paths, self._instead)
        self._files = replace(files, paths=self._paths)
        self._pipe: Any = build(self._files, checkpoint)

    def run(self, stream: Any = None) -> Any:
        """Outputs of the next batch."""
        outputs = self._attempt(stream)
        retried = False
        while isinstance(outputs, RuntimeError):
            self._pipe = None  # its memory first; after an error it is of no use
            gc.collect()
            found = self._replace_in([self.batches])
            if not found and (retried or not _is_about_files(outputs)):
                raise outputs
            retried = retried or not found  # a file system may have been away for a moment
            self._pipe = self._build(self._files, self.checkpoint)
            outputs = self._attempt(stream)
        self.batches += 1
        self.checkpoint = bytes(self._pipe.checkpoint())
        return outputs

    def examine(self, first: int, count: int) -> None:
        """Replaces what is bad in so many batches from the one with number `first` on, before they are decoded."""
        if self._replace_in(range(first, first + count)):
            self._pipe = None
            self._pipe = self._build(self._files, self.checkpoint)

    def bad_places(self, number: int) -> list[int]:
        """Places in a batch whose image was replaced."""
        return [n for n, i in enumerate(self._indices(number).tolist()) if i in self._instead] if self._instead else []

    def _attempt(self, stream: Any) -> Any:
        """Outputs of the next batch, or the error that came instead; its traceback would keep the pipeline alive."""
        try:
            return self._pipe.run(stream)
        except RuntimeError as error:
            return error.with_traceback(None)

    def _replace_in(self, numbers: Iterable[int]) -> bool:
        """Examines the images of batches and replaces the bad ones; whether there were any."""
        users: dict[int, int] = {}  # which batch has an image first
        for number in numbers:
            for i in self._indices(number).tolist():
                users.setdefault(self._paths.index_of(i), number)
        bad = self._bad(list(users))
        if bad and self._config.data.on_bad == "error":
            i, reason = next(iter(bad.items()))
            raise UndecodableImage(
                f"{self._originals[i]}: this image cannot be read or decoded ({reason}); repair or remove it, or let "
                'others take the place of such images with --set data.on_bad="replace"'
            )
        known = {self._originals[i]: reason for i, reason in bad.items()}
        everything = [(each["file"], each["reason"]) for each in self.replaced] + list(known.items())
        if len(everything) > self._config.data.max_bad:
            raise _of_one_rank(too_many(everything, self._config.data.max_bad))
        for i, reason in bad.items():
            instead = self._replacement(i, bad, everything)
            self.replaced.append(
                {
                    "batch": users[i],
                    "index": i,
                    "file": self._originals[i],
                    "reason": reason,
                    "replacement": instead,
                    "replacement_file": self._originals[instead],
                }
            )
            effect = f"{self._originals[instead]} takes its place" if self._training else "it does not count"
            logger.warning("{}: {}; {}", self._originals[i], reason, effect)
            self._instead[i] = instead
        return bool(bad)

    def _bad(self, indices: Sequence[int]) -> dict[int, str]:
        """Which of the images cannot be read or decoded, and why."""
        verdicts = check.examine([self._originals[i] for i in indices], self._threads)
        return {i: verdict.reason for i, verdict in zip(indices, verdicts, strict=True) if verdict.reason}

    def _replacement(self, index: int, bad: Mapping[int, str], everything: Sequence[tuple[str, str]]) -> int:
        """A good image for the place of another: of the same class, drawn from the run's seed."""
        labels: NDArray[Any] = np.asarray(self._files.labels)
        others = np.flatnonzero(labels == labels[index]) if self._training else np.arange(len(labels))
        np.random.default_rng(seeds.derived(self._config.seed, "replacement", index)).shuffle(others)
        candidates = [i for i in others.tolist() if i not in self._instead and i not in bad]
        verdicts = check.examine((self._originals[i] for i in candidates), 1)
        for i, verdict in zip(candidates, verdicts, strict=True):
            if not verdict.reason:
                verdicts.close()
                return i
        of = f" of class {self._files.classes[labels[index]]}" if self._training else ""
        message = f"{self._originals[index]}: every other image{of} is bad too, so that none can take its place"
        raise _of_one_rank(TooManyBadImages.of(message, everything))


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
        self._path = path
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
