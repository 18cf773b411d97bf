"""The mesh of ranks: branch groups x data-parallel replicas."""

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
    """Ranks as a table: a row shares its images, a column its branches.

    Rank r stands in row r // branch_groups, so that a row is a machine's neighbouring ranks.
    """

    def __init__(self, ranks: Ranks, branches: int, branch_groups: int = 1) -> None:
        self.ranks, self.branches, self.branch_groups = ranks, branches, branch_groups
        self.replicas = ranks.world_size // branch_groups
        """Ranks that train the same branch."""
        count = branches // branch_groups
        first = ranks.rank % branch_groups * count
        self.own = range(first, first + count)
        """Branches that this rank trains, counted within the run."""
        self.exchange_group: Any = None
        self.data_group: Any = None
        self._neighbours: dict[int, Any] = {}
        if ranks.world_size > 1:
            names = ("data", "branch")
            mesh = init_device_mesh(ranks.device.type, (self.replicas, branch_groups), mesh_dim_names=names)
            self.data_group, self.exchange_group = (mesh.get_group(name) for name in names)
            for group in (self.data_group, self.exchange_group):
                dist.set_timeout(ranks.timeout, group)

    @property
    def replica(self) -> int:
        return self.ranks.rank // self.branch_groups

    def neighbours(self, count: int) -> Any:
        """Process group of `count` ranks that follow each other in a column; every rank has to ask for it."""
        if count not in self._neighbours:
            first = range(0, self.replicas, count)
            sets = [
                [(r + i) * self.branch_groups + b for i in range(count)]
                for b in range(self.branch_groups)
                for r in first
            ]
            self._neighbours[count], _ = dist.new_subgroups_by_enumeration(sets, timeout=self.ranks.timeout)
        return self._neighbours[count]

    def replicate(self, branch: nn.Module) -> nn.Module:
        """Wraps one branch so that its gradients are averaged over its column while backward runs.

        Buffers are not exchanged: training never reads the running statistics of batch normalisation, and
        `mean_buffers` averages them before anything is validated or saved.
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
        """Inside, buffers are their mean over the column; afterwards each rank has its own again.

        A running mean of means is the mean of running means, so that statistics count the images of all ranks.
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
        yield
        for buffer, before in zip(buffers, own, strict=True):
            buffer.copy_(before)
