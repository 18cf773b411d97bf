"""The state of a run: captured for a checkpoint, and restored from one."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from loguru import logger

from bandsplit.config.schema import RunConfig
from bandsplit.data import class_names, source
from bandsplit.data.images import require_same_classes
from bandsplit.data.loader import Streams, StreamState
from bandsplit.distributed.mesh import Mesh
from bandsplit.distributed.ranks import Ranks
from bandsplit.errors import UserError
from bandsplit.runs import checkpoint
from bandsplit.runs.directory import RunDirectory, environment, resolved
from bandsplit.runs.metrics import Metrics
from bandsplit.training import schedules
from bandsplit.training.active import ActiveBranches
from bandsplit.training.meter import Meter, Progress
from bandsplit.training.session import Plan, Session


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run resumes from."""

    path: Path
    run: checkpoint.State
    finished: bool
    """Whether the run has done all of its steps, or all of its branches have ended early."""

    def stream_states(self, streams: Streams, ranks: Ranks) -> list[StreamState]:
        """Positions of this rank's streams; every rank must call it."""
        return ranks.each(
            lambda: [checkpoint.read(self.path, checkpoint.stream_file(s))["loader"] for s in streams.own]
        )

    def fits(self, mesh: Mesh) -> bool:
        """Whether it was written with the same number of ranks and of branch groups as `mesh`."""
        return (self.run["world_size"], self.run["branch_groups"]) == (mesh.ranks.world_size, mesh.branch_groups)


def open_run(directory: RunDirectory, plan: Plan, stack: ExitStack) -> ResumePoint | None:
    """Checks and locks the run directory, and finds the checkpoint to resume from; only rank 0 calls it.

    Leaves the run's files unchanged if it raises UserError or if the run is finished.
    """
    config, classes = plan.config, plan.train_files.classes
    directory.check_classes(classes, config.data.root)
    names = class_names.readable(classes, config.data)
    if not directory.holds_run:  # before a new run writes anything
        plan.bn_batch_size(plan.streams())
    stack.enter_context(directory.locked())
    metrics = Metrics(directory.metrics)
    path = checkpoint.latest(directory.checkpoints)
    point = None
    if path is not None:
        run = checkpoint.read_run(path)
        require_same_classes(run["classes"], str(directory.path), classes, config.data.root)
        if run["data"] != plan.digests:
            raise UserError(
                f"data.root: {config.data.root}: the images are not those that {path} was trained on, and "
                f"{directory.data} does not list those"
            )
        _require_same_teacher(run, plan, path)
        done = run["progress"]["step"] >= plan.total_steps or ActiveBranches.ended(run)
        point = ResumePoint(path, run, done and metrics.ended)
        if point.finished:
            return point
    streams = plan.streams(point.run["streams"] if point else None)
    bn_batch_size = _bn_batch_size(plan, streams, directory)
    checkpoint.set_aside_unused(directory.checkpoints, path)
    metrics.forget_after(point.run["progress"]["step"] if point else 0)
    launch = environment(plan.ranks.world_size, device_name(plan.ranks))
    groups = plan.mesh.branch_groups
    launch |= {"branch_groups": groups, "bn_batch_size": bn_batch_size}
    if not directory.holds_run:  # before the config, by which it holds one
        source.keep(directory.data, plan.files)
    directory.create(config, classes, launch, names if names != list(classes) else ())
    return point


def _bn_batch_size(plan: Plan, streams: Streams, directory: RunDirectory) -> int:
    """Images per batch norm statistic; warns where they were others in the last launch of the run.

    Raises UserError if `model.bn_batch_size` is impossible on these ranks, or on those that a run resumes on.
    """
    try:
        images = plan.bn_batch_size(streams)
    except UserError as error:
        if streams.count == plan.ranks.world_size:
            raise
        raise UserError(f"{error}; the run began on {streams.count} ranks, and can resume on as many") from None
    before = directory.last_launch.get("bn_batch_size", images)
    if images != before:
        logger.warning("batch norm over {} images from now on; it was over {}", images, before)
    return images


def _require_same_teacher(run: checkpoint.State, plan: Plan, path: Path) -> None:
    """Raises UserError if a run would go on with another teacher than it has learned from."""
    learned, teacher = run.get("teacher"), plan.teacher  # none noted in a checkpoint of an earlier version
    if learned and teacher and learned["digest"] != teacher.digest:
        raise UserError(
            f"distillation.teacher: {teacher.name}: not the weights that {path} has learned from, which were those of "
            f"{learned['name']}; distillation.checkpoint chooses the step"
        )


def device_name(ranks: Ranks) -> str:
    return torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"


def capture(session: Session, progress: Progress, meter: Meter) -> dict[str, checkpoint.State]:
    """This rank's files of a checkpoint, copied to the host: its streams and its share of its branches.

    Replicas share the work of writing their branches. Running statistics in branch files are the mean over replicas;
    those of each rank are saved with its streams.
    """
    config, mesh, streams, networks = session.config, session.mesh, session.streams, session.networks
    buffers = [buffer.clone() for buffer in networks.buffers()]
    files: dict[str, checkpoint.State] = {
        checkpoint.stream_file(s): {"loader": state, "buffers": buffers}
        for s, state in zip(streams.own, session.loader.states(), strict=True)
    }
    losses = meter.state()
    if mesh.ranks.is_first:
        files[checkpoint.RUN] = {
            "format": checkpoint.FORMAT,
            "config": resolved(config),
            "classes": session.plan.train_files.classes,
            "data": session.plan.digests,
            "teacher": session.plan.teacher_state,
            "progress": asdict(progress),
            "branches": list(config.split.numbers),
            "streams": streams.count,
            "world_size": mesh.ranks.world_size,
            "branch_groups": mesh.branch_groups,
            "losses": losses,
            **session.active.state(),
        }
    with mesh.mean_buffers(networks):
        for i, learner in enumerate(session.learners):
            if i % mesh.replicas == mesh.replica:
                files[checkpoint.branch_file(session.numbers[i])] = learner.state_dict()
        copies: dict[str, checkpoint.State] = checkpoint.on_host(files)
    return copies


def restore(point: ResumePoint, session: Session, meter: Meter) -> Progress:
    """Loads a checkpoint into this rank's networks, optimizers and meter; returns the run's progress."""
    progress, mesh, ranks = Progress(**point.run["progress"]), session.mesh, session.mesh.ranks
    for number, learner in zip(session.numbers, session.learners, strict=True):
        learner.load_state_dict(ranks.each(partial(checkpoint.read, point.path, checkpoint.branch_file(number))))
    meter.load(point.run["losses"])
    session.active.load(point.run)
    logger.info(f"resuming after step {progress.step} (epoch {progress.epoch:.2f})")
    began = session.config.with_values({"train": {"epochs": point.run["config"]["train"]["epochs"]}})
    if began.train.epochs < session.config.train.epochs:
        logger.info(_extension(began, session.config, progress.step, session.plan.steps_per_epoch))
    if not point.fits(mesh):  # running statistics per rank do not apply; keep the mean from the branch file
        logger.info(
            f"this checkpoint was written by {point.run['world_size']} ranks with {point.run['branch_groups']} branch "
            f"groups; resuming on {ranks.world_size} with {mesh.branch_groups}: same images in the same steps, but "
            "dropout, running statistics, summation order and, unless model.bn_batch_size fixes it, the images of a "
            "batch-norm batch differ"
        )
        return progress
    stream = checkpoint.stream_file(ranks.rank * point.run["streams"] // ranks.world_size)
    own = ranks.each(partial(checkpoint.read, point.path, stream))
    for buffer, value in zip(session.networks.buffers(), own["buffers"], strict=True):
        buffer.copy_(value)
    return progress


def _extension(began: RunConfig, config: RunConfig, step: int, steps_per_epoch: int) -> str:
    """What a larger `train.epochs` does to the learning rate after `step` steps."""
    last, planned = (schedules.lr_at(s, steps_per_epoch, began) for s in (step - 1, step))
    following = schedules.lr_at(step, steps_per_epoch, config)
    over = f"extended from {began.train.epochs} to {config.train.epochs} epochs; the schedule ({config.schedule.type})"
    if following == planned:
        return f"{over} does not depend on their number: lr was {last:.3g} in the last step and is {following:.3g} now"
    jump = "jumps up" if following > last else "goes down" if following < last else "goes on"
    return f"{over} is that of {config.train.epochs} epochs from now on: lr {jump} from {last:.3g} to {following:.3g}"
