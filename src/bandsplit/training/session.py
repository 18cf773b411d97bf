"""Networks, learners and data of one rank, as used by the training loop, the LR finder and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from loguru import logger
from torch import nn

from bandsplit import seeds
from bandsplit.config.schema import RunConfig
from bandsplit.data import deviations, holdout, source
from bandsplit.data.feed import BatchFeed
from bandsplit.data.loader import Batch, Streams, StreamState, shard_of
from bandsplit.data.source import AnyValidationLoader, Images
from bandsplit.distributed.mesh import Mesh
from bandsplit.distributed.ranks import Ranks
from bandsplit.distributed.traffic import branch_groups
from bandsplit.models import batch_norm
from bandsplit.models.ensemble import parameters_of_branches
from bandsplit.models.precision import Precision
from bandsplit.models.pretrained import Initial
from bandsplit.runs.initial import initial_weights, tell_what_has_seen_held_out
from bandsplit.runs.restored import Teacher
from bandsplit.training import accumulation, capture, memory
from bandsplit.training.active import ActiveBranches
from bandsplit.training.learner import Outcome, learners_of
from bandsplit.training.memory import Memory, StepMemory
from bandsplit.training.steps import steps_of


@dataclass(frozen=True)
class Plan:
    """How a config runs on these ranks, decided before networks are built or anything is written."""

    config: RunConfig
    ranks: Ranks
    train_files: Images
    """Without those that are held out."""
    held_out_files: Images
    """Training images that are held out."""
    val_files: Images
    precision: Precision
    teacher: Teacher | None
    parameters: list[int]
    """Number of parameters of each branch of the run."""
    trained: list[int]
    """The same without frozen ones."""
    mesh: Mesh
    initial: dict[int, Initial]
    """Trained weights that branches of this rank begin with, by number."""

    @classmethod
    def of(
        cls,
        config: RunConfig,
        ranks: Ranks,
        began: Path | None = None,
        signal: Callable[[], int] = lambda: 0,
        restores: bool = False,
    ) -> Plan:
        """Every rank must call it.

        Args:
            began: the folder of a run that resumes with the images that it began with.
            signal: which signal has been received; 0: none.
            restores: whether weights will be loaded from a checkpoint, so that `model.init_from` is not read.

        Raises UserError if the config does not fit the data or the ranks, and Interrupted if a signal is received while
        images are examined.
        """
        files = source.open_data(config, ranks, began=began, signal=signal)
        config = config.with_classes(len(files["train"].classes))
        train_files, held_out = holdout.split(files["train"], config)
        config.steps_per_epoch(len(train_files))
        config = deviations.with_sigma(config, train_files, ranks)
        precision = Precision(config.train.precision, ranks.device)
        precision.apply()
        torch.backends.cudnn.benchmark = config.augment.progressive is None  # tries algorithms once for each size
        teacher = ranks.each(partial(Teacher.of, config, train_files.classes, precision))
        ranks.each(partial(source.require_teacher, train_files, config, teacher))
        parameters, trained = parameters_of_branches(config)
        groups = branch_groups(config, ranks.world_size, trained, precision.half_bands)
        mesh = Mesh(ranks, len(parameters), groups)
        initial = {} if restores else ranks.each(partial(initial_weights, config, mesh.own, train_files.classes))
        if ranks.is_first and not restores:
            tell_what_has_seen_held_out(config, train_files.digest)
        config = accumulation.with_steps(config, mesh, precision)
        return cls(
            config, ranks, train_files, held_out, files["val"], precision, teacher, parameters, trained, mesh, initial
        )

    @property
    def files(self) -> dict[str, Images]:
        return {"train": self.train_files, "val": self.val_files}

    @property
    def digests(self) -> dict[str, str]:
        return {part: files.digest for part, files in self.files.items()}

    @property
    def teacher_state(self) -> dict[str, str] | None:
        """Name and digest of the teacher, for checkpoints."""
        return {"name": self.teacher.name, "digest": self.teacher.digest} if self.teacher else None

    @property
    def steps_per_epoch(self) -> int:
        return self.config.steps_per_epoch(len(self.train_files))

    @property
    def total_steps(self) -> int:
        return self.config.train.epochs * self.steps_per_epoch

    def streams(self, count: int | None = None) -> Streams:
        """Streams of training images. `count`: the number of streams of a run to resume; default: one per rank."""
        return Streams(self.config, count or self.ranks.world_size, self.ranks)

    def bn_batch_size(self, streams: Streams) -> int:
        """Images per batch norm statistic. Raises UserError as `batch_norm.bn_batch_size` does."""
        return batch_norm.bn_batch_size(self.config, self.images_at_once(streams), self.mesh.replicas)

    def images_at_once(self, streams: Streams) -> int:
        """Images in one forward pass of a branch on one rank."""
        return streams.batch_size * self.mesh.branch_groups


class Session:
    """Ensemble, learners and training batches of one rank. With `stream_states`, the streams continue from there."""

    def __init__(
        self,
        plan: Plan,
        streams: Streams | None = None,
        stream_states: Sequence[StreamState] | None = None,
        positions: Path | None = None,
    ) -> None:
        """`positions`: folder in which the positions of the streams are noted, for a restart after a crash."""
        self.plan, self.config, self.mesh = plan, plan.config, plan.mesh
        self.streams = streams or plan.streams()
        self.ensemble, self.learners = learners_of(
            plan.config, plan.images_at_once(self.streams), plan.precision, plan.mesh, plan.initial
        )
        self.numbers = [plan.config.split.numbers[k] for k in plan.mesh.own]
        """Number of each of this rank's branches in the full ensemble (see `split.only`)."""
        if plan.config.distillation is not None and plan.config.distillation.residual:
            logger.info("distillation.residual: validations show the branches alone, without the teacher's logits")
        half = plan.precision.half_bands
        self.loader = source.training_loader(
            plan.config, self.streams, plan.train_files, half, stream_states, plan.teacher, positions
        )
        self.feed = BatchFeed(self.loader, plan.mesh)
        self.active = ActiveBranches(plan.config, plan.ranks.is_first)
        self._step = steps_of(self.learners, plan.config, plan.mesh, self._seed_branch)

    @property
    def networks(self) -> nn.ModuleList:
        """All networks with state: this rank's branches and the EMA of each."""
        return nn.ModuleList([self.ensemble, *(learner.ema for learner in self.learners if learner.ema is not None)])

    def validation_loader(self, files: Images | None = None) -> AnyValidationLoader:
        """This rank's share of the validation images, or of `files`."""
        batch_size = self.config.validation.batch_size or self.streams.batch_size
        shard = shard_of(self.config, self.plan.ranks, batch_size, self.plan.precision.half_bands)
        return source.validation_loader(self.config, self.plan.val_files if files is None else files, shard)

    def watched_step(self) -> StepMemory | None:
        """Context that measures the memory of a step of all learners; None for compiled code, which it cannot see."""
        reduced = self.mesh.replicas > 1
        return None if self.config.train.compile else StepMemory(self.networks, self.learners, reduced)

    def memory_of(self, watched: StepMemory, parts: Sequence[Batch]) -> Memory:
        """Memory by kind, after a watched step on these parts of a batch, and after the teacher's forward pass."""
        config, mesh, teacher = self.config, self.mesh, self.plan.teacher
        bands = memory.bytes_of_bands(parts[0].inputs, len(parts), config, mesh.ranks.device, mesh.replicas)
        measured = watched.memory(bands)
        if teacher is None:
            return measured
        images, size, prefetch = self.streams.batch_size, self.loader.size, config.data.prefetch
        return measured.with_teacher(memory.of_teacher(teacher.config, images, size, prefetch, self.plan.precision))

    @property
    def overlapping(self) -> int:
        """How many of this rank's branches take a step at the same time."""
        mesh = self.mesh
        return capture.overlapping(self.config, mesh.ranks.device, mesh.replicas, len(mesh.own))

    def step(
        self, branches: Sequence[int], parts: Sequence[Batch], number: int, lr: float, momentum: float | None = None
    ) -> dict[int, Outcome]:
        """Step `number` of some of this rank's branches, on all parts of a batch."""
        return self._step(branches, parts, number, lr, momentum)

    def _seed_branch(self, i: int, step: int) -> None:
        """Seeds torch (dropout, stochastic depth) for a step of branch `i`, independent of other local branches."""
        purpose = f"branch {self.numbers[i]} step {step}"
        torch.manual_seed(seeds.derived(self.config.seed, purpose, self.mesh.replica))
