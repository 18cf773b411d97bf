"""The rank mesh: data-parallel replicas x branch groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from bandsplit.distributed.ranks import Ranks


class Mesh:
    """Data-parallel replicas x branch groups.

    Ranks of one replica hold different branches and exchange the bands of their images. Ranks of one branch group hold
    the same branches and all-reduce their gradients. Rank r is in replica r // branch_groups and in branch group
    r % branch_groups, so bands are exchanged between consecutive ranks, which are usually on one node.

    `branches` and the number of ranks must be multiples of `branch_groups`. With several ranks, every rank constructs
    the mesh, because that creates process groups.
    """

    def __init__(self, ranks: Ranks, branches: int, branch_groups: int = 1) -> None:
        self.ranks, self.branches, self.branch_groups = ranks, branches, branch_groups
        self.replicas = ranks.world_size // branch_groups
        """Number of replicas: ranks that train the same branch."""
        count = branches // branch_groups
        first = ranks.rank % branch_groups * count
        self.own = range(first, first + count)
        """Indices, among the branches of the run, of those that this rank trains."""
        self.exchange_group: Any = None
        """Process group of this rank's replica, for the exchange of bands; None with one rank."""
        self.data_group: Any = None
        """Process group of the ranks that train the same branches; None with one rank."""
        self._neighbors: dict[int, Any] = {}
        if ranks.world_size > 1:
            names = ("data", "branch")
            mesh = init_device_mesh(ranks.device.type, (self.replicas, branch_groups), mesh_dim_names=names)
            self.data_group, self.exchange_group = (mesh.get_group(name) for name in names)
            for group in (self.data_group, self.exchange_group):
                dist.set_timeout(ranks.timeout, group)

    @property
    def replica(self) -> int:
        """Index of this rank's replica."""
        return self.ranks.rank // self.branch_groups

    def neighbors(self, count: int) -> Any:
        """Process group of `count` consecutive replicas of this rank's branches, this rank included.

        `count` must divide `replicas`. Every rank must call it, with the same `count`. Cached.
        """
        if count not in self._neighbors:
            first = range(0, self.replicas, count)
            sets = [
                [(r + i) * self.branch_groups + b for i in range(count)]
                for b in range(self.branch_groups)
                for r in first
            ]
            self._neighbors[count], _ = dist.new_subgroups_by_enumeration(sets, timeout=self.ranks.timeout)
        return self._neighbors[count]

    def replicate(self, branch: nn.Module) -> nn.Module:
        """Wraps a branch in DistributedDataParallel over its replicas; returns it unchanged with one replica.

        Buffers are not synchronized in training, which does not read the running statistics of batch norm.
        `mean_buffers` averages them for validation and checkpoints.
        """
        if self.replicas == 1:
            return branch
        ids = [self.ranks.device.index] if self.ranks.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            branch,
            device_ids=ids,
            process_group=self.data_group,
            gradient_as_bucket_view=True,
            forward_sync_buffers=False,
        )

    @contextmanager
    def mean_buffers(self, module: nn.Module) -> Iterator[None]:
        """Context in which the floating-point buffers of `module` are averaged over the replicas.

        Every replica enters it; each rank's own values are restored at the end, after an error too. As all
        replicas have the same batch size, the mean of their running means is the running mean over the images of all
        replicas.
        """
        buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        if self.replicas == 1 or not buffers:
            yield
            return
        own = [buffer.clone() for buffer in buffers]
        together = torch.cat([buffer.flatten() for buffer in buffers])
        dist.all_reduce(together, group=self.data_group)
        together /= self.replicas
        for buffer, mean in zip(buffers, torch.split(together, [buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(mean.view_as(buffer))
        try:
            yield
        finally:
            for buffer, before in zip(buffers, own, strict=True):
                buffer.copy_(before)
