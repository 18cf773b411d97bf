"""The training loop, read from top to bottom."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from bandsplit import checkpoint, dataset, parallel, recipe, runlog, seeds
from bandsplit.ensemble import Ensemble
from bandsplit.errors import UserError
from bandsplit.evaluation import evaluate
from bandsplit.loader import TrainingLoader, ValidationLoader, share_of
from bandsplit.models import count_parameters
from bandsplit.parallel import Ranks
from bandsplit.recipe import Precision
from bandsplit.runlog import Metrics, RunDirectory, Stopwatch
from bandsplit.schema import RunConfig


def train(config: RunConfig, run_dir: Path, resume: bool = False) -> None:
    """Trains the ensemble of a config into a run directory; every rank calls it.

    Raises UserError for what the user can mend, before anything is written where that is possible.
    """
    with parallel.ranks() as ranks:
        # ------------------------------------------------------------------ pictures and run directory
        train_pictures, val_pictures = dataset.open_data(config.data)
        steps_per_epoch = config.steps_per_epoch(len(train_pictures))
        total_steps = config.train.epochs * steps_per_epoch
        batch_size = config.rank_batch_size(ranks.world_size)
        directory = RunDirectory(run_dir)
        directory.check(config, resume)
        state = _last_checkpoint(directory, ranks)
        ranks.wait()  # all have looked before the first one writes
        if ranks.is_first:
            directory.create(config, runlog.environment(ranks.world_size, _device_name(ranks)))
        ranks.wait()
        runlog.start_logging(directory, ranks.rank)
        metrics = Metrics(directory.metrics)

        # ------------------------------------------------------------------ branches and what feeds them
        precision = Precision(config.train.precision, ranks.device)
        ensemble = Ensemble.of(config).to(ranks.device).to(memory_format=torch.channels_last)
        learners = [Learner(branch, config, precision, ranks) for branch in ensemble.branches]
        torch.manual_seed(seeds.derived(config.seed, "training", ranks.rank))
        share = share_of(config, ranks, batch_size, precision.half_bands)
        loader = TrainingLoader(config, train_pictures, share, _loader_state(state, ranks))
        share = share_of(config, ranks, config.validation.batch_size or batch_size, precision.half_bands)
        validation_loader = ValidationLoader(config, val_pictures, share)

        # ------------------------------------------------------------------ where the last checkpoint left them
        progress, meter = Progress(), Meter(len(learners), ranks)
        if state is not None:
            progress = Progress(**state["progress"])
            _restore(state, ensemble, learners, meter, ranks)
            if ranks.is_first:
                metrics.forget_after(progress.step)
        _log_start(config, directory, ensemble, progress, len(train_pictures), len(val_pictures), ranks)

        # ------------------------------------------------------------------ loop
        watch = Stopwatch(progress.seconds)
        meter.start(progress)
        bar = tqdm(total=total_steps, initial=progress.step, unit="step", disable=None if ranks.is_first else True)
        while progress.step < total_steps:
            lr = recipe.lr_at(progress.step, steps_per_epoch, config)
            with meter.waiting_for_data():
                parts = [next(loader) for _ in range(config.train.accumulation)]
            for k, learner in enumerate(learners):
                meter.losses[k] += learner.step([part.inputs[k] for part in parts], [part.labels for part in parts], lr)
            progress.advance(config.train.batch_size, steps_per_epoch)
            bar.update()

            ends_epoch = progress.step % steps_per_epoch == 0
            if ends_epoch or progress.step % config.train.log_every == 0:
                line = meter.line(progress, watch)
                bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['images_per_second']:.0f} img/s")
                if ranks.is_first:
                    metrics.write("train", **line, lr=lr)
                    logger.debug(_describe_training(line, lr, config))

            best = False
            if ends_epoch and (round(progress.epoch) % config.validation.every == 0 or progress.step == total_steps):
                with watch.paused():
                    began = time.perf_counter()
                    ranks.share_buffers(ensemble)
                    accuracy = evaluate(ensemble, validation_loader, len(val_pictures), ranks, precision)
                    ensemble.train()
                best = progress.note_validation(accuracy.as_dict(), watch.seconds)
                if ranks.is_first:
                    spent = time.perf_counter() - began
                    metrics.write("validation", **progress.validation, validation_seconds=round(spent, 3))
                    logger.info(_describe_validation(progress.validation, config))

            every = config.checkpoint.every_steps
            if ends_epoch or (every and progress.step % every == 0):
                with watch.paused():
                    progress.seconds = watch.seconds
                    state = _snapshot(config, progress, ensemble, learners, meter, loader, ranks)
                    if ranks.is_first:
                        checkpoint.save(directory.checkpoints, progress.step, state, best)
                    ranks.wait()
        bar.close()

        # ------------------------------------------------------------------ end
        if ranks.is_first:
            metrics.write("end", **progress.validation, best_top1=progress.best_top1, best_step=progress.best_step)
            logger.info(f"done after {progress.seconds:.0f} s of training; plots: python src/report.py {run_dir}")


class Learner:
    """One branch, its optimizer and its loss scale; independent of all others."""

    def __init__(self, branch: nn.Module, config: RunConfig, precision: Precision, ranks: Ranks) -> None:
        self.optimizer = recipe.optimizer(branch.parameters(), config.optim)
        self._branch = ranks.replicate(branch)
        self._precision = precision
        self._scaler = precision.scaler()

    def step(self, inputs: Sequence[Tensor], labels: Sequence[Tensor], lr: float) -> Tensor:
        """One optimizer step over the parts of a batch, (B, channels, h, w) each; returns the mean loss, a scalar.

        Activations and gradients of this branch are gone when it returns.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        mean_loss = torch.zeros((), device=inputs[0].device)
        for i, (x, y) in enumerate(zip(inputs, labels, strict=True)):
            with self._reducing_gradients(i == len(inputs) - 1):
                with self._precision.autocast():
                    loss = cross_entropy(self._branch(x), y) / len(inputs)
                self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            mean_loss += loss.detach()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return mean_loss

    def _reducing_gradients(self, last: bool) -> AbstractContextManager[None]:
        """Gradients travel between ranks once a step: with the last part."""
        branch = self._branch
        return nullcontext() if last or not isinstance(branch, DistributedDataParallel) else branch.no_sync()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])


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
    """Losses since the last line of metrics, on the device, and the speed."""

    def __init__(self, branches: int, ranks: Ranks) -> None:
        self.losses = torch.zeros(branches, dtype=torch.float64, device=ranks.device)
        self._since_step = 0
        self._ranks = ranks

    def start(self, progress: Progress) -> None:
        """Begins to measure the speed; on resuming, the losses go on from the checkpoint."""
        self._images, self._seconds, self._waited = progress.images, progress.seconds, 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def line(self, progress: Progress, watch: Stopwatch) -> dict[str, Any]:
        """Values of a "train" line; the one place in the loop that waits for the device."""
        losses = self._ranks.sum(self.losses) / ((progress.step - self._since_step) * self._ranks.world_size)
        branch_loss = losses.tolist()
        seconds = watch.seconds
        spent = seconds - self._seconds
        line = {
            "step": progress.step,
            "epoch": progress.epoch,
            "seconds": round(seconds, 3),
            "images": progress.images,
            "loss": sum(branch_loss) / len(branch_loss),
            "branch_loss": branch_loss,
            "images_per_second": round((progress.images - self._images) / spent, 2),
            "data_wait": round(self._waited / spent, 4),
            "peak_memory_mib": round(_peak_memory_mib(self._ranks.device), 1),
        }
        self.losses.zero_()
        self._since_step = progress.step
        self._images, self._seconds, self._waited = progress.images, seconds, 0.0
        return line

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "since_step": self._since_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses.copy_(state["losses"])
        self._since_step = state["since_step"]


def _last_checkpoint(directory: RunDirectory, ranks: Ranks) -> checkpoint.State | None:
    path = directory.checkpoints / "last.pt"
    if not path.exists():
        return None
    state = checkpoint.load(path)
    if len(state["ranks"]) != ranks.world_size:
        raise UserError(f"{path}: written by {len(state['ranks'])} ranks; resume with as many, not {ranks.world_size}")
    return state


def _loader_state(state: checkpoint.State | None, ranks: Ranks) -> bytes | None:
    return None if state is None else state["ranks"][ranks.rank]["loader"]


def _snapshot(
    config: RunConfig,
    progress: Progress,
    ensemble: Ensemble,
    learners: Sequence[Learner],
    meter: Meter,
    loader: TrainingLoader,
    ranks: Ranks,
) -> checkpoint.State:
    """All that a run needs to go on exactly; the same on every rank but for buffers and losses, where rank 0 counts."""
    own = {"loader": loader.state(), "random": _random_state(ranks), "meter": meter.state_dict()}
    return {
        "config": runlog.resolved(config),
        "progress": asdict(progress),
        "ensemble": ensemble.state_dict(),
        "learners": [learner.state_dict() for learner in learners],
        "ranks": ranks.gather(own),
    }


def _restore(
    state: checkpoint.State, ensemble: Ensemble, learners: Sequence[Learner], meter: Meter, ranks: Ranks
) -> None:
    ensemble.load_state_dict(state["ensemble"])
    for learner, learner_state in zip(learners, state["learners"], strict=True):
        learner.load_state_dict(learner_state)
    own = state["ranks"][ranks.rank]
    meter.load_state_dict(own["meter"])
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
    ensemble: Ensemble,
    progress: Progress,
    train_pictures: int,
    val_pictures: int,
    ranks: Ranks,
) -> None:
    branches = len(ensemble.branches)
    parameters = count_parameters(ensemble) / 1e6
    size = config.data.image_size // config.split.block
    logger.info(
        f"{config.name}: {branches} x {config.model.arch} on bands of {size} x {size}, {parameters:.1f} M params"
    )
    logger.info(f"{train_pictures} training and {val_pictures} validation pictures from {config.data.root}")
    logger.info(f"{ranks.world_size} ranks on {_device_name(ranks)}; run directory {directory.path}")
    if progress.step:
        logger.info(f"resuming after step {progress.step} (epoch {progress.epoch:.2f})")


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
