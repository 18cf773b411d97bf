"""Terminal output of a training run: a progress bar, and a log line for each event."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from typing import Any

import torch
from loguru import logger

from bandsplit.commands import command
from bandsplit.distributed.traffic import step_traffic
from bandsplit.models import networks
from bandsplit.progress import Progress, duration
from bandsplit.runs.directory import RunDirectory
from bandsplit.training.memory import MIB, Memory
from bandsplit.training.session import Session
from bandsplit.training.state import ResumePoint, device_name


class Console:
    """Listener that logs the run's events; `step` advances the progress bar. `done`: steps done before this launch."""

    def __init__(self, session: Session, directory: RunDirectory, done: int) -> None:
        self._epochs, self._path = session.config.train.epochs, directory.path
        total = session.plan.total_steps
        self._bar = Progress("training", total, "steps", done, lines=False)  # the log has lines of its own
        self._left, self._began = total - done, time.monotonic()
        self._taken = 0

    def step(self) -> None:
        self._bar.advance()
        self._taken += 1

    def close(self) -> None:
        self._bar.close()

    def __call__(self, event: str, **values: Any) -> None:
        match event:
            case "train":
                self._bar.note(f"loss {_loss(values)}, {values['images_per_second']:.0f} img/s")
                logger.debug(
                    f"epoch {values['epoch']:.2f}/{self._epochs}  step {values['step']}  loss {_loss(values)}  "
                    f"lr {values['lr']:.3g}  {values['images_per_second']:.0f} img/s  "
                    f"data wait {100 * values['data_wait']:.0f} %  {self._time_left()} left"
                )
            case "validation":
                branches: Sequence[float] = values["branch_top1"]
                best_branch = f"  best branch {max(branches):.2f} %" if len(branches) > 1 else ""
                logger.info(
                    f"epoch {values['epoch']:.0f}/{self._epochs}  top-1 {values['top1']:.2f} %  "
                    f"top-5 {values['top5']:.2f} %{best_branch}  {values['seconds']:.0f} s"
                )
            case "end":
                self.close()
                logger.info(
                    f"done after {values['seconds']:.0f} s of training; plots: {command('report')} {self._path}"
                )

    def _time_left(self) -> str:
        """As this launch has gone so far, validation included."""
        return duration((time.monotonic() - self._began) / max(1, self._taken) * (self._left - self._taken))


def _loss(values: dict[str, Any]) -> str:
    return "none" if values["loss"] is None else f"{values['loss']:.4f}"


def log_stop(number: int, step: int) -> None:
    """Logs the signal that stopped the run, and the last step."""
    name = signal.Signals(number).name
    logger.info(f"stopped by {name} after step {step}; the same command with --resume continues")


def log_memory(memory: Memory, device: torch.device, streams: int) -> None:
    """Logs what a step took on rank 0. `streams`: how many branches will take a step at the same time."""
    peak = (
        f", {torch.cuda.max_memory_allocated(device) / MIB:,.0f} MiB by the allocator" if device.type == "cuda" else ""
    )
    later = f"; {streams} branches at once need more" if streams > 1 else ""
    logger.info(f"memory of a step: {memory}{peak}{later}")


def log_finished(point: ResumePoint, directory: RunDirectory) -> None:
    """Logs that the run to resume is already finished."""
    progress = point.run["progress"]
    logger.info(
        f"{directory.path} is finished: {progress['step']} steps, best top-1 {progress['best_top1']:.2f} % at step "
        f"{progress['best_step']}; nothing was written"
    )


def log_start(session: Session, directory: RunDirectory) -> None:
    """Logs networks, data, ranks, traffic and batch norm of a run that is about to start."""
    config, plan, mesh = session.config, session.plan, session.mesh
    ranks, parameters = mesh.ranks, plan.parameters
    size = config.data.image_size // config.split.block
    logger.info(f"{config.name}: {config.networks} on bands of {size} x {size}, {sum(parameters) / 1e6:.1f} M params")
    held_out = f" ({len(plan.held_out_files)} more are held out)" * bool(len(plan.held_out_files))
    counts = f"{len(plan.train_files)} training{held_out} and {len(plan.val_files)} validation images"
    logger.info(f"{counts} from {config.data.root}")
    several = ranks.world_size > 1
    logger.info(f"{ranks.world_size} rank{'s' * several} on {device_name(ranks)}; run directory {directory.path}")
    sent = step_traffic(config, ranks.world_size, mesh.branch_groups, plan.trained, plan.precision.half_bands)
    share = f"each trains {sent.branches} of {len(parameters)} branches and sends {sent.bytes / 1e6:,.1f} MB per step; "
    logger.info(f"{share if several else ''}batch norm over {plan.bn_batch_size(session.streams)} images")
    _log_what_is_tuned(session)
    if plan.teacher is not None:
        logger.info(f"distills from {plan.teacher.name}")


def _log_what_is_tuned(session: Session) -> None:
    """Logs what `train.freeze` and `optim.layer_decay` do to the branches of this rank."""
    config = session.config
    if config.train.freeze:
        trained = networks.count_trained(session.ensemble) / networks.count_parameters(session.ensemble)
        logger.info(f"frozen: {', '.join(config.train.freeze)}; {100 * trained:.1f} % of the params are trained")
    if config.optim.layer_decay < 1:
        scales = [group["lr_scale"] for learner in session.learners for group in learner.optimizer.param_groups]
        lowest, highest = min(scales), max(scales)
        logger.info(
            f"lr of layers: {lowest:.3g} of the schedule's in the first that is trained, {highest:.3g} in the last"
        )
