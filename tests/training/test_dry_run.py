"""The dry run makes the same choices as the run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tomli_w
import torch

from bandsplit.config import loading
from bandsplit.models.precision import Precision
from bandsplit.runs.directory import resolved
from bandsplit.training import dry_run

# 4 ranks, where bands in float16 make 4 groups the cheapest, and bands in float32 plain data parallelism
EITHER = ["train.batch_size=40", "data.image_size=252", "data.resize_size=252"]


def chosen(output: str) -> int:
    return int(re.findall(r"^ +\* +(\d+)", output, re.MULTILINE)[0])


@pytest.mark.parametrize("precision", ["auto", "fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("planned", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_branch_groups_are_those_of_the_run(
    config_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    planned: bool,
) -> None:
    """For every precision, on planned GPUs and on this machine."""
    config = loading.load(config_file, [*EITHER, f"train.precision={precision}"])
    on_gpu = planned or torch.cuda.is_available()
    half = Precision(precision, torch.device("cuda" if on_gpu else "cpu")).half_bands
    assert half == (on_gpu and precision in ("auto", "bf16", "fp16"))
    monkeypatch.setenv("WORLD_SIZE", "4")
    dry_run.show(config, 4 if planned else None)
    output = capsys.readouterr().out
    assert chosen(output) == (4 if half else 1)
    device = "GPU" if torch.cuda.is_available() else "GPU (assumed with --world-size)" if planned else "CPU"
    assert f"device    {device}, train.precision = {precision!r}: " in output
    assert f"bands in float{16 if half else 32}" in output
    differs = precision in ("auto", "bf16", "fp16")
    other = f"on {'CPUs' if on_gpu else 'GPUs'}, with bands in float{32 if half else 16}: {1 if half else 4} groups"
    assert (other in output) == differs


def test_the_teacher_costs_what_the_images_of_the_run_cost(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same networks on the same images: the same multiplications, whatever the teacher was trained on."""
    teacher = loading.load(config_file, ["data.image_size=64", "data.resize_size=64"]).with_classes(10)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").write_text(tomli_w.dumps(resolved(teacher)))
    large = ["data.image_size=256", "data.resize_size=256"]
    dry_run.show(loading.load(config_file, [*large, f"distillation.teacher={tmp_path / 'run'}"]))
    output = capsys.readouterr().out
    (own,) = re.findall(r"^compute +([\d.]+) GMACs", output, re.MULTILINE)
    (teachers,) = re.findall(r"^teacher .*: ([\d.]+) GMACs per image forward", output, re.MULTILINE)
    assert float(own) == float(teachers) > 0
