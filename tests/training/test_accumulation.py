"""`train.grad_accum_steps = "auto"`: the smallest number whose parts fit, found once and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bandsplit.config import loading
from bandsplit.errors import UserError
from bandsplit.training import accumulation, memory
from bandsplit.training.learner import Learner
from tests.conftest import Done
from tests.training.tiny import ALONE, FP32

AUTO = ["train.grad_accum_steps=auto"]


def with_memory(patch: pytest.MonkeyPatch, total: float) -> None:
    """A machine on which tensors may take `total` bytes."""
    patch.setattr(accumulation, "available_bytes", lambda: int(total / accumulation.SHARE) + 1)


@pytest.mark.parametrize("keys", [[], ["model.bn_batch_size=4"]])
def test_the_smallest_number_whose_estimate_fits(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, keys: list[str]
) -> None:
    """With batch norm over 4 images, parts have 4 or a multiple."""
    config = loading.load(
        config_file, [*AUTO, *keys, "train.batch_size=8", "data.image_size=64", "data.resize_size=64"]
    )
    numbers = [1, 2] if keys else [1, 2, 4]
    needed = {n: memory.estimate(c, 1, 1, FP32).total for n in numbers for c in [accumulated(config, n)]}
    assert sorted(needed.values(), reverse=True) == [needed[n] for n in numbers]  # more steps need less
    for n, total in needed.items():
        with_memory(monkeypatch, total)
        assert accumulation.by_estimate(config, 1, 1, FP32) == n
    with_memory(monkeypatch, min(needed.values()) / 2)
    with pytest.raises(UserError, match="not even the smallest part of a batch fits into memory; allowed: "):
        accumulation.with_steps(config, ALONE, FP32)


def accumulated(config: Any, steps: int) -> Any:
    return config.with_values({"train": {"grad_accum_steps": steps}})


def test_a_step_is_tried_without_a_trace(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: parts of more than 5 images run out of memory; random numbers go on as before."""
    step = Learner.step

    def with_little_memory(self: Learner, inputs: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        if len(inputs[0]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, inputs, *args, **kwargs)

    monkeypatch.setattr(Learner, "step", with_little_memory)
    config = loading.load(config_file, [*AUTO, "train.batch_size=12", "model.drop_path=0.1"])
    before = torch.get_rng_state()
    fitting = {n: accumulation._step_succeeds(accumulated(config, n), ALONE, FP32) for n in (1, 2, 3, 4)}
    assert fitting == {1: False, 2: False, 3: True, 4: True}
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_a_run_keeps_the_number(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_here: Callable[..., Done]
) -> None:
    """Resumed where there is more memory, it has the same parts."""
    config, run_dir = loading.load(config_file), tmp_path / "run"
    arguments = [config_file, "--run-dir", run_dir, "--set", AUTO[0], "--set", "train.epochs=1"]
    with_memory(monkeypatch, memory.estimate(accumulated(config, 3), 1, 1, FP32).total)
    done = run_here("train.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "train.grad_accum_steps = 3, found by memory: 4 images at once" in done.stderr
    assert loading.load(run_dir / "config.toml").train.grad_accum_steps == 3
    with_memory(monkeypatch, 2**40)
    resumed = run_here("train.py", *arguments, "--resume")
    assert "is finished" in resumed.stderr
    other = run_here(
        "train.py", *arguments[:-4], "--set", "train.epochs=1", "--resume", "--set", "train.grad_accum_steps=2"
    )
    assert "train.grad_accum_steps was 3, now 2" in other.stderr
    planned = run_here("train.py", *arguments, "--dry-run")
    assert "train.grad_accum_steps = 'auto': accumulation by the memory of this machine" in planned.stdout
