"""Ranks, their mesh (data x branch), and the exchange of bands within a row of it."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from bandsplit.errors import ToldElsewhere, UserError
from bandsplit.schema import RunConfig

T = TypeVar("T")

GRADIENT_BYTES = 4  # gradients are float32 whatever the precision


# ------------------------------------------------------------------------------------------------------- ranks


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among all."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    hosts: Any = None
    """Process group of all ranks that joins their hosts (gloo), whatever joins their devices; None: one rank."""
    timeout: timedelta = timedelta(minutes=5)
    """After which a collective of the devices fails."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, counts: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(counts)
        return counts

    def smallest(self, values: Tensor) -> Tensor:
        """The smallest of each value over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values, dist.ReduceOp.MIN)
        return values

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over all ranks; does not wait for the device."""
        if self.world_size == 1:
            return list(values)
        together = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(together, dist.ReduceOp.MAX, group=self.hosts)
        return together.tolist()

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank, or the UserError it raises there, on every rank."""
        if self.world_size == 1:
            return make()
        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told[0] = make()
            except UserError as error:
                told[1] = error
        dist.broadcast_object_list(told, src=0, group=self.hosts)
        if told[1] is not None:
            told[1].one_rank = False  # now all know it
            raise told[1]
        value: T = told[0]
        return value

    def each(self, make: Callable[[], T]) -> T:
        """What `make` returns on this rank, where it returns on all of them.

        Raises the UserError of the first rank where it does not, on that rank, and ToldElsewhere on the others.
        """
        made, error = None, None
        try:
            made = make()
        except UserError as mistake:
            error = mistake
        (first,) = self.largest([self.world_size - self.rank if error else 0])
        if not first:
            return cast(T, made)
        if error is None or first != self.world_size - self.rank:
            raise ToldElsewhere()
        if not self.is_first:
            error = UserError(f"rank {self.rank} on {socket.gethostname()}: {error}")
            error.one_rank = True
        raise error

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world_size > 1:
            dist.barrier(group=self.hosts)

    def synchronize(self) -> None:
        """Until the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def world_size() -> int:
    """Number of ranks that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process among those that torchrun started."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def ranks(timeout_seconds: int = 300) -> Iterator[Ranks]:
    """Joins the other ranks (NCCL on GPUs, gloo on CPUs) and leaves them again at the end.

    Raises ToldElsewhere or UserError in place of the broken connections that follow when another rank ends or hangs.
    """
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size() == 1:
        yield Ranks(rank, 1, local_rank, local_world_size, device)
        return
    store, _, _ = next(dist.rendezvous("env://", rank, world_size()))
    if local_world_size == world_size():
        # torchrun starts again with the same store, where the addresses of the attempt before may still be read.  Nodes
        # count their attempts each for itself, so several need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 instead.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    on_gpu, hosts_timeout = device.type == "cuda", timedelta(seconds=timeout_seconds)
    # NCCL ends the process without a word, so the hosts' group is to notice first who is missing
    timeout = hosts_timeout + timedelta(seconds=60) if on_gpu else hosts_timeout
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=world_size(),
            timeout=timeout,
            device_id=device if on_gpu else None,
        )
        hosts = dist.new_group(backend="gloo", timeout=hosts_timeout) if on_gpu else dist.group.WORLD
        yield Ranks(rank, world_size(), local_rank, local_world_size, device, hosts, timeout)
    except Exception as error:
        if _comes_from_others(error):
            raise _who_is_missing(store, rank) from error
        with suppress(RuntimeError):  # the store may have ended with another rank
            store.set(f"ended/{rank}", "of its own error")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _comes_from_others(error: Exception) -> bool:
    """Whether an error is a collective's, which fails where another rank has ended or hangs."""
    words = r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out|socket"
    return isinstance(error, RuntimeError) and re.search(words, str(error), re.IGNORECASE) is not None


def _who_is_missing(store: Any, rank: int, seconds: float = 8.0) -> Exception:
    """After a collective has failed, on every rank that noticed: who did not, and so has ended or hangs?"""
    deadline = time.monotonic() + seconds
    try:
        store.set(f"ended/{rank}", "of another's")
        while True:
            told = {k: store.get(f"ended/{k}").decode() for k in range(world_size()) if store.check([f"ended/{k}"])}
            missing = [k for k in range(world_size()) if k not in told]
            if not missing or time.monotonic() > deadline:
                break
            time.sleep(0.1)
    except RuntimeError:  # the store has ended, and with it the rank or the torchrun that kept it
        return ToldElsewhere()
    speaks = min(k for k, why in told.items() if why == "of another's")
    if "of its own error" in told.values() or not missing or rank != speaks:
        return ToldElsewhere()
    named = ", ".join(map(str, missing))
    what = f"ranks {named} have ended or hang" if len(missing) > 1 else f"rank {named} has ended or hangs"
    error = UserError(f"{what}; the others cannot go on alone; see logs/rank{missing[0]}.log")
    error.one_rank = True
    return error


# -------------------------------------------------------------------------------------------------------- mesh


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in one optimizer step with so many groups of branches.

    Gradients: a ring all-reduce over D ranks sends each number 2 (D - 1) / D times (Patarasuk and Yuan, 2009).  Bands:
    of its own pictures a rank sends what the other g - 1 groups read.
    """

    branch_groups: int
    branches: int
    """Trained by one rank."""
    gradients: float
    bands: float

    @property
    def bytes(self) -> float:
        return self.gradients + self.bands


def traffic(config: RunConfig, world_size: int, groups: int, parameters: Sequence[int], half: bool) -> Traffic:
    """Traffic of the busiest rank.

    `parameters`: their number in each branch; `half`: bands travel as float16, otherwise float32.
    """
    columns = world_size // groups
    of_group = [range(b * len(parameters) // groups, (b + 1) * len(parameters) // groups) for b in range(groups)]
    pixels = (config.data.image_size // config.split.block) ** 2
    values = [3 * pixels * len(group) for group in config.split.groups]
    own = min(sum(values[k] for k in group) for group in of_group)
    most = max(sum(parameters[k] for k in group) for group in of_group)
    return Traffic(
        groups,
        len(parameters) // groups,
        2 * (columns - 1) / columns * most * GRADIENT_BYTES,
        config.train.batch_size / world_size * (sum(values) - own) * (2 if half else 4) if groups > 1 else 0,
    )


def possible_groups(config: RunConfig, world_size: int) -> list[int]:
    """Numbers of branch groups that divide both the ranks and the branches."""
    branches = len(config.split.groups)
    return [g for g in range(1, branches + 1) if branches % g == 0 and world_size % g == 0]


def branch_groups(config: RunConfig, world_size: int, parameters: Sequence[int], half: bool) -> int:
    """`parallel.branch_groups`, where "auto" is the number with the least traffic, the smaller of two that are equal.

    Raises UserError where it does not divide the ranks and the branches.
    """
    wanted, possible = config.parallel.branch_groups, possible_groups(config, world_size)
    if wanted == "auto":
        return min(possible, key=lambda g: traffic(config, world_size, g, parameters, half).bytes)
    if wanted not in possible:
        raise UserError(
            f"parallel.branch_groups: {wanted} given, but it has to divide {world_size} ranks and "
            f"{len(config.split.groups)} branches: {', '.join(map(str, possible))} or 'auto'"
        )
    return wanted


class Mesh:
    """Ranks as a table: a row shares its pictures, a column its branches.

    Rank r stands in row r // branch_groups, so that a row is a machine's neighbouring ranks.
    """

    def __init__(self, ranks: Ranks, branches: int, branch_groups: int = 1) -> None:
        self.ranks, self.branches, self.branch_groups = ranks, branches, branch_groups
        self.rows = ranks.world_size // branch_groups
        """Ranks that train the same branch."""
        count = branches // branch_groups
        first = ranks.rank % branch_groups * count
        self.own = range(first, first + count)
        """Branches that this rank trains, counted within the run."""
        self.row_group: Any = None
        self.column_group: Any = None
        self._neighbours: dict[int, Any] = {}
        if ranks.world_size > 1:
            names = ("data", "branch")
            mesh = init_device_mesh(ranks.device.type, (self.rows, branch_groups), mesh_dim_names=names)
            self.column_group, self.row_group = (mesh.get_group(name) for name in names)
            for group in (self.column_group, self.row_group):
                dist.set_timeout(ranks.timeout, group)

    @property
    def row(self) -> int:
        return self.ranks.rank // self.branch_groups

    def neighbours(self, count: int) -> Any:
        """Process group of `count` ranks that follow each other in a column; every rank has to ask for it."""
        if count not in self._neighbours:
            first = range(0, self.rows, count)
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
        if self.rows == 1:
            return branch
        ids = [self.ranks.device.index] if self.ranks.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            branch,
            device_ids=ids,
            process_group=self.column_group,
            gradient_as_bucket_view=True,
            forward_sync_buffers=False,
        )

    @contextmanager
    def mean_buffers(self, module: nn.Module) -> Iterator[None]:
        """Inside, buffers are their mean over the column; afterwards each rank has its own again.

        A running mean of means is the mean of running means, so that statistics count the pictures of all ranks.
        """
        buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        if self.rows == 1 or not buffers:
            yield
            return
        own = [buffer.clone() for buffer in buffers]
        together = torch.cat([buffer.flatten() for buffer in buffers])
        dist.all_reduce(together, group=self.column_group)
        together /= self.rows
        for buffer, mean in zip(buffers, torch.split(together, [buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(mean.view_as(buffer))
        yield
        for buffer, before in zip(buffers, own, strict=True):
            buffer.copy_(before)


# ---------------------------------------------------------------------------------------------------- exchange


class Exchange:
    """Bands to the ranks that train them, and their logits back, within a row of the mesh.

    One `all_to_all_single` a batch, on a stream of its own where there is a GPU.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        on_gpu = mesh.ranks.device.type == "cuda"
        self._stream = torch.cuda.Stream(mesh.ranks.device) if on_gpu else None  # type: ignore[no-untyped-call]

    def on_side_stream(self) -> Any:
        """A context in which a batch is made and sent beside what the device computes."""
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def send(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Transfer:
        """Starts to send inputs of all branches, (B, channels, h, w) each, and what is to be learnt, (B, …) each."""
        g, group = self._mesh.branch_groups, self._mesh.row_group
        flat = [rearrange(x, "b c h w -> (b h w c)") for x in inputs]
        count = len(inputs) // g
        sizes = [sum(len(x) for x in flat[d * count : (d + 1) * count]) for d in range(g)]
        own = [inputs[k] for k in self._mesh.own]
        sent = torch.cat(flat)
        received = sent.new_empty(g * sum(x.numel() for x in own))
        targets = [target.contiguous() for target in targets]
        of_row = [target.new_empty(g * len(target), *target.shape[1:]) for target in targets]
        works = [
            dist.all_to_all_single(received, sent, [len(received) // g] * g, sizes, group=group, async_op=True),
            *(
                dist.all_gather_into_tensor(all_of_it, target, group=group, async_op=True)
                for all_of_it, target in zip(of_row, targets, strict=True)
            ),
        ]
        return Transfer(works, [sent, *targets], received, of_row, [tuple(x.shape) for x in own], g, self._stream)

    def give_back(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (own branches, B of the whole row, classes) -> (all branches, B of this rank, classes), and labels."""
        g = self._mesh.branch_groups
        sent = rearrange(logits, "k (g b) c -> g k b c", g=g).contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._mesh.row_group)
        return rearrange(received, "g k b c -> (g k) b c"), labels.chunk(g)[self._mesh.ranks.rank % g]


@dataclass
class Transfer:
    """A batch on its way."""

    works: list[Any]
    sent: list[Tensor]
    received: Tensor
    targets: list[Tensor]
    """Of the whole row."""
    shapes: list[tuple[int, ...]]
    """Of the own branches' inputs, for one rank's pictures."""
    sources: int
    stream: torch.cuda.Stream | None

    def wait(self) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs of this rank's branches, (B of the whole row, channels, h, w) in channels_last each, and targets."""
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
            x = rearrange(x, "g (b h w c) -> (g b) h w c", b=b, c=c, h=h, w=w)  # a copy where a rank has several
            inputs.append(rearrange(x, "b h w c -> b c h w"))
            start += b * c * h * w
        return inputs, self.targets
