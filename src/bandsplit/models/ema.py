"""Exponential moving average (EMA) of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class EMA(nn.Module):
    """EMA of a network's weights and floating-point buffers, held in `module`, a copy of the network.

    The first update copies the network; each later one sets EMA = decay * EMA + (1 - decay) * network.
    """

    updates: Tensor
    """Number of updates, an int64 scalar on the network's device."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.module, self._decay = copy.deepcopy(network), decay
        device = next(network.parameters()).device
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def update(self, network: nn.Module, condition: Tensor) -> None:
        """Updates the EMA if `condition`, a bool scalar on the device, is true; does not synchronize with the host."""
        weight = torch.where(self.updates == 0, 1.0, 1 - self._decay) * condition
        own, theirs = _floats(self.module), _floats(network)
        torch._foreach_lerp_(own, theirs, [weight.to(x.dtype) for x in own])
        self.updates += condition


def _floats(network: nn.Module) -> list[Tensor]:
    """Weights and floating-point buffers. The only others are batch counters, which batch norm does not read."""
    return [x for x in (*network.parameters(), *network.buffers()) if x.is_floating_point()]
