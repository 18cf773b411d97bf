"""Schedule and precision against torch's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bandsplit import recipe, schema
from bandsplit.recipe import Precision


def test_the_schedule_is_torchs_linear_warmup_and_cosine(config_file: Path) -> None:
    steps = 7
    keys = ["train.epochs=6", "schedule.warmup_epochs=2", "schedule.lr_min=0.001", "optim.lr=0.3"]
    config = schema.load(config_file, keys)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 14, total_iters=13)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=28, eta_min=0.001)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[14])
    for step in range(6 * steps):
        assert recipe.lr_at(step, steps, config) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        schedule.step()


def test_without_warmup_it_starts_at_the_peak(config_file: Path) -> None:
    config = schema.load(config_file, ["schedule.warmup_epochs=0", "optim.lr=0.3"])
    assert recipe.lr_at(0, 10, config) == 0.3
    assert 0 < recipe.lr_at(19, 10, config) < 0.01


@pytest.mark.parametrize(
    ("name", "device", "dtype", "half"),
    [
        ("auto", "cpu", torch.float32, False),
        ("auto", "cuda", torch.bfloat16, True),
        ("fp32", "cuda", torch.float32, False),
        ("fp16", "cuda", torch.float16, True),
        ("bf16", "cpu", torch.bfloat16, False),
    ],
)
def test_precision_by_device(name: str, device: str, dtype: torch.dtype, half: bool) -> None:
    precision = Precision(name, torch.device(device))
    assert (precision.dtype, precision.half_bands) == (dtype, half)


def test_autocast_computes_in_the_chosen_type() -> None:
    layer, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with Precision(name, torch.device("cpu")).autocast():
            assert layer(x).dtype == dtype
