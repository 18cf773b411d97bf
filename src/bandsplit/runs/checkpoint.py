"""Checkpoints that are complete or not there: one folder per step, one file per branch, written in the background.

    checkpoints/step_00000026/run.pt            format, config, classes, progress, losses since the last line of metrics
                              branch_00.pt …    weights, optimizer and loss scale of one branch, whoever trained it
                              stream_00.pt …    position of one stream of images
    checkpoints/last, best                      links for people; nothing depends on them
    checkpoints/set_aside/                      damaged, half-written and replaced ones: moved here, not deleted

Every rank writes its own files. Each carries the CRC-32 of every record, as zip archives do, and is read back once
before the folder gets its name. Which checkpoint is the best is part of `progress` in run.pt, so a run may be copied
by tools that do not know links.
"""

from __future__ import annotations

import errno
import re
import zipfile
from collections.abc import Sequence
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
"""Raised whenever what a checkpoint holds changes, so that versions do not misread each other's."""


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def branch_file(number: int) -> str:
    return f"branch_{number:02d}.pt"


def stream_file(number: int) -> str:
    return f"stream_{number:02d}.pt"


def files_of(numbers: Sequence[int], streams: int) -> list[str]:
    """Names of the files of a checkpoint with these branches and so many streams."""
    return [RUN, *(branch_file(k) for k in numbers), *(stream_file(s) for s in range(streams))]


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a folder in the order of their steps.  Raises UserError where the disk cannot be read."""
    return sorted((path for path in _entries(folder) if re.fullmatch(r"step_\d+", path.name)), key=step_of)


def _entries(folder: Path) -> list[Path]:
    with reading(folder):
        try:
            return list(folder.iterdir())  # glob would take a folder that cannot be read for an empty one
        except FileNotFoundError:
            return []


def read(folder: Path, name: str) -> State:
    """One file of a checkpoint onto the CPU, tensors and plain values only.

    Raises UserError where there is none or it cannot be read.
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
    """What run.pt of a checkpoint holds.  Raises UserError as `read` does, and where the format is another one."""
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
    """State of an `Ensemble` of these branches as they were validated: the EMA of the weights where there is one."""
    branches = [read(folder, branch_file(k)) for k in numbers]
    return {
        f"branches.{i}.{key}": value
        for i, branch in enumerate(branches)
        for key, value in (branch["ema"] if "ema" in branch else branch["network"]).items()
    }


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: a file that is missing or differs from its checksums; None: it is good.

    Raises UserError where the disk cannot be read, which says nothing about the checkpoint, and for another format.
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
    """What is wrong with one file of a checkpoint; None: it is good.  Raises OSError where the disk cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except (FileNotFoundError, NotADirectoryError):
        return f"{path.name} is missing"
    except OSError as error:
        if error.errno != errno.EINVAL:  # a damaged archive points before its own beginning
            raise
        return f"{path.name}: {error}"
    except Exception as error:  # damaged bytes can make zipfile raise anything
        return f"{path.name}: {error}"
    return record and f"{path.name}: {record} differs from its checksum"


def latest(folder: Path) -> Path | None:
    """The newest good checkpoint of a run; None where there are none at all.

    Logs which ones are damaged.  Raises UserError where all are, and where the disk cannot be read.
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
    """The checkpoint of a run that is meant by "last" (the newest good one), "best" or a step; it is good.

    Raises UserError where there is none, which names those there are, and where it is damaged.
    """
    if which == "last":
        path = latest(folder)
        if path is None:
            raise UserError(f"{folder}: no checkpoint yet")
        return path
    steps = [step_of(path) for path in saved(folder)]
    there = f"there are those of steps {', '.join(map(str, steps))}" if steps else "there are none yet"
    if which == "best":
        step = best_step(folder)
        if not step:
            raise UserError(f"{folder}: no best checkpoint, since nothing has been validated yet; {there}")
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
        raise UserError(f"{path}: this checkpoint is damaged: {wrong}; {there}")
    return path


def best_step(folder: Path) -> int:
    """Step of the best validation, as the newest checkpoint with a good run.pt has it; 0: none yet."""
    with reading(folder):
        for path in reversed(saved(folder)):
            if damage_of_file(path / RUN) is None:
                step: int = read_run(path)["progress"]["best_step"]
                return step
    return 0


def on_host(state: Any) -> Any:
    """A copy on the CPU that later steps do not change."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: on_host(value) for key, value in state.items()}
    return [on_host(value) for value in state] if isinstance(state, list | tuple) else state


def link(folder: Path, last: Path, best: int) -> None:
    """Points the links `last` and `best` to a checkpoint and the one of step `best` (0: none), for people to use.

    A folder in the place of a link comes from a copy of the run and is set aside.  File systems without links do
    without.
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
    """Sets aside what a killed run left half written, and the checkpoints later than the one that is resumed."""
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
