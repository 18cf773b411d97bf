"""A profiled window: its steps are in the trace and no others, and the run computes the same."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from loguru import logger

from bandsplit.runs.metrics import Stopwatch
from bandsplit.training.profile import Profile
from tests.compare import assert_same_run
from tests.conftest import run


def steps_of(trace: Path) -> set[str]:
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return {event["name"] for event in events if event["name"].startswith("step ")}


@pytest.mark.slow
def test_a_profiled_run_is_the_same_run(config_file: Path, finished: Callable[..., Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = run("train.py", config_file, "--run-dir", run_dir, "--set", "train.profile=[5, 7]")
    assert done.returncode == 0, done.stderr
    assert_same_run(run_dir, finished(1))
    assert steps_of(run_dir / "profile/steps_5-7.json.gz") == {"step 5", "step 6", "step 7"}
    log = (run_dir / "logs/rank0.log").read_text()
    assert "aten::convolution_backward" in log[log.index("profile of steps 5 to 7") :]


@pytest.fixture
def logged() -> Iterator[list[str]]:
    lines: list[str] = []
    number = logger.add(lines.append, format="{message}")
    yield lines
    logger.remove(number)


@pytest.mark.parametrize(
    ("steps", "error", "written"),
    [(range(1, 9), None, "3-5"), (range(4, 9), None, "4-5"), (range(1, 5), None, "3-4"), (range(1, 5), KeyError, None)],
    ids=["whole", "resumed within", "ended within", "interrupted within"],
)
def test_the_steps_of_the_window_that_a_launch_takes(
    tmp_path: Path, logged: list[str], steps: range, error: type[Exception] | None, written: str | None
) -> None:
    profile = Profile((3, 5), tmp_path, Stopwatch(), torch.device("cpu"))
    with pytest.raises(error) if error else nullcontext(), profile:
        for step in steps:
            with profile.step(step):
                torch.ones(8, 8) @ torch.ones(8, 8)
        if error:
            raise error
    assert [path.name for path in tmp_path.iterdir()] == ([f"steps_{written}.json.gz"] if written else [])
    if written:
        first, last = map(int, written.split("-"))
        assert steps_of(tmp_path / f"steps_{written}.json.gz") == {f"step {step}" for step in range(first, last + 1)}
        (row,) = [line for line in "".join(logged).splitlines() if line.startswith("  aten::mm ")]
        assert int(row.split()[1]) == last - first + 1
