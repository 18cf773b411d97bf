"""Exchange of bands and logits between the branch groups of a replica."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from bandsplit.distributed.mesh import Mesh


class Exchange:
    """Sends bands to the ranks that train them and logits back, within a replica.

    One `all_to_all_single` per batch, on a CUDA stream of its own.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        on_gpu = mesh.ranks.device.type == "cuda"
        self._stream = torch.cuda.Stream(mesh.ranks.device) if on_gpu else None  # type: ignore[no-untyped-call]

    def on_side_stream(self) -> Any:
        """Context in which a batch is made and sent while the device computes."""
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def send(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Transfer:
        """Starts to send inputs of all branches, (B, channels, h, w) each, and targets, (B, …) each."""
        g, group = self._mesh.branch_groups, self._mesh.exchange_group
        flat = [rearrange(x, "b c h w -> (b h w c)") for x in inputs]
        count = len(inputs) // g
        sizes = [sum(len(x) for x in flat[d * count : (d + 1) * count]) for d in range(g)]
        own = [inputs[k] for k in self._mesh.own]
        sent = torch.cat(flat)
        received = sent.new_empty(g * sum(x.numel() for x in own))
        targets = [target.contiguous() for target in targets]
        gathered = [target.new_empty(g * len(target), *target.shape[1:]) for target in targets]
        works = [
            dist.all_to_all_single(received, sent, [len(received) // g] * g, sizes, group=group, async_op=True),
            *(
                dist.all_gather_into_tensor(output, target, group=group, async_op=True)
                for output, target in zip(gathered, targets, strict=True)
            ),
        ]
        return Transfer(works, [sent, *targets], received, gathered, [tuple(x.shape) for x in own], g, self._stream)

    def give_back(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (own branches, B of the replica, classes) -> (all branches, B of this rank, classes); labels too."""
        g = self._mesh.branch_groups
        sent = rearrange(logits, "k (g b) c -> g k b c", g=g).contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._mesh.exchange_group)
        return rearrange(received, "g k b c -> (g k) b c"), labels.chunk(g)[self._mesh.ranks.rank % g]


@dataclass
class Transfer:
    """A batch being sent."""

    works: list[Any]
    sent: list[Tensor]
    received: Tensor
    targets: list[Tensor]
    """Those of the whole replica."""
    shapes: list[tuple[int, ...]]
    """Shapes of the inputs of this rank's branches, for the images of one rank."""
    sources: int
    stream: torch.cuda.Stream | None

    def wait(self) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs of this rank's branches, (B of the replica, channels, h, w) in channels_last each, and targets."""
        for work in self.works:
            work.wait()
        if self.stream is not None:
            current = torch.cuda.current_stream()
            current.wait_stream(self.stream)
            for tensor in (self.received, *self.targets):
                tensor.record_stream(current)
        inputs, start = [], 0
        by_source = self.received.view(self.sources, -1)
        for b, c, h, w in self.shapes:
            x = by_source[:, start : start + b * c * h * w]
            x = rearrange(x, "g (b h w c) -> (g b) h w c", b=b, c=c, h=h, w=w)  # a copy with several branches
            inputs.append(rearrange(x, "b h w c -> b c h w"))
            start += b * c * h * w
        return inputs, self.targets
