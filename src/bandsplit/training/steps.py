"""A step of the branches of a rank: one branch after the other, or on a GPU as CUDA graphs on several streams.

A step of a branch launches hundreds of short kernels, which takes the host longer than the GPU needs to run them. A
CUDA graph launches them at once, and several of them on streams of their own fill a GPU that one branch does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import NamedTuple

import torch
from loguru import logger
from torch import Tensor

from bandsplit.config.schema import RunConfig
from bandsplit.data.loader import Batch
from bandsplit.distributed.mesh import Mesh
from bandsplit.training import capture, optimizers
from bandsplit.training.learner import Learner, Outcome


def steps_of(learners: Sequence[Learner], config: RunConfig, mesh: Mesh, seed: Callable[[int, int], None]) -> InTurn:
    """How the branches of a rank take their steps.

    `seed`: seeds torch for a branch of the rank and the number of a step.
    """
    device = mesh.ranks.device
    if capture.obstacle(config, device, mesh.replicas) is not None:
        return InTurn(learners, seed, device)
    return Graphs(learners, seed, device, capture.overlapping(config, device, mesh.replicas, len(mesh.own)))


class InTurn:
    """Steps of the branches of a rank, one after the other.

    On a GPU, a call returns when the step before is done. So the host is one step ahead, and no further: batches that
    wait for their step take memory, and a host that is ahead would count time as waiting for data.
    """

    def __init__(self, learners: Sequence[Learner], seed: Callable[[int, int], None], device: torch.device) -> None:
        self._learners, self._seed, self._device = learners, seed, device
        self._end: torch.cuda.Event | None = None
        """Of the last step, on a GPU."""

    def __call__(
        self, branches: Sequence[int], parts: Sequence[Batch], number: int, lr: float, momentum: float | None = None
    ) -> dict[int, Outcome]:
        """Step `number` of some of the rank's branches, on all parts of a batch."""
        outcomes = self._take(branches, parts, number, lr, momentum)
        if self._device.type == "cuda":
            before = self._end
            self._end = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # leaves CPUs to other threads
            self._end.record(torch.cuda.current_stream(self._device))
            if before is not None:
                before.synchronize()
        return outcomes

    def _take(
        self, branches: Sequence[int], parts: Sequence[Batch], number: int, lr: float, momentum: float | None
    ) -> dict[int, Outcome]:
        labels, teacher_logits = [part.labels for part in parts], [part.teacher_logits for part in parts]
        outcomes = {}
        for i in branches:
            self._seed(i, number)
            inputs = [part.inputs[i] for part in parts]
            outcomes[i] = self._learners[i].step(inputs, labels, lr, momentum, teacher_logits)
        return outcomes


class Graphs(InTurn):
    """Steps that are captured as a CUDA graph for each branch, and replayed on several streams.

    The first steps on inputs of new shapes, or of other branches, are taken in turn: cuDNN chooses its algorithms in
    them, and code is compiled. A step whose capture fails is taken in turn too. Memory is that of as many branches as
    there are streams.
    """

    WARM_UP = 2
    """Steps in turn before graphs are captured."""
    ATTEMPTS = 3
    """Captures that fail, of which another thread may be the cause, before all steps are taken in turn."""

    def __init__(
        self, learners: Sequence[Learner], seed: Callable[[int, int], None], device: torch.device, streams: int
    ) -> None:
        super().__init__(learners, seed, device)
        self._streams = [torch.cuda.Stream(device) for _ in range(streams)]  # type: ignore[no-untyped-call]
        self._lr = torch.zeros((), device=device)
        self._key: object = None
        self._taken, self._failed, self._is_random = 0, 0, False
        self._parts: list[Batch] = []
        """The tensors that the graphs read."""
        self._graphs: list[_Graph] = []

    def _take(
        self, branches: Sequence[int], parts: Sequence[Batch], number: int, lr: float, momentum: float | None
    ) -> dict[int, Outcome]:
        key = (tuple(branches), momentum, [(x.shape, x.dtype) for part in parts for x in _tensors(part, branches)])
        if key != self._key:
            self._key, self._taken, self._failed, self._is_random = key, 0, 0, False
            self._graphs, self._parts = [], []  # frees their memory
        if not branches:  # those of other ranks go on
            return {}
        if self._taken < self.WARM_UP:
            self._taken += 1
            generator = torch.cuda.default_generators[self._device.index or 0]
            outcomes: dict[int, Outcome] = {}
            for i in branches:
                outcomes |= super()._take([i], parts, number, lr, momentum)
                self._is_random |= generator.get_offset() > 0  # each branch sets it to 0 when it seeds
            return outcomes
        if not self._graphs and (self._failed == self.ATTEMPTS or not self._captured(branches, parts, momentum)):
            return super()._take(branches, parts, number, lr, momentum)
        theirs, own = ([x for part in each for x in _tensors(part, branches)] for each in (parts, self._parts))
        for static, x in {id(static): (static, x) for static, x in zip(own, theirs, strict=True)}.values():
            static.copy_(x)
        return self._replay(number, lr)

    def _captured(self, branches: Sequence[int], parts: Sequence[Batch], momentum: float | None) -> bool:
        """Whether the graphs could be captured; frees what an attempt that fails has made."""
        try:
            self._parts = [part.copied() for part in parts]
            self._capture(branches, momentum)
            return True
        except RuntimeError as error:
            reason = str(error) or type(error).__name__  # the error itself would keep the tensors of the step
        self._graphs, self._parts = [], []
        for i in branches:
            self._learners[i].forget_step()
        self._failed += 1
        if self._failed == self.ATTEMPTS:
            logger.warning("steps are not captured as CUDA graphs, and take longer: {}", reason.splitlines()[0])
        return False

    def _capture(self, branches: Sequence[int], momentum: float | None) -> None:
        """A graph for each branch. Those of a stream share memory, since they follow each other."""
        labels, teacher_logits = [part.labels for part in self._parts], [part.teacher_logits for part in self._parts]
        # graphs share the seed of their random numbers on the device, which each sets when it begins
        streams = self._streams[:1] if self._is_random else self._streams
        pools = [torch.cuda.graph_pool_handle() for _ in streams]
        for i, (stream, pool) in zip(branches, cycle(zip(streams, pools, strict=True))):
            graph, learner = torch.cuda.CUDAGraph(), self._learners[i]
            inputs = [part.inputs[i] for part in self._parts]
            # other threads, such as DALI's, may allocate memory meanwhile
            captured = torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local")
            with optimizers.capturable(learner.optimizer), captured:
                outcome = learner.step(inputs, labels, self._lr, momentum, teacher_logits)
            self._graphs.append(_Graph(i, graph, stream, outcome))

    def _replay(self, number: int, lr: float) -> dict[int, Outcome]:
        self._lr.fill_(lr)
        current = torch.cuda.current_stream(self._device)
        for stream in self._streams:
            stream.wait_stream(current)
        for i, graph, stream, _ in self._graphs:
            self._seed(i, number)
            with torch.cuda.stream(stream):
                graph.replay()
        for stream in self._streams:
            current.wait_stream(stream)
        return {i: outcome for i, _, _, outcome in self._graphs}


class _Graph(NamedTuple):
    """A captured step of a branch, and where its outcome is written."""

    branch: int
    graph: torch.cuda.CUDAGraph
    stream: torch.cuda.Stream
    outcome: Outcome


def _tensors(part: Batch, branches: Sequence[int]) -> list[Tensor]:
    return [*(part.inputs[i] for i in branches), *part.targets]
