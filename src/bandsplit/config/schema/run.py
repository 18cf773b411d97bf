"""The complete config: all tables, and checks across them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    Field,
    ValidationError,
    model_validator,
)

from bandsplit.config.schema.augment import Augment
from bandsplit.config.schema.base import Table, is_list, mistake
from bandsplit.config.schema.data import Data
from bandsplit.config.schema.fusion import Fusion
from bandsplit.config.schema.loss import CrossEntropy, Distillation, Loss, Mix
from bandsplit.config.schema.model import Branch, Model
from bandsplit.config.schema.optim import Optim
from bandsplit.config.schema.schedule import Cosine, Linear, Schedule
from bandsplit.config.schema.split import Split
from bandsplit.config.schema.train import Checkpoint, Log, Parallel, Train, Validation
from bandsplit.errors import UserError


class RunConfig(Table):
    """The complete config of a run."""

    name: str = Field(min_length=1)
    """What the run is called: in its directory, logs and reports."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Initial weights, order of the images, crops, flips and all augmentation follow from it."""
    data: Data
    model: Model
    split: Split = Split()
    branch: Annotated[tuple[Branch, ...], Field(strict=False)] = ()
    """One table per branch, instead of `split.branches`; empty: every branch uses [model]."""
    augment: Augment = Augment()
    optim: Optim
    """`type` is "sgd" unless it is given."""
    schedule: Schedule = Cosine()
    """`type` is "cosine" unless it is given."""
    loss: Loss = CrossEntropy()
    """`type` is "cross_entropy" unless it is given."""
    distillation: Distillation | None = None
    mix: Mix = Mix()
    train: Train
    parallel: Parallel = Parallel()
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()
    fusion: Fusion = Fusion()
    log: Log = Log()

    @model_validator(mode="before")
    @classmethod
    def _bands_of_branches(cls, given: Any) -> Any:
        """Sets `split.branches` from the bands in [[branch]]."""
        branches = given.get("branch") if isinstance(given, dict) else None
        tables = [b.model_dump() if isinstance(b, Branch) else b for b in branches] if is_list(branches) else []
        if not tables or not all(isinstance(table, dict) and is_list(table.get("bands")) for table in tables):
            return given  # nothing to do, or a mistake that the validation of [[branch]] reports
        split = given.get("split", {})
        split = split.model_dump() if isinstance(split, Split) else split
        if not isinstance(split, dict):
            return given
        bands, said = [list(table["bands"]) for table in tables], split.get("branches", "each")
        if said != "each" and [list(g) if is_list(g) else g for g in (said if is_list(said) else [said])] != bands:
            raise mistake("split.branches", said, f"unset, since [[branch]] gives {bands}")
        return {**given, "split": {**split, "branches": bands}}

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        for number in range(len(self.branch)):
            self._check_branch(number)
        block = self.split.block
        for key, size in (("image_size", self.data.image_size), ("val_image_size", self.data.val_size)):
            if size % block:
                divisors = [str(s) for s in range(1, 33) if size % s == 0]
                allowed = f"a divisor of data.{key} = {size}: {', '.join(divisors)}"
                raise mistake("split.block", block, allowed)
        models = [self.model, *(self.model_of(k) for k in range(len(self.branch)))]
        if any(model.takes_one_size for model in models):
            allowed = "unset for networks with a fixed input size (VGG, AlexNet, and timm's)"
            if self.data.val_size != self.data.image_size:
                raise mistake("data.val_image_size", self.data.val_image_size, allowed)
            if self.augment.progressive is not None:
                raise mistake("augment.progressive.min_size", self.augment.progressive.min_size, allowed)
        if self.train.activation_checkpointing and (others := [m.arch for m in models if not m.can_recompute]):
            allowed = f"false with {others[0]!r}; true is supported by torchvision's networks, but for inception_v3"
            raise mistake("train.activation_checkpointing", True, allowed)
        if self.train.activation_checkpointing and self.train.compile:
            raise mistake("train.compile", True, "false with train.activation_checkpointing = true")
        self._check_progressive()
        self._check_bands()
        if self.schedule.warmup_epochs >= self.train.epochs:
            allowed = f"less than train.epochs = {self.train.epochs}"
            raise mistake("schedule.warmup_epochs", self.schedule.warmup_epochs, allowed)
        if isinstance(self.schedule, Cosine | Linear) and self.schedule.lr_min > self.peak_lr:
            raise mistake("schedule.lr_min", self.schedule.lr_min, f"at most optim.lr = {self.peak_lr}")
        if self.train.precision == "fp16" and self.train.on_nonfinite == "lower_lr":
            allowed = "'stop' or 'skip' with fp16, where loss scaling produces gradients that are not finite"
            raise mistake("train.on_nonfinite", "lower_lr", allowed)
        if self.train.batch_size % self.grad_accum_steps:
            allowed = f"a multiple of train.grad_accum_steps = {self.grad_accum_steps}"
            raise mistake("train.batch_size", self.train.batch_size, allowed)
        self._check_active()
        profile = self.train.profile
        if profile and (len(profile) != 2 or profile[0] > profile[1]):
            raise mistake("train.profile", list(profile), "the first step and the last, such as [20, 25]")
        if self.fusion.method != "mean" and self.data.holdout is None:
            allowed = "'mean', unless data.holdout takes images out of training, on which all others are fitted"
            raise mistake("fusion.method", self.fusion.method, allowed)
        return self

    def _check_active(self) -> None:
        patience, starts = self.train.early_stop_patience, self.train.start_epochs
        if patience is not None and self.data.holdout is None:
            allowed = "unset, unless data.holdout takes images out of training, on which losses are measured"
            raise mistake("train.early_stop_patience", patience, allowed)
        if patience is not None and self.distillation is not None and self.distillation.residual:
            allowed = "unset with distillation.residual = true, since held-out losses are those of the branches alone"
            raise mistake("train.early_stop_patience", patience, allowed)
        branches = self.split.count
        if starts and (len(starts) != branches or min(starts) > 0 or max(starts) >= self.train.epochs):
            allowed = f"an epoch below {self.train.epochs} for each of {branches} branches, with a 0 among them"
            raise mistake("train.start_epochs", list(starts), allowed)

    def _check_progressive(self) -> None:
        progressive, block, size = self.augment.progressive, self.split.block, self.data.image_size
        if progressive is None:
            return
        for key in ("min_size", "multiple"):
            given = getattr(progressive, key)
            if given % block:
                raise mistake(f"augment.progressive.{key}", given, f"a multiple of split.block = {block}")
        if progressive.min_size >= size:
            raise mistake("augment.progressive.min_size", progressive.min_size, f"less than data.image_size = {size}")
        if progressive.ramp_end >= self.train.epochs:
            allowed = f"less than train.epochs = {self.train.epochs}"
            raise mistake("augment.progressive.ramp_end", progressive.ramp_end, allowed)

    def _check_bands(self) -> None:
        """Images in a band store are resized already: what needs their pixels is told in one message."""
        if self.data.kind != "bands":
            return
        augment = self.augment
        needed = {
            "data.scale": (self.data.scale, (1.0, 1.0)),
            "data.ratio": (self.data.ratio, (1.0, 1.0)),
            "augment.auto": (augment.auto, None),
            "augment.color": (augment.color, None),
            "augment.pca_noise": (augment.pca_noise, 0.0),
            "augment.erasing": (augment.erasing, None),
            "augment.repeats": (augment.repeats, 1),
            "augment.progressive": (augment.progressive, None),
        }
        wrong = {key: (given, only) for key, (given, only) in needed.items() if given != only}
        if wrong:
            settings = ", ".join(
                f"{key} = {'none' if only is None else list(only) if isinstance(only, tuple) else only}"
                for key, (_, only) in wrong.items()
            )
            key, (given, _) = next(iter(wrong.items()))
            shown = list(given) if isinstance(given, tuple) else getattr(given, "type", given)
            raise mistake(key, shown, f"with data.kind = 'bands' only {settings}; a band store holds no pixels")

    def _check_branch(self, number: int) -> None:
        """[[branch]] and [model] together must give a valid network."""
        try:
            self.model_of(number)
        except ValidationError as error:
            wrong = error.errors()[0]
            context = wrong["ctx"]
            key = context.get("key", "model.arch").removeprefix("model.")
            if key in Branch.model_fields:
                raise mistake(f"branch.{number}.{key}", context["given"], context["allowed"]) from None
            allowed = f"an architecture that supports model.{key} = {context['given']!r}"
            raise mistake(f"branch.{number}.arch", self.branch[number].arch, allowed) from None

    def model_of(self, number: int) -> Model:
        """The network of a branch; `number` is its index in the full ensemble."""
        if not self.branch:
            return self.model
        own = self.branch[number].model_dump(exclude={"bands"}, exclude_none=True)
        return Model.model_validate({**self.model.model_dump(), **own}) if own else self.model

    @property
    def classes(self) -> int:
        """Number of classes, as given or as the data has; raises UserError where neither is known yet."""
        if self.data.classes is None:
            raise UserError(f"data.classes: not given, and {self.data.root} was not read to count them")
        return self.data.classes

    def with_classes(self, count: int) -> RunConfig:
        """The same config with `data.classes = count`."""
        return self.with_values({"data": {"classes": count}})

    def with_values(self, values: Mapping[str, Mapping[str, Any]]) -> RunConfig:
        """The same config with other values of some keys of its tables, which are not checked."""
        tables = {name: getattr(self, name).model_copy(update=keys) for name, keys in values.items()}
        return self.model_copy(update=tables)

    @property
    def grad_accum_steps(self) -> int:
        """`train.grad_accum_steps`; 1 where it is still to be found."""
        steps = self.train.grad_accum_steps
        return 1 if steps == "auto" else steps

    @property
    def networks(self) -> str:
        """The networks of this run in words: `4 x resnet18`, or `1 x resnet34, 3 x resnet18 of width 0.5`."""
        models = [self.model_of(number) for number in self.split.numbers]
        kinds = [f"{m.arch} of width {m.width:g}" if m.width != self.model.width else m.arch for m in models]
        return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))

    @property
    def peak_lr(self) -> float:
        """`optim.lr`, scaled to the batch size if `optim.base_batch` is set (Goyal et al., 2017; Krizhevsky, 2014)."""
        optim = self.optim
        factor = self.train.batch_size / optim.base_batch if optim.base_batch else 1.0
        return optim.lr * (factor if optim.scaling == "linear" else factor**0.5)

    def image_size_at(self, epoch: int) -> int:
        """Side in pixels of the training images of epoch 0, 1, …"""
        progressive, size = self.augment.progressive, self.data.image_size
        if progressive is None or epoch >= progressive.ramp_end:
            return size
        done = max(0, epoch - progressive.ramp_start) / (progressive.ramp_end - progressive.ramp_start)
        rounded = round((progressive.min_size + done * (size - progressive.min_size)) / progressive.multiple)
        return min(size, max(progressive.min_size, rounded * progressive.multiple))

    def steps_per_epoch(self, images: int) -> int:
        """Full batches in `images` images; the remainder starts the next epoch.

        Raises UserError if there is not one full batch.
        """
        steps = images // self.train.batch_size
        if not steps:
            raise UserError(f"train.batch_size: {self.train.batch_size} given, but the data has {images} images")
        return steps

    def rank_batch_size(self, world_size: int) -> int:
        """Images per rank and gradient accumulation step.

        Raises UserError if the batch cannot be divided evenly over `world_size` ranks.
        """
        parts = world_size * self.grad_accum_steps
        if self.train.batch_size % parts:
            below = self.train.batch_size // parts * parts
            raise UserError(
                f"train.batch_size: {self.train.batch_size} given, "
                f"but {world_size} ranks with train.grad_accum_steps = {self.grad_accum_steps} need a multiple "
                f"of {parts}, for example {' or '.join(str(b) for b in (below, below + parts) if b)}"
            )
        return self.train.batch_size // parts
