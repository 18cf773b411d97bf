"""Ranks: process groups, agreement between ranks, and which rank reports an error."""

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
from bandsplit.errors import Interrupted, ToldElsewhere, UserError

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
    """Process group of all ranks over their hosts (gloo), independent of the devices' backend; None: one rank."""
    timeout: timedelta = timedelta(minutes=5)
    """Time after which a collective of the devices fails."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, counts: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(counts)
        return counts

    def smallest(self, values: Tensor) -> Tensor:
        """Element-wise minimum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values, dist.ReduceOp.MIN)
        return values

    def largest(self, values: Sequence[int]) -> list[int]:
        """Element-wise maximum over all ranks; does not wait for the device."""
        if self.world_size == 1:
            return list(values)
        together = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(together, dist.ReduceOp.MAX, group=self.hosts)
        return together.tolist()

    def from_first(self, make: Callable[[], T]) -> T:
        """Runs `make` on rank 0 only; its result, or the UserError it raises, is passed on to every rank."""
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
        """Runs `make` on every rank and returns this rank's result if none of them failed.

        Otherwise the lowest rank that failed raises its UserError, and all others raise ToldElsewhere.
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

    def wait(self) -> None:
        """Barrier over all ranks."""
        if self.world_size > 1:
            dist.barrier(group=self.hosts)

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _value_or(error: UserError | None, value: T) -> T:
    if error is not None:
        raise error
    return value


def world_size() -> int:
    """Number of ranks that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process among those that torchrun started."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def joined(timeout_seconds: int = 300) -> Iterator[Ranks]:
    """Process groups of all ranks (NCCL on GPUs, gloo on CPUs), destroyed at the end.

    Raises ToldElsewhere or UserError instead of the connection errors that follow when another rank ends or hangs;
    their traceback is logged.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = _device(local_rank, local_world_size)
    torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))  # torch does not look at CPU quotas
    if world_size() == 1:
        yield Ranks(rank(), 1, local_rank, local_world_size, device)
        return
    store = _store()
    if local_world_size == world_size():
        # torchrun restarts with the same store, which may still hold addresses of the previous attempt.  Each node
        # counts its own attempts, so several nodes need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 instead.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    on_gpu, hosts_timeout = device.type == "cuda", timedelta(seconds=timeout_seconds)
    # NCCL kills the process silently, so the hosts' group has to time out first and find who is missing
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
        yield Ranks(rank(), world_size(), local_rank, local_world_size, device, hosts, timeout)
    except Exception as error:
        if _comes_from_others(error):
            logger.opt(exception=error).error("a collective failed: {}", error)
            raise _who_tells(error, store, rank()) from None
        with suppress(RuntimeError):  # the store may have ended with another rank
            store.set(f"ended/{rank()}", _OWN)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _device(local_rank: int, local_world_size: int) -> torch.device:
    """This rank's device.  Raises UserError, on every rank of a node, where the node has fewer GPUs than ranks."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if local_world_size > gpus:
        told = UserError(
            f"{local_world_size} ranks on {socket.gethostname()}, which has {gpus} GPU{'s' * (gpus > 1)}: one rank "
            f"uses one GPU, so start at most {gpus} there (torchrun --nproc-per-node {gpus})"
        )
        told.one_rank = local_rank == 0  # one of each node
        raise told
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _store() -> Any:
    """The rendezvous store.  Raises UserError where the ranks cannot find each other."""
    try:
        store, _, _ = next(dist.rendezvous("env://", rank(), world_size()))
    except (ValueError, RuntimeError) as error:  # a variable that only torchrun sets, or a host that does not answer
        told = UserError(f"rank {rank()} of {world_size()} cannot find the others: {error}; start them with torchrun")
        told.one_rank = True
        raise told from error
    return store


def _comes_from_others(error: Exception) -> bool:
    """Whether an error comes from a collective, which fails when another rank has ended or hangs."""
    words = r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out|timeout|pair closure|socket"
    return isinstance(error, RuntimeError) and re.search(words, str(error), re.IGNORECASE) is not None


_OWN, _OF_COLLECTIVE = "of its own error", "of a collective"
"""Why a rank has ended, told to the others."""


def _who_tells(error: Exception, store: Any, rank: int, seconds: float = 8.0) -> Exception:
    """Called on every rank where a collective has failed: the UserError on the rank that reports, else ToldElsewhere.

    Ranks that did not notice have ended or hang; the lowest of the others reports them.  If every rank noticed, the
    collective itself failed, and the lowest rank reports why.  A rank that failed by itself has reported already.
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
    except RuntimeError:  # the store has ended, and with it the rank or the torchrun that kept it
        return ToldElsewhere()
    if _OWN in told.values() or rank != min(told):
        return ToldElsewhere()
    if missing:
        named = ", ".join(map(str, missing))
        what = f"ranks {named} have ended or hang" if len(missing) > 1 else f"rank {named} has ended or hangs"
        message = f"{what}; the others cannot continue without; see logs/rank{missing[0]}.log of the run"
    else:
        message = f"a collective failed on every rank: {error}; see logs/rank*.log of the run"
    speaks = UserError(message)
    speaks.one_rank = True
    return speaks
