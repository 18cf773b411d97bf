"""Exponential moving average (EMA) of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class EMA(nn.Module):
    """EMA of a network's weights and buffers, kept in a network of its own, `module`.

    The first update copies the network; each later one is decay · EMA + (1 - decay) · network.
    """

    updates: Tensor

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.module, self._decay = copy.deepcopy(network), decay
        device = next(network.parameters()).device
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def update(self, network: nn.Module, condition: Tensor) -> None:
        """Updates where `condition` holds, a bool scalar on the device; the host does not wait for it."""
        weight = torch.where(self.updates == 0, 1.0, 1 - self._decay) * condition
        own, theirs = _floats(self.module), _floats(network)
        torch._foreach_lerp_(own, theirs, [weight.to(x.dtype) for x in own])
        self.updates += condition


def _floats(network: nn.Module) -> list[Tensor]:
    """Weights and buffers, without those that count batches: batch norm does not read them."""
    return [x for x in (*network.parameters(), *network.buffers()) if x.is_floating_point()]
