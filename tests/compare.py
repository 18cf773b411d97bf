"""Helpers to compare run directories and to wait for files in them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from bandsplit.runs import checkpoint
from tests.conftest import Launch

VOLATILE = {"seconds", "images_per_second", "data_wait", "peak_memory_mib", "validation_seconds"}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without values that depend on timing."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in VOLATILE} for line in lines]


def assert_same_run(first: Path, second: Path) -> None:
    """Metrics and all tensors of the last and the best checkpoint are bit-equal."""
    assert metrics(first) == metrics(second)
    for name in ("last", "best"):
        a, b = (run_dir / "checkpoints" / name for run_dir in (first, second))
        assert a.resolve().name == b.resolve().name
        files = {path.name for path in a.iterdir() if path.name.startswith("branch")}
        assert files == {path.name for path in b.iterdir() if path.name.startswith("branch")}
        for file in files:
            assert_equal(checkpoint.read(a, file), checkpoint.read(b, file))


def wait_for(path: Path, launch: Launch, seconds: float = 120) -> None:
    """Waits until a file or folder exists."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert launch.running, f"ended before {path} was there: {launch.wait().stderr}"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def assert_equal(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b
