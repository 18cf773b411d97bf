"""The command `predict`: classifies files and folders, and writes what was asked for."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch
from loguru import logger

from bandsplit.errors import UserError
from bandsplit.inference import files, output
from bandsplit.inference.classifier import Classifier
from bandsplit.inference.files import Outcome
from bandsplit.inference.loading import load
from bandsplit.inference.output import STDOUT
from bandsplit.paths import require_file
from bandsplit.progress import followed


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    model: Path
    images: Sequence[Path]
    """Files, and folders of images."""
    k: int = 5
    checkpoint: str = "best"
    fusion: str | None = None
    json: Path | None = None
    csv: Path | None = None
    batch_size: int = 64
    device: str | None = None
    """None: a GPU if there is one."""

    def check(self) -> None:
        """Raises UserError for what can be known before the model is read."""
        for option, path in (("--json", self.json), ("--csv", self.csv)):
            if path is not None and path != STDOUT:
                require_file(option, path)
        if (
            self.json is not None
            and self.csv is not None
            and os.path.realpath(self.json) == os.path.realpath(self.csv)  # Path.resolve raises for a circular link
        ):
            where = "standard output" if self.json == STDOUT else "one file"
            raise UserError(f"--json {self.json} --csv {self.csv}: only one of them can go to {where}")


def predict(request: Request) -> None:
    """Raises UserError, after all other files are classified, if some cannot be read or decoded."""
    request.check()
    folders = [path for path in request.images if os.path.isdir(path)]  # noqa: PTH112  # False without permission
    single = [str(path) for path in request.images if path not in folders]
    below = [file for folder in folders for file in files.in_folder(folder)]
    model = load(request.model, request.checkpoint, request.fusion).to(_device(request.device))
    bad: list[Outcome] = []
    with ExitStack() as stack:
        writers = [stack.enter_context(closing(writer)) for writer in _writers(request, model, bool(folders))]
        for writer in writers:
            next(writer)
        for outcome in _outcomes(request, model, single, below):
            _send(outcome, writers)
            if outcome.prediction is None:
                bad.append(outcome)
        for writer in writers:
            next(writer, None)
    if bad:
        named = "".join(f"\n  {each.file}: {each.reason}" for each in bad)
        raise UserError(f"{len(bad)} of {len(single) + len(below)} images cannot be read or decoded:{named}")


def _send(outcome: Outcome, writers: list[output.Writer]) -> None:
    """Raises BrokenPipeError if standard output has no reader any more, as with `| head`, and no file is written."""
    for writer in [*writers]:
        try:
            writer.send(outcome)
        except BrokenPipeError:
            writers.remove(writer)
            if not writers:
                raise


def _device(given: str | None) -> torch.device:
    try:
        device = torch.device(given or ("cuda:0" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {given}: {str(error).splitlines()[0]}") from None
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _writers(request: Request, model: Classifier, folders: bool) -> Iterator[output.Writer]:
    if request.json is not None:
        yield output.as_json(model, request.json)
    if request.csv is not None:
        yield output.as_csv(model, request.csv, request.k)
    if STDOUT not in (request.json, request.csv):
        yield output.as_lines(model) if folders else output.as_tables(model)


def _outcomes(request: Request, model: Classifier, single: list[str], below: list[str]) -> Iterator[Outcome]:
    yield from files.by_pillow(model, single, request.k, request.batch_size)
    if not below:
        return
    logger.disable("bandsplit.data.recovery")  # bad files are named at the end
    run: Callable[..., Iterator[Outcome]] = files.by_dali if files.has_dali() else files.by_pillow
    began = time.perf_counter()
    outcomes = run(model, below, request.k, request.batch_size)
    yield from followed(outcomes, "predicting", len(below))
    took = time.perf_counter() - began
    print(f"{len(below):,} images in {took:.1f} s, {len(below) / took:,.0f} images/s", file=sys.stderr)
