"""Images that went bad while training: gathered from all ranks, told once each, and counted against `data.max_bad`."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

from loguru import logger

from bandsplit.data.recovery import BadImage, TooManyBadImages, too_many
from bandsplit.paths import expanded
from bandsplit.runs.files import replace_text
from bandsplit.training.session import Session


class BadImages:
    """Used as a context manager, it also writes the list if the number of bad images ends the run."""

    def __init__(self, path: Path, session: Session, emit: Callable[..., None], step: int) -> None:
        """Every rank calls it.

        Args:
            path: the list of all bad images so far.
            emit: called as `emit("replaced", **values)` on rank 0.
            step: of the checkpoint that the run resumes from; what happened until then was told.
        """
        self._path, self._session, self._emit = path, session, emit
        self._ranks = session.mesh.ranks
        self._root = f"{expanded(session.config.data.root, 'data.root').absolute()}/"
        self._told: dict[str, list[str]] = {}
        """File → its line of the list."""
        self._own = 0
        """Records of this rank that the others know."""
        if step:
            self._learn(self._until(step))

    def __enter__(self) -> BadImages:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, TooManyBadImages) and (error.one_rank or self._ranks.is_first):
            more = [["", self._shown(file), reason, ""] for file, reason in error.bad if file not in self._told]
            self._write([*self._told.values(), *more])

    def tell(self, step: int) -> None:
        """Tells what went bad up to a step that has just been done; every rank calls it.

        Raises TooManyBadImages on every rank where the images are more than `data.max_bad`.
        """
        own = self._until(step)
        if not self._ranks.largest([len(own) > self._own])[0]:
            return
        new = self._learn(own)
        if self._ranks.is_first and new:
            for stream, each in new:
                where = self._session.streams.own
                values = dict(zip(("step", "file", "reason", "replacement"), self._line(each), strict=True))
                self._emit("replaced", **{**values, "step": self._step(each)})
                if stream not in where:  # those of its own streams are in its log already
                    logger.warning("{}: {}; {} takes its place", each["file"], each["reason"], each["replacement_file"])
            self._write(list(self._told.values()))
        allowed = self._session.config.data.max_bad
        if len(self._told) > allowed:
            raise too_many([(file, reason) for file, (_, _, reason, _) in self._told.items()], allowed)

    def _until(self, step: int) -> list[tuple[int, BadImage]]:
        """This rank's records, without those of batches that were prepared for a later step."""
        return [(stream, each) for stream, each in self._session.loader.bad() if self._step(each) <= step]

    def _learn(self, own: list[tuple[int, BadImage]]) -> list[tuple[int, BadImage]]:
        """What is new on any rank, the first record of each file."""
        self._own = len(own)
        everything = [record for records in self._ranks.gather(own) for record in records]
        everything.sort(key=lambda record: (self._step(record[1]), record[0], record[1]["index"]))
        new = []
        for stream, each in everything:
            if each["file"] not in self._told:
                self._told[each["file"]] = self._line(each)
                new.append((stream, each))
        return new

    def _step(self, record: BadImage) -> int:
        """The first step without the image."""
        return record["batch"] // self._session.config.grad_accum_steps + 1

    def _line(self, record: BadImage) -> list[str]:
        files = [self._shown(record["file"]), record["reason"], self._shown(record["replacement_file"])]
        return [str(self._step(record)), *files]

    def _shown(self, file: str) -> str:
        """Relative to `data.root`, which may be elsewhere on another machine."""
        return file.removeprefix(self._root)

    def _write(self, lines: list[list[str]]) -> None:
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["step", "file", "reason", "replacement"])
        table.writerows(lines)
        replace_text(self._path, text.getvalue())
