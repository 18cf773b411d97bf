"""A network with batch norm and a batch for it, on one rank and the CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bandsplit.distributed.mesh import Mesh
from bandsplit.distributed.ranks import Ranks
from bandsplit.models.precision import Precision

ALONE = Mesh(Ranks(0, 1, 0, 1, torch.device("cpu")), 1)
FP32 = Precision("fp32", ALONE.ranks.device)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
    )


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randint(0, 5, (8,), generator=generator)
