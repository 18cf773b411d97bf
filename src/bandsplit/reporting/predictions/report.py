"""Figures and tables of files of `evaluate --save`. Reads no run directory, and no image but those it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from bandsplit.errors import UserError
from bandsplit.progress import followed
from bandsplit.reporting.figures import STYLE
from bandsplit.reporting.predictions.figures import FIGURES, Drawn
from bandsplit.reporting.predictions.results import Results
from bandsplit.reporting.predictions.sheet import mistakes
from bandsplit.reporting.predictions.tables import summary, tables
from bandsplit.runs.predictions import Predictions

IN_RUN = "predictions.npz"
"""The file of a run directory that is reported together with it."""

FORMATS = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
"""Of every figure, with metadata that would differ from one time to the next."""


def files_of(paths: Sequence[Path]) -> list[Path]:
    """Those of the paths that are files of predictions, and those that run directories among the paths have."""
    found = [path if path.suffix == ".npz" else path / IN_RUN for path in paths]
    return list(dict.fromkeys(file for path, file in zip(paths, found, strict=True) if path == file or file.is_file()))


def report(files: Sequence[Path], output: Path | None = None, images: Path | None = None) -> None:
    """Writes the figures, `summary.md` and CSV tables of each file, and prints the summaries.

    Skips files that cannot be read, with a message. Raises UserError if none can, or if a folder cannot be written.

    Args:
        output: folder with one folder for each file; None: a folder beside the file, named like it.
        images: folder of the images, if they are elsewhere now.
    """
    problems = []
    for file in files:
        try:
            results = Results(Predictions.read(file))
        except UserError as error:
            problems.append(str(error))
            continue
        write(results, _folder(file, files, output), images)
    if len(problems) == len(files):
        raise UserError("\n".join(problems if len(problems) == 1 else ["none of these can be drawn:", *problems]))
    for problem in problems:
        print(f"left out: {problem}")


def _folder(file: Path, files: Sequence[Path], output: Path | None) -> Path:
    if output is None:
        return file.with_suffix("")
    namesakes = [other for other in files if other.stem == file.stem]
    if len(namesakes) == 1:
        return output / file.stem
    parents = {other.absolute().parent.parts[1:] for other in namesakes}  # without the root
    depth = next(
        n for n in range(1, 1 + max(map(len, parents))) if len({each[-n:] for each in parents}) == len(parents)
    )
    return output / "-".join([*file.absolute().parent.parts[1:][-depth:], file.stem])


def write(results: Results, folder: Path, images: Path | None) -> None:
    """Raises UserError if the folder cannot be written."""
    figures: dict[str, Callable[[Results], Drawn]] = {**FIGURES, "mistakes": partial(mistakes, folder=images)}
    made = tables(results)
    text = summary(results, made)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(STYLE):
            for name, draw in followed(figures.items(), f"drawing {folder}", len(figures), "figures"):
                drawn = draw(results)
                if not isinstance(drawn, Figure):
                    print(f"{name}: left out, {drawn}")
                    continue
                for suffix, metadata in FORMATS.items():
                    drawn.savefig(folder / f"{name}.{suffix}", metadata=metadata)
        for name, frame in made.items():
            frame.to_csv(folder / f"{name}.csv", index=False)
        (folder / "summary.md").write_text(text, encoding="utf-8")
    except OSError as error:
        reason = "exists and is not a folder" if folder.is_file() else f"cannot be written: {error.strerror or error}"
        raise UserError(f"{folder}: {reason}; --output names another folder") from error
    print(f"figures, tables and summary.md: {folder}\n\n{text}", end="")
