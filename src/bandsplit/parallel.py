"""Ranks: one process a GPU (or several on a CPU), started by torchrun or alone."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_DDP_PARAMETERS = inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_PARAMETERS else "broadcast_buffers"


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among all."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def replicate(self, branch: nn.Module) -> nn.Module:
        """Wraps one branch so that its gradients are averaged over the ranks while backward runs.

        Buffers are not exchanged: training never reads the running statistics of BatchNorm, and `share_buffers`
        hands out those of rank 0, which checkpoints keep, before anything is validated.
        """
        if self.world_size == 1:
            return branch
        ids = [self.device.index] if self.device.type == "cuda" else None
        buffers: dict[str, Any] = {_SYNC_BUFFERS: False}  # older versions of torch have another name for it
        return nn.parallel.DistributedDataParallel(branch, device_ids=ids, gradient_as_bucket_view=True, **buffers)

    def share_buffers(self, module: nn.Module) -> None:
        """Gives every rank the buffers of rank 0."""
        if self.world_size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def sum(self, counts: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(counts)
        return counts

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def synchronize(self) -> None:
        """Until the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def world_size() -> int:
    """Number of ranks that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def ranks() -> Iterator[Ranks]:
    """Joins the other ranks (NCCL on GPUs, gloo on CPUs) and leaves them again at the end."""
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size() > 1:
        on_gpu = device.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    try:
        yield Ranks(rank, world_size(), local_rank, local_world_size, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
