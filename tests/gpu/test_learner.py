"""A training step on a GPU: the host does not wait for it, and gradients that are not finite change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bandsplit.config import loading
from bandsplit.distributed.mesh import Mesh
from bandsplit.distributed.ranks import Ranks
from bandsplit.models.precision import Precision
from bandsplit.training import optimizers
from bandsplit.training.learner import Learner
from bandsplit.training.meter import Meter
from tests.training.test_learner import OPTIMIZERS, Trap
from tests.training.tiny import batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("waiting_is_an_error")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_host_does_not_wait(config_file: Path, name: str, policy: str, precision: str) -> None:
    device = torch.device("cuda", 0)
    keys = [f"train.on_nonfinite={policy}", f"train.precision={precision}", "train.ema_decay=0.9", *OPTIMIZERS[name]]
    config = loading.load(config_file, keys)
    mesh, trap = Mesh(Ranks(0, 1, 0, 1, device), 1), Trap().to(device)
    learner = Learner(trap, config, Precision(precision, device), mesh, optimizers.make_ema(trap, config))
    meter, (x, y) = Meter(mesh, config), (t.to(device) for t in batch())
    learner.step([x], [y], lr=0.1)  # allocates the loss scale
    for step, trap.armed in enumerate([False, True, False], 2):
        before = [p.detach().clone() for p in trap.parameters()]
        torch.cuda.set_sync_debug_mode("error")
        outcome = learner.step([x], [y], lr=0.1)
        meter.note(0, outcome, step)
        torch.cuda.set_sync_debug_mode("default")
        same = all(torch.equal(a, b) for a, b in zip(trap.parameters(), before, strict=True))
        assert same == (not outcome.taken)
        assert not (trap.armed and outcome.taken)
    assert bool(learner.finite())
