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
    """Branch groups x data-parallel replicas.

    Ranks of one replica hold different branches and exchange bands of their images; ranks of one branch group hold the
    same branches and average their gradients.  Rank r is in replica r // branch_groups and group r % branch_groups, so
    that neighboring ranks, often on one machine, exchange bands.
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
        """Process group of this rank's replica, which exchanges bands; None: one rank."""
        self.data_group: Any = None
        """Process group of the ranks that train the same branches; None: one rank."""
        self._neighbors: dict[int, Any] = {}
        if ranks.world_size > 1:
            names = ("data", "branch")
            mesh = init_device_mesh(ranks.device.type, (self.replicas, branch_groups), mesh_dim_names=names)
            self.data_group, self.exchange_group = (mesh.get_group(name) for name in names)
            for group in (self.data_group, self.exchange_group):
                dist.set_timeout(ranks.timeout, group)

    @property
    def replica(self) -> int:
        """Which of the replicas of its branches this rank is."""
        return self.ranks.rank // self.branch_groups

    def neighbors(self, count: int) -> Any:
        """Process group of this rank and its neighbors, `count` replicas of its branches; every rank calls it."""
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
        """Wraps a branch so that backward averages its gradients over the replicas.

        Buffers are not synchronized: training does not read the running statistics of batch norm, and `mean_buffers`
        averages them for validation and checkpoints.
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
        """Context in which floating-point buffers are their mean over the replicas; afterwards each rank's own again.

        The average of the replicas' running means is the running mean over the images of all of them.
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
