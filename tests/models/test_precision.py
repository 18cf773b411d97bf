"""What `train.precision` means on a device."""

from __future__ import annotations

import pytest
import torch

from bandsplit.models.precision import Precision


@pytest.mark.parametrize(
    ("name", "device", "dtype", "half"),
    [
        ("auto", "cpu", torch.float32, False),
        ("auto", "cuda", torch.bfloat16, True),
        ("fp32", "cuda", torch.float32, False),
        ("tf32", "cuda", torch.float32, False),
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


def test_tf32_is_used_only_where_asked() -> None:
    for name, allowed in (("fp32", (False, False)), ("tf32", (True, True)), ("auto", (True, False))):
        Precision(name, torch.device("cpu")).apply()
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == allowed
