"""Checkpoints that are whole or not there: last and best."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from bandsplit.errors import UserError

State = dict[str, Any]


def save(folder: Path, step: int, state: State, best: bool) -> Path:
    """Writes ``step_<step>.pt``, points ``last.pt`` (and ``best.pt``) to it and removes what neither names.

    A kill at any moment leaves the previous links and the files they name: the new file is complete on disk
    before a link changes, and nothing is removed before that.
    """
    path = folder / f"step_{step:08d}.pt"
    temporary = folder / f".{path.name}.tmp"
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    for name in ("last.pt", *(("best.pt",) if best else ())):
        link = folder / f".{name}.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        link.replace(folder / name)
    _sync_folder(folder)
    keep = {(folder / name).resolve() for name in ("last.pt", "best.pt")}
    for old in [*folder.glob("step_*.pt"), *folder.glob(".*.tmp")]:
        if old.resolve() not in keep:
            old.unlink()
    return path


def _sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path: Path) -> State:
    """Reads a checkpoint onto the CPU, tensors and plain values only.

    Raises UserError where there is none or it cannot be read.
    """
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    try:
        state: State = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: this checkpoint cannot be read: {error}") from error
    return state
