"""A checkpoint is whole or not there; last and best stay."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bandsplit import checkpoint
from bandsplit.errors import UserError


def state(value: float) -> checkpoint.State:
    return {"weights": {"w": torch.full((3,), value)}, "loader": b"\x00state", "progress": {"step": 1}, "none": None}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 3, state(1.5), best=False)
    loaded = checkpoint.load(tmp_path / "last.pt")
    assert torch.equal(loaded["weights"]["w"], torch.full((3,), 1.5))
    assert (loaded["loader"], loaded["progress"], loaded["none"]) == (b"\x00state", {"step": 1}, None)


def test_last_and_best_are_kept_and_nothing_else(tmp_path: Path) -> None:
    for step, best in ((1, True), (2, False), (3, True), (4, False), (5, False)):
        checkpoint.save(tmp_path, step, state(step), best)
    assert names(tmp_path) == {"step_00000003.pt", "step_00000005.pt", "last.pt", "best.pt"}
    assert checkpoint.load(tmp_path / "best.pt")["weights"]["w"][0] == 3
    assert checkpoint.load(tmp_path / "last.pt")["weights"]["w"][0] == 5


@pytest.mark.parametrize("dies_in", ["fsync", "replace"])
def test_a_kill_while_writing_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    checkpoint.save(tmp_path, 1, state(1), best=True)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", die) if dies_in == "fsync" else patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 2, state(2), best=True)
    assert checkpoint.load(tmp_path / "last.pt")["weights"]["w"][0] == 1
    checkpoint.save(tmp_path, 3, state(3), best=True)
    assert names(tmp_path) == {"step_00000003.pt", "last.pt", "best.pt"}


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="last.pt: no such checkpoint"):
        checkpoint.load(tmp_path / "last.pt")
    path = checkpoint.save(tmp_path, 1, state(1), best=False)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="last.pt: this checkpoint cannot be read"):
        checkpoint.load(tmp_path / "last.pt")
