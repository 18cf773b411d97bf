"""Format of checkpoints, and reading, finding and verifying them: one folder per step, one file per branch.

    checkpoints/step_00000026/run.pt            format, config, classes, progress, losses since the last line of metrics
                              branch_00.pt …    weights, EMA, optimizer and loss scale of one branch
                              stream_00.pt …    position of one stream of images, running statistics of its rank
    checkpoints/last, best                      links for users; not read by bandsplit
    checkpoints/set_aside/                      incomplete and unused checkpoints: moved here, not deleted

Every rank writes its own files. They are zip archives with a CRC-32 per record, and are read back once before the
folder is renamed. The best step is stored in `progress` of run.pt, so a run can be copied by tools that do not
support links.
"""

from __future__ import annotations

import errno
import re
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from bandsplit.errors import UserError
from bandsplit.runs.files import reading, set_aside

State = dict[str, Any]

RUN = "run.pt"

FORMAT = 2
"""Increased with every change of the contents, so that no version misreads another's checkpoints."""


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def branch_file(number: int) -> str:
    return f"branch_{number:02d}.pt"


def stream_file(number: int) -> str:
    return f"stream_{number:02d}.pt"


def files_of(numbers: Sequence[int], streams: int) -> list[str]:
    """Names of all files of a checkpoint with branches `numbers` and `streams` streams."""
    return [RUN, *(branch_file(k) for k in numbers), *(stream_file(s) for s in range(streams))]


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a folder, in order of step. Raises UserError if the folder cannot be read."""
    return sorted((path for path in _entries(folder) if re.fullmatch(r"step_\d+", path.name)), key=step_of)


def _entries(folder: Path) -> list[Path]:
    with reading(folder):
        try:
            return list(folder.iterdir())  # glob would treat an unreadable folder as empty
        except FileNotFoundError:
            return []


def read(folder: Path, name: str) -> State:
    """Loads one file of a checkpoint to the CPU; tensors and plain values only (`weights_only`).

    Raises UserError if the file does not exist or cannot be read.
    """
    path = folder / name
    with reading(path):
        try:
            state: State = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise UserError(f"{path}: no such checkpoint") from None
        except OSError:
            raise
        except Exception as error:  # damaged bytes can make torch and pickle raise anything
            raise UserError(f"{path}: this checkpoint cannot be read: {error}") from error
    return state


def read_run(folder: Path) -> State:
    """Contents of run.pt of a checkpoint. Raises UserError as `read` does, and if its format is not FORMAT."""
    run = read(folder, RUN)
    found = run.get("format")
    if found != FORMAT:
        by = "an earlier" if not isinstance(found, int) or found < FORMAT else "a later"
        raise UserError(
            f"{folder}: this checkpoint has format {found}, written by {by} version of bandsplit; this version reads "
            f"format {FORMAT}. Use the version in environment.json of the run"
        )
    return run


def read_ensemble(folder: Path, numbers: Sequence[int]) -> State:
    """State dict of an `Ensemble` of branches `numbers`, as validated: the EMA if there is one, else the network."""
    branches = [read(folder, branch_file(k)) for k in numbers]
    return {
        f"branches.{i}.{key}": value
        for i, branch in enumerate(branches)
        for key, value in (branch["ema"] if "ema" in branch else branch["network"]).items()
    }


def damage(folder: Path) -> str | None:
    """Describes a file of a checkpoint that is missing or does not match its checksums; None if all are intact.

    Raises UserError if the disk cannot be read, which does not mean that the checkpoint is damaged, and if the format
    is not FORMAT.
    """
    with reading(folder):
        wrong = damage_of_file(folder / RUN)
        if wrong:
            return wrong
        run = read_run(folder)
        with ThreadPoolExecutor(8) as pool:
            found = pool.map(damage_of_file, [folder / name for name in files_of(run["branches"], run["streams"])])
            return next((wrong for wrong in found if wrong), None)


def damage_of_file(path: Path) -> str | None:
    """Describes the damage of one file of a checkpoint; None if intact. Raises OSError if the disk cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except (FileNotFoundError, NotADirectoryError):
        return f"{path.name} is missing"
    except OSError as error:
        if error.errno != errno.EINVAL:  # a damaged archive can contain a negative offset
            raise
        return f"{path.name}: {error}"
    except Exception as error:  # damaged bytes can make zipfile raise anything
        return f"{path.name}: {error}"
    return record and f"{path.name}: {record} differs from its checksum"


def latest(folder: Path) -> Path | None:
    """The newest intact checkpoint of a run; None if there are no checkpoints.

    Logs damaged ones. Raises UserError if all are damaged, and if the disk cannot be read.
    """
    found = saved(folder)
    for path in reversed(found):
        wrong = damage(path)
        if wrong is None:
            return path
        logger.warning("{} is damaged ({}) and will not be used", path, wrong)
    if found:
        raise UserError(f"{folder}: every checkpoint is damaged; to start over, move them or name another --run-dir")
    return None


def find(folder: Path, which: str) -> Path:
    """The checkpoint of a run by "last" (the newest intact one), "best" or a step number.

    Raises UserError, naming the available steps, if it does not exist or is damaged.
    """
    if which == "last":
        path = latest(folder)
        if path is None:
            raise UserError(f"{folder}: no checkpoint yet")
        return path
    steps = [step_of(path) for path in saved(folder)]
    there = f"there are those of steps {_listed(steps)}" if steps else "there are none yet"
    if which == "best":
        step = best_step(folder)
        if not step:
            raise UserError(f"{folder}: no best checkpoint, since no validation so far had a finite loss; {there}")
    elif which.isdecimal():
        step = int(which)
    else:
        raise UserError(f"{folder}: checkpoint {which!r} given; allowed: best, last or a step; {there}")
    if step not in steps:
        best = " (the best)" if which == "best" else ""
        raise UserError(f"{folder}: no checkpoint of step {step}{best}; {there}")
    path = folder / folder_name(step)
    wrong = damage(path)
    if wrong:
        others = _listed(other for other in steps if other != step)
        raise UserError(f"{path}: this checkpoint is damaged: {wrong}; others: {others or 'none'}")
    return path


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(map(str, steps))


def best_step(folder: Path) -> int:
    """Step of the best validation, from the newest checkpoint with an intact run.pt; 0 if there is none yet."""
    with reading(folder):
        for path in reversed(saved(folder)):
            if damage_of_file(path / RUN) is None:
                step: int = read_run(path)["progress"]["best_step"]
                return step
    return 0


def on_host(state: Any) -> Any:
    """A deep copy of a nested state with all tensors on the CPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: on_host(value) for key, value in state.items()}
    return [on_host(value) for value in state] if isinstance(state, list | tuple) else state


def link(folder: Path, last: Path, best: int) -> None:
    """Updates the link `last` to the checkpoint `last`, and the link `best` to that of step `best` (0: none).

    A folder in place of a link comes from a copy of the run and is set aside. Errors are only logged, since some file
    systems have no links.
    """
    for name, target in (("last", last), ("best", folder / folder_name(best))):
        path, temporary = folder / name, folder / f".{name}"
        try:
            if path.exists() and not path.is_symlink():
                _set_aside(path, "is a copy in the place of a link")
            if target.is_dir():
                temporary.unlink(missing_ok=True)
                temporary.symlink_to(target.name)
                temporary.replace(path)
        except (OSError, UserError) as error:
            logger.debug("no link {}: {}", path, error)


def set_aside_unused(folder: Path, resumed: Path | None) -> None:
    """Sets aside incomplete checkpoints of a killed run, and those later than the one to resume from."""
    for path in sorted(_entries(folder)):
        if path.name.startswith(".step_"):
            _set_aside(path, "was left half written")
    for path in saved(folder):
        if resumed is None or step_of(path) > step_of(resumed):
            _set_aside(path, "is not used")
    if resumed is not None:
        link(folder, resumed, best_step(folder))


def _set_aside(path: Path, why: str) -> None:
    moved = set_aside(path)
    logger.info("{} {}; it is kept as {}", path, why, moved)
