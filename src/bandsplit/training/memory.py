"""Memory of a rank by kind: measured in a step, and estimated by the same measurement of a step without data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from bandsplit.config.schema import Model, RunConfig
from bandsplit.distributed.mesh import Mesh
from bandsplit.distributed.ranks import Ranks
from bandsplit.models import batch_norm, networks
from bandsplit.models.ensemble import Ensemble, fuse
from bandsplit.models.precision import Precision
from bandsplit.runs.restored import teachers_config
from bandsplit.spectral.view import View
from bandsplit.training import capture, optimizers
from bandsplit.training.learner import Learner

MIB = 2**20

_CPU = torch.device("cpu")
_ALONE = Mesh(Ranks(0, 1, 0, 1, _CPU), 1)


@dataclass(frozen=True)
class Memory:
    """Bytes of the tensors of one rank: the most of each kind."""

    weights: int
    """Parameters and running statistics of all branches of the rank, of their EMA and of the teacher."""
    optimizer: int
    gradients: int
    """Of the branches that take a step at the same time; of all branches where replicas reduce them."""
    activations: int
    """What a step makes beside gradients: kept for the backward pass, or worked with. Of the teacher if that is more:
    its forward pass comes before the step."""
    bands: int
    """The batches of a step, and those that are prefetched; the teacher's too."""
    step: int
    """The most of gradients and activations at the same time."""

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.bands + self.step

    def with_teacher(self, teacher: Memory) -> Memory:
        """The same beside a teacher (see `of_teacher`)."""
        return replace(
            self,
            weights=self.weights + teacher.weights,
            activations=max(self.activations, teacher.activations),
            bands=self.bands + teacher.bands,
            step=max(self.step, teacher.step),
        )

    def __str__(self) -> str:
        kinds = ("weights", "optimizer", "gradients", "activations", "bands")
        each = ", ".join(f"{kind} {getattr(self, kind) / MIB:,.0f}" for kind in kinds)
        return f"{self.total / MIB:,.0f} MiB (at most: {each})"


class StepMemory(TorchDispatchMode):
    """Context of a step, not the first, that notes when tensors which operations make come and go. No device sync.

    Some optimizers make their state in the first step.
    """

    def __init__(self, networks: nn.Module, learners: Sequence[Learner], reduced: bool) -> None:
        """`networks`: those of the learners, with their EMA; `reduced`: whether DDP keeps the gradients of all."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._networks, self._learners, self._reduced = networks, learners, reduced
        self._living: dict[int, _Storage] = {}
        """Storages that the step has made, by their address."""
        self._changes: list[tuple[_Storage, int]] = []
        """Storages, with their bytes where they are made, and minus that where they are known to be freed."""
        self._known = {_address(x) for x in [*networks.parameters(), *networks.buffers(), *self._optimizer_state()]}
        self._trained = [p for learner in learners for group in learner.optimizer.param_groups for p in group["params"]]
        self._hooks = [p.register_post_accumulate_grad_hook(self._note_gradient) for p in self._trained]

    def _optimizer_state(self) -> list[Tensor]:
        return [x for learner in self._learners for x in optimizers.state_of(learner.optimizer).values()]

    def _note_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if storage := self._living.get(_address(parameter.grad)):
            storage.is_gradient = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, made)
        return made

    def _note(self, tensor: Tensor) -> None:
        if (address := _address(tensor)) in self._known or address in self._living:  # not reused while it is watched
            return
        for freed in [key for key, storage in self._living.items() if storage.freed]:
            storage = self._living.pop(freed)
            self._changes.append((storage, -storage.bytes))
        storage = _Storage(tensor.untyped_storage())
        self._living[address] = storage
        self._changes.append((storage, storage.bytes))

    def memory(self, bands: int) -> Memory:
        """What the step took; call it once, after the step."""
        for hook in self._hooks:
            hook.remove()
        live, most, step = {True: 0, False: 0}, {True: 0, False: 0}, 0
        for storage, change in self._changes:
            kind = storage.is_gradient
            live[kind] += change
            most[kind] = max(most[kind], live[kind])
            step = max(step, sum(live.values()))
        buckets = _bytes(self._trained) if self._reduced else 0
        return Memory(
            weights=_bytes([*self._networks.parameters(), *self._networks.buffers()]),
            optimizer=_bytes(self._optimizer_state()),
            gradients=buckets or most[True],
            activations=most[False],
            bands=bands,
            step=buckets + step,
        )


class _Storage:
    """A storage that a step has made."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.bytes = storage.nbytes()
        self.is_gradient = False
        self._reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    @property
    def freed(self) -> bool:
        return bool(self._reference.expired())  # type: ignore[no-untyped-call]


def _address(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({_address(x): x.untyped_storage().nbytes() for x in tensors}.values())


def bytes_of_bands(inputs: Iterable[Tensor], parts: int, config: RunConfig, device: torch.device, replicas: int) -> int:
    """Bytes of the batches of a step, with their copy for CUDA graphs, and of those that are prefetched.

    `inputs`: of all branches, of one of `parts` equal parts that a rank takes for a step.
    """
    copied = capture.obstacle(config, device, replicas) is None
    return round(_bytes(inputs) * parts * (1 + copied + config.data.prefetch / config.grad_accum_steps))


def estimate(config: RunConfig, world_size: int, groups: int, precision: Precision) -> Memory:
    """Memory of the rank that needs the most, from a step of each kind of branch with tensors that hold no data.

    The teacher counts if its run is there. Raises UserError if the batch cannot be divided over the ranks or into
    batches of batch norm, and if the teacher does not fit.
    """
    at_once, reduced = config.rank_batch_size(world_size) * groups, world_size > groups
    norm_over = batch_norm.bn_batch_size(config, at_once, world_size // groups)
    if at_once == 1:
        at_once = norm_over = 2  # batch norm of one rank may reject one image, which several ranks train on together
    found: dict[tuple[Model, int], Memory] = {}
    branches = []
    for number, group in zip(config.split.numbers, config.split.groups, strict=True):
        kind = (config.model_of(number), len(group))
        if kind not in found:
            found[kind] = of_branch(config, number, at_once, min(norm_over, at_once), reduced, precision)
        branches.append(found[kind])
    count = len(branches) // groups
    if groups == 1:  # branches that read the same bands share them, unless they are received
        repeated = [group in config.split.groups[:i] for i, group in enumerate(config.split.groups)]
        branches = [replace(b, bands=0) if again else b for b, again in zip(branches, repeated, strict=True)]
    streams = capture.overlapping(config, precision.device, world_size // groups, count)
    ranks = [_together(branches[first : first + count], streams, reduced) for first in range(0, len(branches), count)]
    most = max(ranks, key=lambda memory: memory.total)
    teacher = teachers_config(config)
    if teacher is None:
        return most
    images, size = config.rank_batch_size(world_size), config.data.image_size
    return most.with_teacher(of_teacher(teacher, images, size, config.data.prefetch, precision))


def of_branch(
    config: RunConfig, number: int, at_once: int, norm_over: int, reduced: bool, precision: Precision
) -> Memory:
    """Memory of one branch alone, from a step with tensors that hold no data.

    Args:
        config: the run.
        number: the branch's index in the full ensemble.
        at_once: images in one forward pass.
        norm_over: images of these over which batch norm computes its statistics.
        reduced: whether several ranks train it.
        precision: of the run; bf16 stands for fp16.
    """
    plain = {"on_nonfinite": "stop", "compile": False}  # other policies read values, and there is nothing to compile
    own = config.with_values({"split": {"only": (number,)}, "train": plain})
    accumulated, size = config.grad_accum_steps, config.data.image_size // config.split.block
    with torch.device("meta"):
        (branch,) = Ensemble.of(own, range(1)).branches
    if config.train.activation_checkpointing:
        networks.recompute(branch)
    with FakeTensorMode():
        _hold_no_data(branch)
        batch_norm.fit(branch, norm_over, at_once, _ALONE)
        learner = Learner(branch, own, _without_device(precision), _ALONE)
        shape = (at_once, 3 * len(own.split.groups[0]), size, size)
        x = torch.empty(shape, memory_format=torch.channels_last)
        y = torch.zeros(at_once, dtype=torch.int64)
        parts = min(accumulated, 2)  # all that follow take what the second takes
        learner.step([x], [y], lr=0.1)
        watched = StepMemory(branch, [learner], reduced)
        with watched:
            learner.step([x] * parts, [y] * parts, lr=0.1)
        received = x.half() if precision.half_bands else x
        memory = watched.memory(bytes_of_bands([received], accumulated, config, precision.device, 1 + reduced))
    return replace(memory, weights=(1 + (config.train.ema_decay is not None)) * memory.weights)


def of_teacher(teacher: RunConfig, images: int, size: int, prefetch: int, precision: Precision) -> Memory:
    """Memory of a teacher, from a forward pass with tensors that hold no data.

    Args:
        teacher: config of the teacher.
        images: of a rank in one forward pass.
        size: of these images, in pixels.
        prefetch: batches that are prepared ahead.
        precision: of the run; bf16 stands for fp16.
    """
    view, side = View.of(teacher), size // teacher.split.block
    with torch.device("meta"):
        ensemble = Ensemble.of(teacher).eval().requires_grad_(False)
    with FakeTensorMode():
        _hold_no_data(ensemble)
        shapes = [(images, 3 * len(group), side, side) for group in view.inputs]
        inputs = [torch.empty(shape, memory_format=torch.channels_last) for shape in shapes]
        watched = StepMemory(ensemble, (), reduced=False)
        with watched, torch.no_grad(), _without_device(precision).autocast():
            fuse(ensemble(view.of_branches(inputs)))
        received = [x.half() if precision.half_bands else x for x in inputs]
        return watched.memory(_bytes(received) * (1 + prefetch))


def _without_device(precision: Precision) -> Precision:
    """The precision on the CPU, where bf16 stands for fp16."""
    return Precision("fp32" if precision.dtype == torch.float32 else "bf16", _CPU)


def _hold_no_data(module: nn.Module) -> None:
    """Replaces parameters and buffers on the meta device by such that torch takes for tensors of the CPU."""

    def without_data(x: Tensor) -> Tensor:
        layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
        return torch.empty(x.shape, dtype=x.dtype, memory_format=layout)

    for each in module.modules():
        for name, parameter in each.named_parameters(recurse=False):
            setattr(each, name, nn.Parameter(without_data(parameter), parameter.requires_grad))
        for name, buffer in each.named_buffers(recurse=False):
            setattr(each, name, without_data(buffer))


def _together(branches: Sequence[Memory], streams: int, reduced: bool) -> Memory:
    """Branches of a rank, which follow each other on several streams.

    On a stream, activations are freed in between, and gradients if they are not reduced.
    """
    every = {kind: [getattr(branch, kind) for branch in branches] for kind in ("weights", "optimizer", "bands")}
    standing = sum(branch.gradients for branch in branches) if reduced else 0
    turns = [branches[first::streams] for first in range(streams)]
    return Memory(
        **{kind: sum(values) for kind, values in every.items()},
        gradients=standing or sum(max(branch.gradients for branch in turn) for turn in turns),
        activations=sum(max(branch.activations for branch in turn) for turn in turns),
        step=standing + sum(max(b.step - (b.gradients if reduced else 0) for b in turn) for turn in turns),
    )
