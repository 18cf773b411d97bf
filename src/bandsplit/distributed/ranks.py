"""Process groups, small collectives on the host, and the choice of the one rank that reports an error."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from loguru import logger
from torch import Tensor

from bandsplit.cpus import available_cpus
from bandsplit.errors import Interrupted, ReportedElsewhere, UserError

T = TypeVar("T")

_SECONDS_OF_WORK = 10.0
"""After which ranks that work tell those that wait that they still do."""


@dataclass(frozen=True)
class Ranks:
    """This process and the process groups it belongs to."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    hosts: Any = None
    """gloo process group of all ranks for host tensors and objects; None with one rank."""
    timeout: timedelta = timedelta(minutes=5)
    """Timeout of collectives on the devices."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, counts: Tensor) -> Tensor:
        """Sums a device tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(counts)
        return counts

    def smallest(self, values: Tensor) -> Tensor:
        """Takes the element-wise minimum of a device tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values, dist.ReduceOp.MIN)
        return values

    def largest(self, values: Sequence[int]) -> list[int]:
        """Element-wise maximum over all ranks; runs on the hosts and does not synchronize with the device."""
        if self.world_size == 1:
            return list(values)
        together = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(together, dist.ReduceOp.MAX, group=self.hosts)
        return together.tolist()

    def from_first(self, make: Callable[[], T]) -> T:
        """Runs `make` on rank 0 and broadcasts its result, which must be picklable.

        If `make` raises a UserError, every rank raises it.
        """
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
            told[1].one_rank = False  # every rank raises it, and rank 0 reports it
            raise told[1]
        value: T = told[0]
        return value

    def at_first(self, own: Tensor) -> list[Tensor]:
        """The contiguous host tensors of all ranks, on rank 0, in their order; nothing on the others.

        Their first dimensions may differ.
        """
        if self.world_size == 1:
            return [own]
        sizes = torch.zeros(self.world_size, dtype=torch.int64)
        sizes[self.rank] = len(own)
        dist.all_reduce(sizes, group=self.hosts)
        if not self.is_first:
            if len(own):
                dist.send(own.view(torch.uint8), 0, group=self.hosts)
            return []
        parts = [own, *(own.new_empty(size, *own.shape[1:]) for size in sizes[1:].tolist())]
        for sender, part in enumerate(parts[1:], 1):
            if len(part):
                dist.recv(part.view(torch.uint8), sender, group=self.hosts)
        return parts

    def each(self, make: Callable[[], T]) -> T:
        """Runs `make` on every rank and returns this rank's result.

        If `make` raises a UserError on some ranks, the lowest of them raises it (with its rank and hostname, unless it
        is rank 0), and all other ranks raise ReportedElsewhere.
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
            raise ReportedElsewhere()
        if not self.is_first:
            error = UserError(f"rank {self.rank} on {socket.gethostname()}: {error}")
            error.one_rank = True
        raise error

    def finish(self, work: Generator[None, None, T] | None, signal: Callable[[], int] = lambda: 0) -> T | None:
        """Runs `work` on the ranks that have some, and returns its value there.

        The others wait, for longer than a collective may take.  Errors of `work` are raised as `each` raises them.
        Raises Interrupted on every rank where one of them has received a signal.
        """
        done, value, error = work is None, None, None
        busy = 1
        while busy:
            until = time.monotonic() + _SECONDS_OF_WORK
            try:
                while work is not None and not done and time.monotonic() < until and not signal():
                    next(work)
            except StopIteration as stop:
                done, value = True, stop.value
            except UserError as mistake:
                done, error = True, mistake
            busy, stopped_by = self.largest([not done, signal()])
            if stopped_by:
                if work is not None:
                    work.close()
                raise Interrupted(stopped_by)
        return self.each(lambda: _value_or(error, value))

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.hosts)
        return values

    def wait(self) -> None:
        """Barrier over all ranks."""
        if self.world_size > 1:
            dist.barrier(group=self.hosts)

    def synchronize(self) -> None:
        """Waits until the device has finished all queued work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _value_or(error: UserError | None, value: T) -> T:
    if error is not None:
        raise error
    return value


def world_size() -> int:
    """Number of ranks, from torchrun's environment; 1 without torchrun. Needs no process group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Number of ranks on this node, from torchrun's environment; 1 without torchrun. Needs no process group."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    """Rank of this process, from torchrun's environment; 0 without torchrun. Needs no process group."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def joined(timeout_seconds: int = 300) -> Iterator[Ranks]:
    """Context with the process groups of all ranks (NCCL on GPUs, gloo on CPUs), which are destroyed at the end.

    When another rank exits or hangs, collectives fail with connection errors. These are logged with their traceback;
    one rank raises a UserError that names the missing ranks, and the others raise ReportedElsewhere.

    Args:
        timeout_seconds: timeout of collectives on the hosts; 60 s more for those on GPUs.

    Raises:
        UserError: a node has fewer GPUs than ranks, the ranks cannot connect, or a collective failed.
        ReportedElsewhere: a collective failed, and another rank reports it.
    """
    local_rank, of_node = int(os.environ.get("LOCAL_RANK", "0")), local_world_size()
    device = _device(local_rank, of_node)
    torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))  # torch ignores CPU quotas
    if world_size() == 1:
        yield Ranks(rank(), 1, local_rank, of_node, device)
        return
    store = _store()
    if of_node == world_size():
        # After a restart, torchrun reuses the store, which may still hold addresses of the previous attempt, so each
        # attempt gets a prefix. This works on one node only, because nodes count their restarts separately; with
        # several nodes, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 instead.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    on_gpu, hosts_timeout = device.type == "cuda", timedelta(seconds=timeout_seconds)
    # When NCCL times out it kills the process without a message, so the gloo group must time out first
    timeout = hosts_timeout + timedelta(seconds=60) if on_gpu else hosts_timeout
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=rank(),
            world_size=world_size(),
            timeout=timeout,
            device_id=device if on_gpu else None,
        )
        hosts = dist.new_group(backend="gloo", timeout=hosts_timeout) if on_gpu else dist.group.WORLD
        yield Ranks(rank(), world_size(), local_rank, of_node, device, hosts, timeout)
    except Exception as error:
        if _comes_from_others(error):
            logger.opt(exception=error).error("a collective failed: {}", error)
            raise _who_tells(error, store, rank()) from None
        with suppress(RuntimeError):  # the process that hosts the store may have exited
            store.set(f"ended/{rank()}", _OWN)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _device(local_rank: int, local_world_size: int) -> torch.device:
    """This rank's device. If the node has fewer GPUs than ranks, all of its ranks raise UserError."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if local_world_size > gpus:
        told = UserError(
            f"{local_world_size} ranks on {socket.gethostname()}, which has {gpus} GPU{'s' * (gpus > 1)}: one rank "
            f"uses one GPU, so start at most {gpus} there (torchrun --nproc-per-node {gpus})"
        )
        told.one_rank = local_rank == 0  # reported once per node
        raise told
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _store() -> Any:
    """The rendezvous store. Raises UserError if the ranks cannot connect to it."""
    try:
        store, _, _ = next(dist.rendezvous("env://", rank(), world_size()))
    except (ValueError, RuntimeError) as error:  # a missing variable, or no answer from MASTER_ADDR
        told = UserError(
            f"rank {rank()} of {world_size()} cannot connect to the others: {error}; start all with torchrun"
        )
        told.one_rank = True
        raise told from error
    return store


def _comes_from_others(error: Exception) -> bool:
    """Whether an error comes from a collective, judged by its message: torch has no common type for these errors."""
    words = r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out|timeout|pair closure|socket"
    return isinstance(error, RuntimeError) and re.search(words, str(error), re.IGNORECASE) is not None


_OWN, _OF_COLLECTIVE = "own error", "collective failed"
"""Why a rank exits: the value of its key `ended/RANK` in the store."""


def _who_tells(error: Exception, store: Any, rank: int, seconds: float = 8.0) -> Exception:
    """The exception that this rank raises after a failed collective: UserError if it reports the failure.

    Every rank whose collective failed writes a key to the store and waits up to `seconds` for the keys of the others.
    - A rank that failed with an error of its own has already reported it: all others raise ReportedElsewhere.
    - Ranks without a key have exited or hang: the lowest rank with a key names them in a UserError.
    - If every rank has a key, the collective itself failed: rank 0 raises UserError with its error.
    """
    deadline = time.monotonic() + seconds
    try:
        store.set(f"ended/{rank}", _OF_COLLECTIVE)
        while True:
            told = {k: store.get(f"ended/{k}").decode() for k in range(world_size()) if store.check([f"ended/{k}"])}
            missing = [k for k in range(world_size()) if k not in told]
            if not missing or time.monotonic() > deadline:
                break
            time.sleep(0.1)
    except RuntimeError:  # the store is gone, and so is the rank or the torchrun that hosted it
        return ReportedElsewhere()
    if _OWN in told.values() or rank != min(told):
        return ReportedElsewhere()
    if missing:
        named = ", ".join(map(str, missing))
        what = f"ranks {named} have exited or hang" if len(missing) > 1 else f"rank {named} has exited or hangs"
        message = f"{what}; the other ranks cannot continue; see logs/rank{missing[0]}.log of the run"
    else:
        message = f"a collective failed on every rank: {error}; see logs/rank*.log of the run"
    report = UserError(message)
    report.one_rank = True
    return report
