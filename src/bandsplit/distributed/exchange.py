"""Exchange of bands and logits between the ranks of a replica."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from bandsplit.distributed.mesh import Mesh


class Exchange:
    """Sends bands to the ranks whose branches read them, and logits back, within a replica.

    Each rank decodes B images and holds 1/g of the branches, where g is the number of branch groups, so its branches
    train on g * B images. Bands take one `all_to_all_single` per batch, on a separate CUDA stream.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._stream = _side_stream(mesh.ranks.device) if mesh.ranks.device.type == "cuda" else None

    def on_side_stream(self) -> Any:
        """Context in which to prepare and send a batch while the device computes; does nothing on a CPU."""
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def send(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Transfer:
        """Starts sending a batch; call it within `on_side_stream`, on all ranks of the replica.

        Args:
            inputs: (B, channels, h, w) for every branch of the run.
            targets: (B, …) each: labels and, with a teacher, its logits. Every rank receives those of all images.
        """
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
        return Transfer(works, [sent, *targets], received, gathered, [tuple(x.shape) for x in own], g)

    def give_back(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits and labels to the ranks that decoded the images.

        Args:
            logits: (branches of this rank, g * B, classes), for all images of the replica.
            labels: (g * B,).

        Returns:
            logits (all branches, B, classes) and labels (B,), for the images of this rank.
        """
        g = self._mesh.branch_groups
        sent = rearrange(logits, "k (g b) c -> g k b c", g=g).contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._mesh.exchange_group)
        return rearrange(received, "g k b c -> (g k) b c"), labels.chunk(g)[self._mesh.ranks.rank % g]


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for training and validation, since torch keeps freed memory for the stream that it was allocated on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@dataclass
class Transfer:
    """A batch in transit."""

    works: list[Any]
    """Handles of the collectives."""
    sent: list[Tensor]
    """Send buffers, which must outlive the collectives."""
    received: Tensor
    """(g * n,), where n elements come from each rank of the replica."""
    targets: list[Tensor]
    """(g * B, …) each, for all images of the replica."""
    shapes: list[tuple[int, ...]]
    """(B, channels, h, w) for each branch of this rank: the part that one rank sends."""
    sources: int
    """Ranks in the replica, g."""

    def wait(self) -> tuple[list[Tensor], list[Tensor]]:
        """Waits for the batch; on a GPU, makes the current stream wait for the collectives, and for nothing else.

        Returns:
            inputs of this rank's branches, (g * B, channels, h, w) each in channels_last, and targets, (g * B, …) each.
        """
        for work in self.works:
            work.wait()
        if self.received.is_cuda:  # made on the side stream, which must not reuse their memory too early
            current = torch.cuda.current_stream(self.received.device)
            for tensor in (*self.sent, self.received, *self.targets):
                tensor.record_stream(current)
        inputs, start = [], 0
        by_source = self.received.view(self.sources, -1)
        for b, c, h, w in self.shapes:
            x = by_source[:, start : start + b * c * h * w]
            x = rearrange(x, "g (b h w c) -> (g b) h w c", b=b, c=c, h=h, w=w)  # copies if there are several branches
            inputs.append(rearrange(x, "b h w c -> b c h w"))
            start += b * c * h * w
        return inputs, self.targets
