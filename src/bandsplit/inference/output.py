"""What is predicted, as a table, as JSON and as CSV, written as it becomes known."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from bandsplit.inference.classifier import Classifier, Guess, Prediction
from bandsplit.inference.files import Outcome
from bandsplit.paths import replace_bytes

Writer = Generator[None, Outcome | None, None]
"""Takes each outcome, and None at the end."""

STDOUT = Path("-")


@contextmanager
def opened(path: Path) -> Iterator[IO[str]]:
    """A text file to write to, which takes its name at the end; `STDOUT` is standard output.

    Raises UserError if it cannot be written.
    """
    if path == STDOUT:
        yield sys.stdout
        return
    with replace_bytes(path) as file:
        text = open(file.fileno(), "w", encoding="utf-8", errors="surrogateescape", newline="", closefd=False)  # noqa: SIM115
        with text:
            yield text


def as_json(model: Classifier, path: Path) -> Writer:
    """A list with one object per file: its likeliest classes and the votes of the branches, or the error."""
    with opened(path) as file:
        before = "["
        while (outcome := (yield)) is not None:
            file.write(f"{before}\n{json.dumps(_as_dict(outcome, model), ensure_ascii=False)}")
            before = ","
        file.write("\n]\n" if before == "," else "[]\n")


def as_csv(model: Classifier, path: Path, k: int) -> Writer:
    """One row per file: file, error, the k likeliest classes and the votes of the branches, with confidences."""
    guesses = [f"top{i}" for i in range(1, min(k, len(model.classes)) + 1)]
    guesses += [f"branch{branch.number}" for branch in model.description.branches]
    with opened(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "error", *(f"{each}{part}" for each in guesses for part in ("", "_confidence"))])
        while (outcome := (yield)) is not None:
            found = outcome.prediction
            pairs = [] if found is None else [*found.top, *found.votes]
            cells = [cell for each in pairs for cell in (model.classes[each.label], f"{each.confidence:.6g}")]
            name = _shown(outcome.file) if path == STDOUT else outcome.file  # a terminal takes text alone
            writer.writerow([name, outcome.reason, *(cells or [""] * (2 * len(guesses)))])


def as_lines(model: Classifier) -> Writer:
    """One line per file on standard output: the likeliest class, its confidence, and how many branches agree."""
    width = max(map(len, model.names))
    above_the_bar = sys.stdout.isatty() and sys.stderr.isatty()
    write: Callable[[str], object] = tqdm.write if above_the_bar else print
    while (outcome := (yield)) is not None:
        if outcome.prediction is not None:
            best, votes = outcome.prediction.top[0], outcome.prediction.votes
            agree = sum(vote.label == best.label for vote in votes)
            of = f"  {agree} of {len(votes)} branches" * (len(votes) > 1)
            write(f"{best.confidence:7.2%}  {best.name:<{width}}{of}  {_shown(outcome.file)}")


def as_tables(model: Classifier) -> Writer:
    """Per file on standard output: the likeliest classes, and below them what each branch says."""
    width = max(map(len, model.names))
    while (outcome := (yield)) is not None:
        if outcome.prediction is not None:
            print("\n".join(_table(_shown(outcome.file), outcome.prediction, model, width)), end="\n\n")


def _table(file: str, prediction: Prediction, model: Classifier, width: int) -> Iterator[str]:
    yield file
    for guess in prediction.top:
        yield f"  {guess.confidence:7.2%}  {guess.name:<{width}}  {'█' * round(40 * guess.confidence)}".rstrip()
    if len(prediction.votes) > 1:
        yield "  votes of the branches:"
        for branch, vote in zip(model.description.branches, prediction.votes, strict=True):
            bands = f"band{'s' if len(branch.bands) > 1 else ''} {', '.join(map(str, branch.bands))}"
            yield f"  {vote.confidence:7.2%}  {vote.name:<{width}}  branch {branch.number}, {bands}"


def _as_dict(outcome: Outcome, model: Classifier) -> dict[str, Any]:
    if outcome.prediction is None:
        return {"file": _shown(outcome.file), "error": outcome.reason}
    return {
        "file": _shown(outcome.file),
        "top": [_guess(guess, model) for guess in outcome.prediction.top],
        "branches": [
            {"branch": branch.number, "bands": branch.bands, **_guess(vote, model)}
            for branch, vote in zip(model.description.branches, outcome.prediction.votes, strict=True)
        ],
    }


def _guess(guess: Guess, model: Classifier) -> dict[str, Any]:
    return {"class": model.classes[guess.label], "name": guess.name, "confidence": guess.confidence}


def _shown(file: str) -> str:
    """A path with the bytes that are not UTF-8 as \\x…"""
    return file.encode(errors="surrogateescape").decode(errors="backslashreplace")
