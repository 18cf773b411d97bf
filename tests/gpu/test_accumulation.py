"""`train.grad_accum_steps = "auto"` on a GPU: what is tried leaves no trace in the memory that a run reports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bandsplit.config import loading
from bandsplit.distributed.mesh import Mesh
from bandsplit.distributed.ranks import Ranks
from bandsplit.models.precision import Precision
from bandsplit.training import accumulation

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def test_the_peak_of_a_step_that_was_tried_is_forgotten(config_file: Path) -> None:
    device, config = torch.device("cuda", 0), loading.load(config_file)
    mesh = Mesh(Ranks(0, 1, 0, 1, device), len(config.split.groups))
    assert accumulation._step_succeeds(config, mesh, Precision("bf16", device))
    assert torch.cuda.max_memory_reserved(device) == torch.cuda.memory_reserved(device)
