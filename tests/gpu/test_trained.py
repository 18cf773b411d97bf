"""Distillation, mixing and progressive image size together on a GPU, where batches are made on a separate stream."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bandsplit.models.precision import Precision
from bandsplit.runs.restored import Restored, Teacher

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("block", [1, 4])
def test_a_student_learns_at_every_precision(finished: Callable[..., Path], block: int, precision: str) -> None:
    keys = [f"distillation.teacher={finished(1)}", "mix.mixup=0.4", "mix.cutmix=1.0", f"split.block={block}"]
    keys += ["augment.progressive={min_size=16, ramp_end=1, multiple=4}", f"train.precision={precision}"]
    lines = [json.loads(line) for line in (finished(1, *keys) / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if line["event"] == "train"]
    assert all(math.isfinite(loss) for line in losses for loss in line["branch_loss"])
    assert [line["image_size"] for line in losses] == [16] * 4 + [32] * 4


def test_a_teacher_gives_the_same_logits_on_a_gpu(finished: Callable[..., Path]) -> None:
    inputs, said = [torch.randn(8, 3, 16, 16) for _ in range(4)], []
    for device in ("cpu", "cuda"):
        precision = Precision("fp32", torch.device(device))
        precision.apply()
        teacher = Teacher(Restored.of(finished(1), "best"), precision)
        on_device = [x.to(device).to(memory_format=torch.channels_last) for x in inputs]
        said.append(teacher.logits(on_device).cpu())
    torch.testing.assert_close(said[0], said[1], rtol=1e-3, atol=1e-3)
