"""The training loop, read from top to bottom."""

from __future__ import annotations

import time
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

from bandsplit.config.schema import RunConfig
from bandsplit.distributed.ranks import joined, rank
from bandsplit.errors import Interrupted
from bandsplit.evaluation.evaluate import evaluate, report_left_out
from bandsplit.models.ensemble import Ensemble
from bandsplit.runs import checkpoint
from bandsplit.runs.directory import RunDirectory
from bandsplit.runs.events import Events
from bandsplit.runs.logs import logged
from bandsplit.runs.metrics import Metrics, Stopwatch
from bandsplit.runs.saver import Saver
from bandsplit.tracking.launch import Followers
from bandsplit.tracking.tracker import require
from bandsplit.training import interruption, schedules, state
from bandsplit.training.active import held_out_losses
from bandsplit.training.bad_images import BadImages
from bandsplit.training.branches import describe
from bandsplit.training.console import Console, log_finished, log_memory, log_start, log_stop
from bandsplit.training.meter import Meter, Progress
from bandsplit.training.profile import Profile
from bandsplit.training.session import Plan, Session


def train(config: RunConfig, run_dir: Path, resume: bool = False, own_only: bool = False) -> None:
    """Trains the ensemble of a config and writes the run directory; every rank must call it.

    `own_only`: resume only a run of the same launch by torchrun.

    Raises UserError for mistakes that the user can fix, if possible before anything is written, and Interrupted if a
    signal has stopped the run.
    """
    directory = RunDirectory(run_dir)
    with (
        logged(directory.logs, rank()) as log_file,
        interruption.noticed() as interrupted,
        joined(config.parallel.timeout_seconds) as ranks,
        ExitStack() as stack,
    ):
        # ------------------------------------------------------------------ run directory, networks, data
        ranks.from_first(partial(require, config.log.trackers))
        found = ranks.from_first(partial(directory.check, config, resume, own_only))  # before hours of examining images
        restores = ranks.from_first(lambda: bool(checkpoint.saved(directory.checkpoints)))
        before = directory.data if resume else None
        plan = Plan.of(config.with_values(found), ranks, before, lambda: interrupted.signal, restores)
        config = plan.config
        point = ranks.from_first(partial(state.open_run, directory, plan, stack))
        if point and point.finished:
            log_finished(point, directory)
            return
        log_file.open()
        streams = plan.streams(point.run["streams"] if point else None)
        stream_states = point.stream_states(streams, ranks) if point else None
        session = Session(plan, streams, stream_states, positions=directory.path)
        stack.callback(session.loader.close)
        validation_loader, active = session.validation_loader(), session.active
        stops_early = config.train.early_stop_patience is not None
        held_out_loader = session.validation_loader(plan.held_out_files) if stops_early else None
        log_start(session, directory)

        # ------------------------------------------------------------------ resume
        meter = Meter(session.mesh, config)
        progress = state.restore(point, session, meter) if point else Progress()
        watch, metrics = Stopwatch(progress.seconds), Metrics(directory.metrics)
        saver = stack.enter_context(Saver(directory.checkpoints, config, ranks))
        console = Console(session, directory, progress.step) if ranks.is_first else None
        events = Events()
        if console:
            events = Events(metrics.write, console, Followers(directory, config.log.trackers))
        window = config.train.profile if console else ()
        profile = stack.enter_context(Profile(window, directory.profile, watch, ranks.device))
        bad_images = stack.enter_context(BadImages(directory.bad_images, session, events.emit, progress.step))

        describes = ranks.from_first(lambda: not directory.branches.exists())

        # ------------------------------------------------------------------ loop
        meter.start(progress)
        launched_at, stopped_by = progress.step, 0
        while progress.step < plan.total_steps and not active.all_stopped and not stopped_by:
            stopped_by, minutes_are_over = saver.agree(interrupted.signal)
            step, epoch = progress.step + 1, progress.step // plan.steps_per_epoch
            ends_epoch = step % plan.steps_per_epoch == 0
            every = config.checkpoint.every_steps
            saves = ends_epoch or bool(stopped_by) or minutes_are_over or (every is not None and step % every == 0)

            lr = schedules.lr_at(progress.step, plan.steps_per_epoch, config)
            momentum = schedules.momentum_at(progress.step, plan.steps_per_epoch, config)
            session.loader.resize(config.image_size_at(epoch))
            with meter.waiting_for_data():
                parts = session.feed.take(streams.parts, ahead=not saves)
            if describes:
                with watch.paused():
                    describe(directory, session, parts)
                describes = False
            training = [i for i, k in enumerate(session.mesh.own) if active.train(k, epoch)]
            watched = session.watched_step() if console and progress.step == launched_at + 1 else None
            with watched or nullcontext(), profile.step(step):
                outcomes = session.step(training, parts, step, lr, momentum)
            for i, outcome in outcomes.items():
                meter.note(i, outcome, step)
            if watched:
                with watch.paused():
                    log_memory(session.memory_of(watched, parts), ranks.device, session.overlapping)
            progress.advance(config.train.batch_size, plan.steps_per_epoch)
            if console:
                console.step()

            logs = ends_epoch or step % config.train.log_every == 0
            if logs or saves:
                meter.require_finite(step, plan.steps_per_epoch, session.learners if saves else ())
                bad_images.tell(step)
            if logs:
                events.emit("train", **meter.line(progress, watch), lr=lr, image_size=session.loader.size)

            due = round(progress.epoch) % config.validation.every == 0 or step == plan.total_steps
            if ends_epoch and due and active.count_begun(epoch):
                validated = Ensemble(learner.validated for learner in session.learners)
                with watch.paused(), session.mesh.mean_buffers(validated):
                    began = time.perf_counter()
                    mesh, precision, begun = session.mesh, plan.precision, active.begun(epoch)
                    accuracy = evaluate(validated, validation_loader, len(plan.val_files), mesh, precision, begun)
                    if held_out_loader is not None:
                        images = len(plan.held_out_files)
                        active.note(held_out_losses(validated, held_out_loader, images, mesh, precision), step, epoch)
                    session.ensemble.train()
                report_left_out(accuracy.left_out, validation_loader, config, ranks)
                progress.note_validation(accuracy.as_dict(), watch.seconds, active.count_begun(epoch))
                spent = time.perf_counter() - began
                events.emit("validation", **progress.validation, **active.values, validation_seconds=round(spent, 3))

            if saves:
                with watch.paused():
                    progress.seconds = watch.seconds
                    saver.settle()
                    saver.save(step, state.capture(session, progress, meter), streams.count)
        saver.settle()

        # ------------------------------------------------------------------ end
        if stopped_by and progress.step < plan.total_steps and not active.all_stopped:
            if console:
                console.close()
                log_stop(stopped_by, progress.step)
            raise Interrupted(stopped_by)
        events.emit("end", **progress.validation, best_top1=progress.best_top1, best_step=progress.best_step)
