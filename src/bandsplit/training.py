"""The training loop, read from top to bottom."""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from bandsplit import checkpoint, dataset, interruption, normalization, parallel, recipe, runlog, seeds
from bandsplit.dataset import Pictures
from bandsplit.ensemble import Ensemble, parameters_of_branches
from bandsplit.errors import Interrupted, ToldElsewhere, UserError
from bandsplit.evaluation import evaluate
from bandsplit.loader import Deliveries, TrainingLoader, ValidationLoader, share_of
from bandsplit.parallel import Mesh, Ranks
from bandsplit.recipe import Precision
from bandsplit.runlog import Metrics, RunDirectory, Stopwatch
from bandsplit.schema import RunConfig

_NEVER = torch.iinfo(torch.int64).max


def train(config: RunConfig, run_dir: Path, resume: bool = False) -> None:
    """Trains the ensemble of a config into a run directory; every rank calls it.

    Raises UserError for what the user can mend, before anything is written where that is possible, and Interrupted
    where a signal has stopped the run.
    """
    timeout = config.parallel.timeout_seconds
    with interruption.noticed() as interrupted, parallel.ranks(timeout) as ranks, ExitStack() as stack:
        # ------------------------------------------------------------------ pictures, mesh and run directory
        train_pictures, val_pictures = dataset.open_data(config.data)
        steps_per_epoch = config.steps_per_epoch(len(train_pictures))
        total_steps = config.train.epochs * steps_per_epoch
        precision = Precision(config.train.precision, ranks.device)
        parameters = parameters_of_branches(config)
        mesh = Mesh(
            ranks, len(parameters), parallel.branch_groups(config, ranks.world_size, parameters, precision.half_bands)
        )
        directory = RunDirectory(run_dir)
        before = ranks.from_first(partial(_take_directory, directory, config, resume, mesh, stack))
        runlog.start_logging(directory, ranks.rank)
        metrics = Metrics(directory.metrics)

        # ------------------------------------------------------------------ branches and what feeds them
        streams = Streams(config, before, ranks)
        norm_batch = normalization.norm_batch(config, streams.batch_size * mesh.branch_groups, mesh.rows)
        ensemble = Ensemble.of(config, mesh.own)
        for branch in ensemble.branches:
            normalization.fit(branch, norm_batch, streams.batch_size * mesh.branch_groups, mesh)
        ensemble = ensemble.to(ranks.device).to(memory_format=torch.channels_last)
        learners = [Learner(branch, config, precision, mesh) for branch in ensemble.branches]
        torch.manual_seed(seeds.derived(config.seed, "training", ranks.rank))
        loader = streams.loader(train_pictures, precision)
        deliveries = Deliveries(loader, mesh)
        batch_size = config.validation.batch_size or streams.batch_size
        validation_loader = ValidationLoader(
            config, val_pictures, share_of(config, ranks, batch_size, precision.half_bands)
        )

        # ------------------------------------------------------------------ where the last checkpoint left them
        progress, meter = Progress(), Meter(mesh)
        _log_start(config, directory, parameters, (len(train_pictures), len(val_pictures)), norm_batch, mesh, precision)
        if before is not None:
            progress = Progress(**before.run["progress"])
            _restore(before, config, ensemble, learners, meter, mesh)
            _log_resumed(before, progress, mesh)
            if ranks.is_first:
                metrics.forget_after(progress.step)
        saver = Saver(directory.checkpoints, config, ranks)

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
            with meter.waiting_for_data():
                parts = deliveries.take(streams.parts, ahead=not saves)
            for i, learner in enumerate(learners):
                loss = learner.step([part.inputs[i] for part in parts], [part.labels for part in parts], lr)
                meter.note(i, loss, step)
            progress.advance(config.train.batch_size, steps_per_epoch)
            bar.update()

            logs = ends_epoch or step % config.train.log_every == 0
            if (logs or saves) and config.train.on_nonfinite == "stop":
                meter.require_finite(config, steps_per_epoch)
            if logs:
                line = meter.line(progress, watch)
                bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['images_per_second']:.0f} img/s")
                if ranks.is_first:
                    metrics.write("train", **line, lr=lr)
                    logger.debug(_describe_training(line, lr, config))

            best = False
            if ends_epoch and (round(progress.epoch) % config.validation.every == 0 or step == total_steps):
                with watch.paused(), mesh.mean_buffers(ensemble):
                    began = time.perf_counter()
                    accuracy = evaluate(ensemble, validation_loader, len(val_pictures), mesh, precision)
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
                    files = _snapshot(config, progress, ensemble, learners, meter, streams, loader, mesh)
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
    streams = Streams(config, before, mesh.ranks)
    norm_batch = normalization.norm_batch(config, streams.batch_size * mesh.branch_groups, mesh.rows)
    checkpoint.clean_up(directory.checkpoints, path)
    environment = runlog.environment(mesh.ranks.world_size, _device_name(mesh.ranks))
    directory.create(config, {**environment, "branch_groups": mesh.branch_groups, "norm_batch": norm_batch})
    return before


class Streams:
    """Streams of pictures: as many as the run had ranks when it began, shared out evenly among those it has now.

    Raises UserError where that cannot be.
    """

    def __init__(self, config: RunConfig, before: Before | None, ranks: Ranks) -> None:
        self.count: int = ranks.world_size if before is None else before.run["streams"]
        if self.count % ranks.world_size:
            possible = [str(n) for n in range(self.count, 0, -1) if self.count % n == 0]
            raise UserError(
                f"{before and before.path}: this run began on {self.count} ranks; it can go on with "
                f"{' or '.join(possible)}, not with {ranks.world_size}"
            )
        each = self.count // ranks.world_size
        self.own = range(ranks.rank * each, (ranks.rank + 1) * each)
        self.batch_size = config.rank_batch_size(self.count)
        """Pictures of a stream at once."""
        self.parts = each * config.train.accumulation
        """Batches of a rank's streams in one optimizer step."""
        self._config, self._before, self._ranks = config, before, ranks

    def loader(self, pictures: Pictures, precision: Precision) -> TrainingLoader:
        share = share_of(self._config, self._ranks, self.batch_size, precision.half_bands)
        threads = max(1, share.threads // len(self.own))
        shares = [replace(share, rank=s, world_size=self.count, threads=threads) for s in self.own]
        before = self._before
        states = (
            [checkpoint.read(before.path, checkpoint.stream_file(s))["loader"] for s in self.own] if before else None
        )
        return TrainingLoader(self._config, pictures, shares, states)


class Learner:
    """One branch, its optimizer and its loss scale; independent of all others."""

    def __init__(self, branch: nn.Module, config: RunConfig, precision: Precision, mesh: Mesh) -> None:
        self.optimizer = recipe.optimizer(branch.parameters(), config.optim)
        self.lr_factor = 1.0
        """Below 1 where `train.on_nonfinite = "lower_lr"` has lowered the learning rate."""
        self._module, self._branch = branch, mesh.replicate(branch)
        self._precision = precision
        self._scaler = precision.scaler()
        self._on_nonfinite = config.train.on_nonfinite

    def step(self, inputs: Sequence[Tensor], labels: Sequence[Tensor], lr: float) -> Tensor | None:
        """One optimizer step over the parts of a batch, (B, channels, h, w) each; returns the mean loss, a scalar.

        Activations and gradients of this branch are gone when it returns.  None: gradients were not finite and
        nothing has changed, as `train.on_nonfinite` wants it.
        """
        buffers = [buffer.clone() for buffer in self._module.buffers()] if self._on_nonfinite != "stop" else []
        for group in self.optimizer.param_groups:
            group["lr"] = lr * self.lr_factor
        mean_loss = torch.zeros((), device=inputs[0].device)
        for i, (x, y) in enumerate(zip(inputs, labels, strict=True)):
            with self._reducing_gradients(i == len(inputs) - 1):
                with self._precision.autocast():
                    loss = cross_entropy(self._branch(x), y) / len(inputs)
                self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            mean_loss += loss.detach()
        left_out = self._on_nonfinite != "stop" and not self._gradients_are_finite()
        if left_out:
            for buffer, before in zip(self._module.buffers(), buffers, strict=True):
                buffer.copy_(before)
            if self._on_nonfinite == "lower_lr":
                self.lr_factor /= 2
        else:
            self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return None if left_out else mean_loss

    def _gradients_are_finite(self) -> bool:
        """The same on every rank, after gradients were averaged; waits for the device."""
        self._scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self._module.parameters() if p.grad is not None]
        return bool(torch.nn.utils.get_total_norm(gradients).isfinite())

    def _reducing_gradients(self, last: bool) -> AbstractContextManager[None]:
        """Gradients travel between ranks once a step: with the last part."""
        branch = self._branch
        return nullcontext() if last or not isinstance(branch, DistributedDataParallel) else branch.no_sync()

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "lr_factor": self.lr_factor,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self.lr_factor = state["lr_factor"]


@dataclass
class Progress:
    """How far a run is; part of every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    epoch: float = 0.0
    images: int = 0
    seconds: float = 0.0
    """Of training, validation and checkpoints not counted."""
    best_step: int = 0
    best_top1: float = -1.0
    validation: dict[str, Any] = field(default_factory=dict)
    """The last validation."""

    def advance(self, images: int, steps_per_epoch: int) -> None:
        self.step += 1
        self.epoch = self.step / steps_per_epoch
        self.images += images

    def note_validation(self, accuracy: dict[str, Any], seconds: float) -> bool:
        """Keeps the accuracy of this step; returns whether its top-1 is the best so far."""
        self.validation = {
            "step": self.step, "epoch": self.epoch, "seconds": round(seconds, 3), "images": self.images, **accuracy
        }  # fmt: skip
        best: bool = accuracy["top1"] > self.best_top1
        if best:
            self.best_step, self.best_top1 = self.step, accuracy["top1"]
        return best


class Meter:
    """Losses of all branches since the last line of metrics, on the device, and the speed."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh, device = mesh, mesh.ranks.device
        self._sums = torch.zeros(2, mesh.branches, dtype=torch.float64, device=device)
        """Losses, and how many steps they are of."""
        self._nonfinite = torch.full((mesh.branches,), _NEVER, dtype=torch.int64, device=device)
        """First step of each branch with a loss that is not finite."""

    def start(self, progress: Progress) -> None:
        """Begins to measure the speed; on resuming, the losses go on from the checkpoint."""
        self._images, self._seconds, self._waited = progress.images, progress.seconds, 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def note(self, i: int, loss: Tensor | None, step: int) -> None:
        """Loss of one of this rank's branches in a step; None: it was left out."""
        k = self._mesh.own[i]
        if loss is None:
            if self._mesh.row == 0:
                logger.error(f"branch {k}: gradients of step {step} are not finite; the step was left out")
            return
        self._sums[0, k] += loss
        self._sums[1, k] += 1
        self._nonfinite[k].clamp_(max=torch.where(loss.isfinite(), _NEVER, step))

    def require_finite(self, config: RunConfig, steps_per_epoch: int) -> None:
        """Raises UserError where a loss was not finite on any rank since the run began; waits for the device."""
        first = self._mesh.ranks.smallest(self._nonfinite.clone()).tolist()
        k = min(range(len(first)), key=first.__getitem__)
        if first[k] != _NEVER:
            lr = recipe.lr_at(first[k] - 1, steps_per_epoch, config)
            number = config.split.numbers[k]
            raise UserError(
                f"branch {number}: the loss of step {first[k]} is not finite (learning rate {lr:.3g}); the last good "
                "checkpoint is kept. A lower optim.lr or a longer schedule.warmup_epochs may help, "
                'or train.on_nonfinite = "skip" or "lower_lr"'
            )

    def line(self, progress: Progress, watch: Stopwatch) -> dict[str, Any]:
        """Values of a "train" line; waits for the device."""
        sums, counts = self._mesh.ranks.sum(self._sums).tolist()
        branch_loss = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
        known = [loss for loss in branch_loss if loss is not None]
        seconds = watch.seconds
        spent = seconds - self._seconds
        line = {
            "step": progress.step,
            "epoch": progress.epoch,
            "seconds": round(seconds, 3),
            "images": progress.images,
            "loss": sum(known) / len(known) if known else None,
            "branch_loss": branch_loss,
            "images_per_second": round((progress.images - self._images) / spent, 2),
            "data_wait": round(self._waited / spent, 4),
            "peak_memory_mib": round(_peak_memory_mib(self._mesh.ranks.device), 1),
        }
        self._sums.zero_()
        self._images, self._seconds, self._waited = progress.images, seconds, 0.0
        return line

    def state(self) -> Tensor:
        """Sums over all ranks."""
        return self._mesh.ranks.sum(self._sums.clone())

    def load(self, state: Tensor) -> None:
        if self._mesh.ranks.is_first:  # the others go on from nothing: only sums over ranks count
            self._sums.copy_(state)


class Saver:
    """When checkpoints are written, and whether they were: what the ranks have to agree on."""

    def __init__(self, folder: Path, config: RunConfig, ranks: Ranks) -> None:
        self._folder, self._config, self._ranks = folder, config, ranks
        self._writer = checkpoint.Writer(folder, ranks.is_first, config.checkpoint.keep)
        self._last = time.monotonic()

    def agree(self, signal_here: int) -> tuple[int, bool]:
        """A signal that any rank has received (0: none), and whether `checkpoint.every_minutes` are over.

        Raises UserError where this rank could not write the last checkpoint, ToldElsewhere where another could not.
        """
        minutes = self._config.checkpoint.every_minutes
        over = self._ranks.is_first and minutes is not None and time.monotonic() - self._last >= 60 * minutes
        signal_anywhere, over_anywhere, failed = self._ranks.largest([signal_here, over, self._failed])
        self._end_if(failed)
        return signal_anywhere, bool(over_anywhere)

    def settle(self) -> None:
        """Waits until the last checkpoint is written on every rank; raises as `agree` does."""
        deadline = time.monotonic() + self._config.parallel.timeout_seconds
        while True:
            busy, failed, late = self._ranks.largest([self._writer.busy, self._failed, time.monotonic() > deadline])
            self._end_if(failed)
            if not busy:
                return
            if late:
                raise UserError(f"{self._folder}: a checkpoint is still not written; does the file system answer?")
            time.sleep(0.01)

    def save(self, step: int, files: Mapping[str, checkpoint.State], streams: int, best: bool) -> None:
        names = checkpoint.files_of(self._config.split.numbers, streams)
        self._writer.start(step, files, names, best)
        self._last = time.monotonic()

    @property
    def _failed(self) -> int:
        """0: nothing; otherwise larger, the earlier this rank comes, since the first of those that failed tells it."""
        return self._ranks.world_size - self._ranks.rank if self._writer.error is not None else 0

    def _end_if(self, failed: int) -> None:
        if failed:
            self._writer.give_up()
            raise self._writer.error if self._writer.error and failed == self._failed else ToldElsewhere()


def _snapshot(
    config: RunConfig,
    progress: Progress,
    ensemble: Ensemble,
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
    own = {"random": _random_state(mesh.ranks), "buffers": [buffer.clone() for buffer in ensemble.buffers()]}
    files: dict[str, checkpoint.State] = {
        checkpoint.stream_file(s): {"loader": state, **own}
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
    with mesh.mean_buffers(ensemble):
        for i, (branch, learner) in enumerate(zip(ensemble.branches, learners, strict=True)):
            if i % mesh.rows == mesh.row:
                name = checkpoint.branch_file(config.split.numbers[mesh.own[i]])
                files[name] = {"network": branch.state_dict(), **learner.state_dict()}
        copies: dict[str, checkpoint.State] = checkpoint.on_host(files)
    return copies


def _restore(
    before: Before, config: RunConfig, ensemble: Ensemble, learners: Sequence[Learner], meter: Meter, mesh: Mesh
) -> None:
    for k, branch, learner in zip(mesh.own, ensemble.branches, learners, strict=True):
        state = checkpoint.read(before.path, checkpoint.branch_file(config.split.numbers[k]))
        branch.load_state_dict(state["network"])
        learner.load_state_dict(state)
    meter.load(before.run["losses"])
    ranks = mesh.ranks
    if not before.fits(mesh):  # this rank's own random numbers and statistics are nobody's: go on from the means
        return
    own = checkpoint.read(before.path, checkpoint.stream_file(ranks.rank * before.run["streams"] // ranks.world_size))
    for buffer, value in zip(ensemble.buffers(), own["buffers"], strict=True):
        buffer.copy_(value)
    torch.set_rng_state(own["random"]["cpu"])
    if ranks.device.type == "cuda":
        torch.cuda.set_rng_state(own["random"]["cuda"], ranks.device)


def _random_state(ranks: Ranks) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return state


def _peak_memory_mib(device: torch.device) -> float:
    """Of this rank: on a GPU the tensors' memory, on a CPU the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


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
    logger.info(
        f"{config.name}: {branches} x {config.model.arch} on bands of {size} x {size}, "
        f"{sum(parameters) / 1e6:.1f} M params"
    )
    logger.info(f"{pictures[0]} training and {pictures[1]} validation pictures from {config.data.root}")
    logger.info(f"{ranks.world_size} ranks on {_device_name(ranks)}; run directory {directory.path}")
    sent = parallel.traffic(config, ranks.world_size, mesh.branch_groups, parameters, precision.half_bands)
    logger.info(
        f"each rank trains {sent.branches} of {branches} branches and sends {sent.bytes / 1e6:,.1f} MB a step; "
        f"batch normalisation sees {norm_batch} pictures"
    )


def _log_resumed(before: Before, progress: Progress, mesh: Mesh) -> None:
    logger.info(f"resuming after step {progress.step} (epoch {progress.epoch:.2f})")
    if not before.fits(mesh):
        run = before.run
        logger.info(
            f"{run['world_size']} ranks with {run['branch_groups']} groups of branches wrote this checkpoint, "
            f"{mesh.ranks.world_size} with {mesh.branch_groups} go on: the same pictures in the same steps; not exactly"
            " the same: random numbers within networks, running statistics, the order in which gradients are added, "
            "and the pictures that batch normalisation sees where model.norm_batch does not fix them"
        )


def _describe_training(line: dict[str, Any], lr: float, config: RunConfig) -> str:
    return (
        f"epoch {line['epoch']:.2f}/{config.train.epochs}  step {line['step']}  loss {line['loss']:.4f}  lr {lr:.3g}  "
        f"{line['images_per_second']:.0f} img/s  data wait {100 * line['data_wait']:.0f} %"
    )


def _describe_validation(values: dict[str, Any], config: RunConfig) -> str:
    branches = values["branch_top1"]
    best_branch = f"  best branch {max(branches):.2f} %" if len(branches) > 1 else ""
    return (
        f"epoch {values['epoch']:.0f}/{config.train.epochs}  top-1 {values['top1']:.2f} %  "
        f"top-5 {values['top5']:.2f} %{best_branch}  {values['seconds']:.0f} s"
    )
