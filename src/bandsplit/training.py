"""The training loop, read from top to bottom."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import nn
from tqdm import tqdm

from bandsplit import checkpoint, interruption, normalization, parallel, recipe, runlog, seeds
from bandsplit.ensemble import Ensemble, parameters_of_branches
from bandsplit.errors import Interrupted, UserError
from bandsplit.evaluation import evaluate
from bandsplit.learner import Learner, learners_of
from bandsplit.loader import Deliveries, Streams, StreamState, TrainingLoader, ValidationLoader, open_data, share_of
from bandsplit.meter import Meter, Progress
from bandsplit.parallel import Mesh, Ranks
from bandsplit.recipe import Precision
from bandsplit.runlog import Metrics, RunDirectory, Stopwatch
from bandsplit.schema import RunConfig
from bandsplit.trained import Teacher


def train(config: RunConfig, run_dir: Path, resume: bool = False) -> None:
    """Trains the ensemble of a config into a run directory; every rank calls it.

    Raises UserError for what the user can mend, before anything is written where that is possible, and Interrupted
    where a signal has stopped the run.
    """
    timeout = config.parallel.timeout_seconds
    with interruption.noticed() as interrupted, parallel.ranks(timeout) as ranks, ExitStack() as stack:
        # ------------------------------------------------------------------ pictures, mesh and run directory
        train_pictures, val_pictures = open_data(config, ranks)
        steps_per_epoch = config.steps_per_epoch(len(train_pictures))
        total_steps = config.train.epochs * steps_per_epoch
        precision = Precision(config.train.precision, ranks.device)
        precision.apply()
        teacher = ranks.each(partial(Teacher.of, config, precision))
        half, parameters = precision.half_bands, parameters_of_branches(config)
        mesh = Mesh(ranks, len(parameters), parallel.branch_groups(config, ranks.world_size, parameters, half))
        directory = RunDirectory(run_dir)
        before = ranks.from_first(partial(_take_directory, directory, config, resume, mesh, stack))
        runlog.start_logging(directory, ranks.rank)
        metrics = Metrics(directory.metrics)

        # ------------------------------------------------------------------ branches and what feeds them
        streams = Streams(config, before.run["streams"] if before else ranks.world_size, ranks)
        at_once = streams.batch_size * mesh.branch_groups
        norm_batch = normalization.norm_batch(config, at_once, mesh.rows)
        ensemble, learners = learners_of(config, at_once, precision, mesh)
        networks = nn.ModuleList([ensemble, *(learner.ema for learner in learners if learner.ema is not None)])
        numbers = [config.split.numbers[k] for k in mesh.own]
        loader = streams.loader(train_pictures, half, before.loader_states(streams) if before else None, teacher)
        deliveries = Deliveries(loader, mesh)
        share = share_of(config, ranks, config.validation.batch_size or streams.batch_size, half)
        validation_loader = ValidationLoader(config, val_pictures, share)

        # ------------------------------------------------------------------ where the last checkpoint left them
        progress, meter = Progress(), Meter(mesh, config.split.numbers)
        _log_start(config, directory, parameters, (len(train_pictures), len(val_pictures)), norm_batch, mesh, precision)
        if teacher is not None:
            logger.info(f"learns from {teacher.name}")
        if before is not None:
            progress = Progress(**before.run["progress"])
            _restore(before, config, networks, learners, meter, mesh)
            _log_resumed(before, progress, mesh)
            if ranks.is_first:
                metrics.forget_after(progress.step)
        saver = checkpoint.Saver(directory.checkpoints, config, ranks)

        # ------------------------------------------------------------------ loop
        watch = Stopwatch(progress.seconds)
        meter.start(progress)
        bar = tqdm(total=total_steps, initial=progress.step, unit="step", disable=None if ranks.is_first else True)
        stopped_by = 0
        while progress.step < total_steps and not stopped_by:
            stopped_by, minutes_are_over = saver.agree(interrupted.signal)
            step = progress.step + 1
            ends_epoch = step % steps_per_epoch == 0
            every = config.checkpoint.every_steps
            saves = ends_epoch or bool(stopped_by) or minutes_are_over or (every is not None and step % every == 0)

            lr = recipe.lr_at(progress.step, steps_per_epoch, config)
            momentum = recipe.momentum_at(progress.step, steps_per_epoch, config)
            loader.resize(config.image_size_at(progress.step // steps_per_epoch))
            with meter.waiting_for_data():
                parts = deliveries.take(streams.parts, ahead=not saves)
            labels, taught = [part.labels for part in parts], [part.taught for part in parts]
            for i, learner in enumerate(learners):
                # for dropout and the like, whatever else this rank trains
                torch.manual_seed(seeds.derived(config.seed, f"branch {numbers[i]} step {step}", mesh.row))
                loss = learner.step([part.inputs[i] for part in parts], labels, lr, momentum, taught)
                meter.note(i, loss, step, lr)
            progress.advance(config.train.batch_size, steps_per_epoch)
            bar.update()

            logs = ends_epoch or step % config.train.log_every == 0
            if (logs or saves) and config.train.on_nonfinite == "stop":
                meter.require_finite(config, steps_per_epoch)
            if logs:
                line = meter.line(progress, watch)
                bar.set_postfix_str(f"loss {_loss(line)}, {line['images_per_second']:.0f} img/s")
                if ranks.is_first:
                    metrics.write("train", **line, lr=lr, image_size=loader.size)
                    logger.debug(_describe_training(line, lr, config))

            best = False
            if ends_epoch and (round(progress.epoch) % config.validation.every == 0 or step == total_steps):
                validated = Ensemble(learner.validated for learner in learners)
                with watch.paused(), mesh.mean_buffers(validated):
                    began = time.perf_counter()
                    accuracy = evaluate(validated, validation_loader, len(val_pictures), mesh, precision)
                    ensemble.train()
                best = progress.note_validation(accuracy.as_dict(), watch.seconds)
                if ranks.is_first:
                    spent = time.perf_counter() - began
                    metrics.write("validation", **progress.validation, validation_seconds=round(spent, 3))
                    logger.info(_describe_validation(progress.validation, config))

            if saves:
                with watch.paused():
                    progress.seconds = watch.seconds
                    saver.settle()
                    files = _snapshot(config, progress, networks, learners, meter, streams, loader, mesh)
                    saver.save(step, files, streams.count, best)
        saver.settle()
        bar.close()

        # ------------------------------------------------------------------ end
        if stopped_by:
            if ranks.is_first:
                name = signal.Signals(stopped_by).name
                logger.info(f"stopped by {name} after step {progress.step}; the same command with --resume goes on")
            raise Interrupted(stopped_by)
        if ranks.is_first:
            metrics.write("end", **progress.validation, best_top1=progress.best_top1, best_step=progress.best_step)
            logger.info(f"done after {progress.seconds:.0f} s of training; plots: python src/report.py {run_dir}")


@dataclass(frozen=True)
class Before:
    """The checkpoint that a run goes on from."""

    path: Path
    run: checkpoint.State

    def loader_states(self, streams: Streams) -> list[StreamState]:
        states = [checkpoint.read(self.path, checkpoint.stream_file(s))["loader"] for s in streams.own]
        if not all(isinstance(state, dict) for state in states):
            raise UserError(f"{self.path}: written by an earlier version, which this one cannot go on from")
        return states

    def fits(self, mesh: Mesh) -> bool:
        """Whether as many ranks wrote it as go on, with the same branches each."""
        return (self.run["world_size"], self.run["branch_groups"]) == (mesh.ranks.world_size, mesh.branch_groups)


def _take_directory(
    directory: RunDirectory, config: RunConfig, resume: bool, mesh: Mesh, stack: ExitStack
) -> Before | None:
    """On the first rank: checks and locks the run directory, and finds what there is to go on from."""
    directory.check(config, resume)
    stack.enter_context(directory.locked())
    path = checkpoint.latest(directory.checkpoints)
    before = None if path is None else Before(path, checkpoint.read(path, checkpoint.RUN))
    streams = Streams(config, before.run["streams"] if before else mesh.ranks.world_size, mesh.ranks)
    norm_batch = normalization.norm_batch(config, streams.batch_size * mesh.branch_groups, mesh.rows)
    checkpoint.clean_up(directory.checkpoints, path)
    environment = runlog.environment(mesh.ranks.world_size, _device_name(mesh.ranks))
    directory.create(config, {**environment, "branch_groups": mesh.branch_groups, "norm_batch": norm_batch})
    return before


def _snapshot(
    config: RunConfig,
    progress: Progress,
    networks: nn.Module,
    learners: Sequence[Learner],
    meter: Meter,
    streams: Streams,
    loader: TrainingLoader,
    mesh: Mesh,
) -> dict[str, checkpoint.State]:
    """This rank's files of a checkpoint, copied to the host: those of its streams and its part of its branches'.

    Ranks that train the same branches take turns in writing them; running statistics are the mean over those ranks, and
    each rank's own lie beside its stream.
    """
    buffers = [buffer.clone() for buffer in networks.buffers()]
    files: dict[str, checkpoint.State] = {
        checkpoint.stream_file(s): {"loader": state, "buffers": buffers}
        for s, state in zip(streams.own, loader.states(), strict=True)
    }
    losses = meter.state()
    if mesh.ranks.is_first:
        files[checkpoint.RUN] = {
            "config": runlog.resolved(config),
            "progress": asdict(progress),
            "branches": list(config.split.numbers),
            "streams": streams.count,
            "world_size": mesh.ranks.world_size,
            "branch_groups": mesh.branch_groups,
            "losses": losses,
        }
    with mesh.mean_buffers(networks):
        for i, learner in enumerate(learners):
            if i % mesh.rows == mesh.row:
                files[checkpoint.branch_file(config.split.numbers[mesh.own[i]])] = learner.state_dict()
        copies: dict[str, checkpoint.State] = checkpoint.on_host(files)
    return copies


def _restore(
    before: Before, config: RunConfig, networks: nn.Module, learners: Sequence[Learner], meter: Meter, mesh: Mesh
) -> None:
    for k, learner in zip(mesh.own, learners, strict=True):
        learner.load_state_dict(checkpoint.read(before.path, checkpoint.branch_file(config.split.numbers[k])))
    meter.load(before.run["losses"])
    ranks = mesh.ranks
    if not before.fits(mesh):  # nobody's statistics are this rank's own: go on from the means
        return
    own = checkpoint.read(before.path, checkpoint.stream_file(ranks.rank * before.run["streams"] // ranks.world_size))
    for buffer, value in zip(networks.buffers(), own["buffers"], strict=True):
        buffer.copy_(value)


def _device_name(ranks: Ranks) -> str:
    return torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"


def _log_start(
    config: RunConfig,
    directory: RunDirectory,
    parameters: Sequence[int],
    pictures: tuple[int, int],
    norm_batch: int,
    mesh: Mesh,
    precision: Precision,
) -> None:
    ranks, branches = mesh.ranks, len(parameters)
    size = config.data.image_size // config.split.block
    logger.info(f"{config.name}: {config.networks} on bands of {size} x {size}, {sum(parameters) / 1e6:.1f} M params")
    logger.info(f"{pictures[0]} training and {pictures[1]} validation pictures from {config.data.root}")
    several = ranks.world_size > 1
    logger.info(f"{ranks.world_size} rank{'s' * several} on {_device_name(ranks)}; run directory {directory.path}")
    sent = parallel.traffic(config, ranks.world_size, mesh.branch_groups, parameters, precision.half_bands)
    share = f"each trains {sent.branches} of {branches} branches and sends {sent.bytes / 1e6:,.1f} MB a step; "
    logger.info(f"{share if several else ''}batch normalisation over {norm_batch} pictures")


def _log_resumed(before: Before, progress: Progress, mesh: Mesh) -> None:
    logger.info(f"resuming after step {progress.step} (epoch {progress.epoch:.2f})")
    if not before.fits(mesh):
        run = before.run
        logger.info(
            f"{run['world_size']} ranks with {run['branch_groups']} groups of branches wrote this checkpoint, "
            f"{mesh.ranks.world_size} with {mesh.branch_groups} go on: the same pictures in the same steps; not exactly"
            " the same: dropout and the like, running statistics, the order in which gradients are added, "
            "and the pictures that batch normalisation sees where model.norm_batch does not fix them"
        )


def _loss(line: dict[str, Any]) -> str:
    return "none" if line["loss"] is None else f"{line['loss']:.4f}"


def _describe_training(line: dict[str, Any], lr: float, config: RunConfig) -> str:
    return (
        f"epoch {line['epoch']:.2f}/{config.train.epochs}  step {line['step']}  loss {_loss(line)}  lr {lr:.3g}  "
        f"{line['images_per_second']:.0f} img/s  data wait {100 * line['data_wait']:.0f} %"
    )


def _describe_validation(values: dict[str, Any], config: RunConfig) -> str:
    branches = values["branch_top1"]
    best_branch = f"  best branch {max(branches):.2f} %" if len(branches) > 1 else ""
    return (
        f"epoch {values['epoch']:.0f}/{config.train.epochs}  top-1 {values['top1']:.2f} %  "
        f"top-5 {values['top5']:.2f} %{best_branch}  {values['seconds']:.0f} s"
    )
