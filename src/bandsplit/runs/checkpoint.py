"""Checkpoints that are whole or not there: a folder a step, a file a branch, written in the background.

    checkpoints/step_00000026/run.pt            config, progress, losses since the last line of metrics
                              branch_00.pt …    weights, optimizer and loss scale of one branch, whoever trained it
                              stream_00.pt …    position of one stream of images
    checkpoints/last, best                      links to such folders

Every rank writes its own files. Each carries the CRC-32 of every record, as zip archives do, and is read back once
before the folder gets its name.
"""

from __future__ import annotations

import shutil
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from bandsplit.errors import UserError

State = dict[str, Any]

RUN = "run.pt"


def branch_file(number: int) -> str:
    return f"branch_{number:02d}.pt"


def stream_file(number: int) -> str:
    return f"stream_{number:02d}.pt"


def files_of(numbers: Sequence[int], streams: int) -> list[str]:
    """Names of the files of a checkpoint with these branches and so many streams."""
    return [RUN, *(branch_file(k) for k in numbers), *(stream_file(s) for s in range(streams))]


def read(folder: Path, name: str) -> State:
    """One file of a checkpoint onto the CPU, tensors and plain values only.

    Raises UserError where there is none or it cannot be read.
    """
    path = folder / name
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    try:
        state: State = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: this checkpoint cannot be read: {error}") from error
    return state


def read_ensemble(folder: Path, numbers: Sequence[int]) -> State:
    """State of an `Ensemble` of these branches as they were validated: running means of the weights where there are."""
    branches = [read(folder, branch_file(k)) for k in numbers]
    return {
        f"branches.{i}.{key}": value
        for i, branch in enumerate(branches)
        for key, value in (branch["ema"] if "ema" in branch else branch["network"]).items()
    }


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: a file that is missing or differs from its checksums; None: it is good."""
    wrong = _damage_of_file(folder / RUN)
    if wrong:
        return wrong
    run = read(folder, RUN)
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(_damage_of_file, [folder / name for name in files_of(run["branches"], run["streams"])])
        return next((wrong for wrong in found if wrong), None)


def _damage_of_file(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except FileNotFoundError:
        return f"{path.name} is missing"
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        return f"{path.name}: {error}"
    return record and f"{path.name}: {record} differs from its checksum"


def latest(folder: Path) -> Path | None:
    """The newest good checkpoint of a run; None where there are none at all.

    Says which ones are damaged.  Raises UserError where all are.
    """
    found = sorted(folder.glob("step_*"), reverse=True)
    for path in found:
        wrong = damage(path)
        if wrong is None:
            return path
        logger.warning("{} is damaged ({}) and will not be used", path, wrong)
    if found:
        raise UserError(f"{folder}: every checkpoint is damaged; to start over, remove them or name another --run-dir")
    return None


def on_host(state: Any) -> Any:
    """A copy on the CPU that later steps do not change."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: on_host(value) for key, value in state.items()}
    return [on_host(value) for value in state] if isinstance(state, list | tuple) else state


def clean_up(folder: Path, resumed: Path | None) -> None:
    """Removes what a killed run left half written, and damaged checkpoints later than the one that is resumed."""
    for path in folder.glob(".step_*"):
        shutil.rmtree(path)
    for path in folder.glob("step_*"):
        if resumed is None or path.name > resumed.name:
            shutil.rmtree(path)
