"""The demo's first steps against stored values, to detect unintended changes of results.

Bit-equal on the platform that produced the values.  Elsewhere sums are rounded differently, and training amplifies this
about tenfold per step: with AVX2, SSE4.1, two threads or the split in plain torch on one machine, losses of single
branches agree to 4e-4 in the first three steps, and mean losses of an epoch to 1.5 %.

If results are meant to change: python -m tests.training.test_golden
"""

from __future__ import annotations

import hashlib
import json
import signal
import statistics
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from bandsplit.spectral import native
from tests.compare import metrics, wait_for
from tests.conftest import REPOSITORY, Launch

STORED = REPOSITORY / "tests/golden/demo.json"
STEPS = 36  # an epoch of 31, in which the learning rate rises, and five of the next
PACKAGES = ("torch", "torchvision", "numpy", "pillow")
CPU = ("vendor_id", "cpu family", "model", "stepping", "cache size", "flags")


def platform() -> dict[str, str]:
    """Everything known to affect the rounding of floating-point sums."""
    processor, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    lines = dict(map(str.strip, line.split(":", 1)) for line in processor.splitlines())
    compiler = subprocess.run([*(native._find_cxx() or ["true"]), "--version"], capture_output=True, text=True).stdout
    dali = next(name for name in metadata.packages_distributions()["nvidia"] if name.startswith("nvidia-dali-"))
    return {
        "cpu": hashlib.sha256(repr([lines.get(key) for key in CPU]).encode()).hexdigest(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "compiler": compiler.partition("\n")[0],
        **{name: metadata.version(name) for name in (*PACKAGES, dali)},
    }


def first_steps(folder: Path) -> list[dict[str, Any]]:
    """Draws the images and trains the shipped demo config for so many steps; returns the metrics."""
    run_dir = folder / "run"
    sets = (f"data.root={folder / 'images'}", "train.log_every=1", f"checkpoint.every_steps={STEPS}")
    launch = Launch("train.py", "--run-dir", run_dir, *(word for key in sets for word in ("--set", key)))
    wait_for(run_dir / f"checkpoints/step_{STEPS:08d}", launch, seconds=300)
    launch.signal(signal.SIGTERM)
    assert launch.wait().returncode == 128 + signal.SIGTERM
    return [line for line in metrics(run_dir) if line["step"] <= STEPS]


def mean_loss(lines: list[dict[str, Any]]) -> float:
    return statistics.fmean(line["loss"] for line in lines if line["event"] == "train")


@pytest.mark.slow
def test_the_first_steps_of_the_demo_are_the_stored_ones(tmp_path: Path) -> None:
    stored = json.loads(STORED.read_text())
    lines, wanted = first_steps(tmp_path), stored["lines"]
    if platform() == stored["platform"]:
        assert lines == wanted
    for line, want in zip(lines, wanted, strict=True):
        for key in ("event", "step", "images", "lr", "image_size", "val_images"):
            assert line.get(key) == want.get(key)
        if line["step"] <= 3:
            assert line["branch_loss"] == pytest.approx(want["branch_loss"], rel=1e-3)
    assert mean_loss(lines) == pytest.approx(mean_loss(wanted), rel=0.05)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        rows = ",\n".join(map(json.dumps, first_steps(Path(temporary))))
    STORED.parent.mkdir(exist_ok=True)
    STORED.write_text(f'{{"platform": {json.dumps(platform(), indent=1)}, "lines": [\n{rows}\n]}}\n')
