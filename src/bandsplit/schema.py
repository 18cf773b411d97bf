"""What a TOML file may say: frozen pydantic models, and `load`, which turns every mistake into one clear message.

Precedence: defaults < train file (and the data file it names) < ``--set key=value``.
Neither torch nor DALI is imported here.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from bandsplit.errors import UserError

Table = dict[str, Any]

Fraction = Annotated[float, Field(ge=0, le=1)]
Channels3 = Annotated[tuple[float, float, float], Field(strict=False)]
Range = Annotated[tuple[float, float], Field(strict=False)]


def _mistake(key: str, given: object, allowed: str) -> PydanticCustomError:
    """A mistake that concerns several keys; `key` is the one to change first."""
    return PydanticCustomError("cross_check", "{allowed}", {"key": key, "given": given, "allowed": allowed})


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Generate(_Table):
    """Pictures made by the project itself when the data folder does not exist."""

    seed: int = Field(0, ge=0)
    train_per_class: int = Field(200, ge=1)
    val_per_class: int = Field(50, ge=1)


class Decoder(_Table):
    """How JPEG files are read and decoded."""

    crop_only: bool | None = None
    """Training: decode only what the random crop shows. Unset: on the CPU yes, on a GPU no, since there DALI's decoder
    for it has been reported to crash (H100)."""
    hw_load: Fraction = 0.65
    """Share of a batch for the JPEG engine of the GPU; one without an engine, such as the A40, ignores it."""
    fancy_upsampling: bool = False
    """GPU: smooth chroma as the CPU's decoder does."""
    device_padding_mib: int = Field(16, ge=0)
    """GPU: MiB reserved a picture on the GPU, so that larger ones need no new allocation while training."""
    host_padding_mib: int = Field(8, ge=0)
    """GPU: the same in pinned memory of the host."""
    read_ahead: int = Field(2, ge=1)
    """Batches of files that are read ahead; more for a network file system."""


class Data(_Table):
    """Where the pictures are and how they become a batch (config/data/*.toml)."""

    name: str = Field(min_length=1)
    root: str = Field(min_length=1)
    """Folder of the data set; `~` and `$VARIABLES` are expanded."""
    train: str = "train"
    """Folder below `root` with one folder a class."""
    val: str = "val"
    classes: int = Field(ge=2)
    image_size: int = Field(224, ge=1)
    """Side in pixels of the square that the network (block = 1) or the split sees."""
    resize_size: int = Field(256, ge=1)
    """Validation: length in pixels of the shorter side before the centre crop."""
    random_area: Range = (0.08, 1.0)
    """Training: share of the picture's area that the random crop covers."""
    random_aspect: Range = (3 / 4, 4 / 3)
    """Training: aspect ratio (width / height) of the random crop."""
    mirror: Fraction = 0.5
    """Training: probability of a horizontal flip."""
    mean: Channels3 = (123.675, 116.28, 103.53)
    """RGB mean in units of the pixel values 0 to 255."""
    std: Channels3 = (58.395, 57.12, 57.375)
    """RGB standard deviation in the same units."""
    threads: int | None = Field(None, ge=1)
    """DALI threads a rank; unset: the machine's cores shared among its ranks."""
    prefetch: int = Field(2, ge=1)
    """Batches that DALI prepares ahead."""
    decoder: Decoder = Decoder()
    generate: Generate | None = None

    @model_validator(mode="after")
    def _check(self) -> Data:
        if self.image_size > self.resize_size:
            raise _mistake("data.image_size", self.image_size, f"at most data.resize_size = {self.resize_size}")
        low, high = self.random_area
        if not 0 < low <= high <= 1:
            raise _mistake("data.random_area", list(self.random_area), "0 < smallest <= largest <= 1")
        low, high = self.random_aspect
        if not 0 < low <= high:
            raise _mistake("data.random_aspect", list(self.random_aspect), "0 < smallest <= largest")
        if min(self.std) <= 0:
            raise _mistake("data.std", list(self.std), "positive numbers")
        return self


def _count_or(key: str, *words: str) -> BeforeValidator:
    """Accepts a positive whole number or one of some words, with one message for everything else."""

    def check(value: object) -> object:
        if value in words or (type(value) is int and value >= 1):
            return value
        raise _mistake(key, value, f"{', '.join(map(repr, words))} or a number from 1")

    return BeforeValidator(check)


class Model(_Table):
    """The network of every branch."""

    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
    """A torchvision architecture."""
    width: float = Field(1.0, gt=0, le=4)
    """Factor on the number of channels of every stage."""
    stem: Literal["standard", "small"] = "standard"
    """`standard`: 7x7 stride 2 and max-pooling; `small`: 3x3 stride 1, no pooling, for small bands."""
    norm_batch: Annotated[Literal["rank", "all"] | int, _count_or("model.norm_batch", "rank", "all")] = "rank"
    """Pictures over which batch normalisation takes its statistics: "rank", those that a rank takes through a branch
    at once, which depends on the number of ranks and on `parallel.branch_groups`; "all", those of all ranks together;
    or a number, which makes accuracy independent of the launch."""


def _branches(value: object) -> object:
    """Accepts "each", "all" or a list of lists of band numbers, with one message for everything else."""
    if value in ("each", "all"):
        return value
    groups = value if isinstance(value, list | tuple) else []
    if groups and all(isinstance(g, list | tuple) and g and all(type(k) is int for k in g) for g in groups):
        return tuple(tuple(g) for g in groups)
    raise _mistake("split.branches", value, '"each", "all" or lists of band numbers such as [[0], [0, 1], [0, 2, 3]]')


def _only(value: object) -> object:
    if value is None:
        return None
    if isinstance(value, list | tuple) and value and all(type(k) is int and k >= 0 for k in value):
        return tuple(value)
    raise _mistake("split.only", value, "numbers of branches, such as [0, 3]")


class Split(_Table):
    """The spectral split and who learns which bands."""

    block: int = Field(1, ge=1, le=32)
    """Side s of the pixel block; s² bands. 1: the ordinary classifier."""
    transform: Literal["dct2d", "dct1d", "hadamard", "identity"] = "dct2d"
    norm: Literal["ortho", "none"] = "ortho"
    """`none`: the un-normalised transform, as the published dct1d runs used it."""
    branches: Annotated[Literal["each", "all"] | tuple[tuple[int, ...], ...], BeforeValidator(_branches)] = "each"
    """Bands of each branch: "each" band its own, "all" in one network, or explicit groups."""
    only: Annotated[tuple[int, ...] | None, BeforeValidator(_only)] = None
    """Numbers of the branches that this run trains; unset: all of them."""

    @property
    def bands(self) -> int:
        return self.block**2

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Band numbers of every branch of this run."""
        groups = self._all_groups()
        return groups if self.only is None else tuple(groups[k] for k in self.only)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Which branch of the whole ensemble each branch of this run is."""
        return self.only or tuple(range(len(self._all_groups())))

    def _all_groups(self) -> tuple[tuple[int, ...], ...]:
        if self.branches == "each":
            return tuple((k,) for k in range(self.bands))
        if self.branches == "all":
            return (tuple(range(self.bands)),)
        return self.branches

    @model_validator(mode="after")
    def _check(self) -> Split:
        groups = self._all_groups()
        if self.only is not None and (len(set(self.only)) < len(self.only) or max(self.only) >= len(groups)):
            raise _mistake("split.only", list(self.only), f"branches 0 to {len(groups) - 1}, each once")
        for group in groups:
            if len(set(group)) != len(group):
                raise _mistake("split.branches", list(group), "each band once in a branch")
            if not all(0 <= k < self.bands for k in group):
                last = self.bands - 1
                raise _mistake("split.branches", list(group), f"bands 0 to {last}, since block = {self.block}")
        if self.transform == "hadamard" and self.block & (self.block - 1):
            raise _mistake("split.block", self.block, 'a power of two with transform = "hadamard"')
        return self


class Optim(_Table):
    """SGD, one optimizer a branch."""

    lr: float = Field(gt=0)
    """Peak learning rate, for the global batch as it is (no scaling rule is applied)."""
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(1e-4, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Optim:
        if self.nesterov and not self.momentum:
            raise _mistake("optim.momentum", self.momentum, "above 0 with optim.nesterov")
        return self


class Schedule(_Table):
    """Learning rate over the steps: linear warm-up, then half a cosine from `optim.lr` to `lr_min`."""

    warmup_epochs: float = Field(0.0, ge=0)
    lr_min: float = Field(0.0, ge=0)


class Train(_Table):
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    """Pictures an optimizer step, over all ranks."""
    accumulation: int = Field(1, ge=1)
    """Parts into which a rank's share of the batch is cut to save memory."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 autocast on a GPU, fp32 on a CPU; `fp16` scales the loss."""
    log_every: int = Field(50, ge=1)
    """Steps between lines of metrics.jsonl."""
    on_nonfinite: Literal["stop", "skip", "lower_lr"] = "stop"
    """What a branch does about a loss (`stop`) or a gradient (the others) that is infinite or not a number: end the run
    with the last good checkpoint; leave the step out; leave it out and halve this branch's learning rate from there
    on. `lower_lr` waits for the device in every step."""


class Parallel(_Table):
    """How branches and pictures are spread over ranks."""

    branch_groups: Annotated[Literal["auto"] | int, _count_or("parallel.branch_groups", "auto")] = "auto"
    """Groups of branches that different ranks train; 1: every rank trains all of them (plain data parallelism).
    "auto": the number that sends the fewest bytes."""
    timeout_seconds: int = Field(300, ge=5)
    """How long ranks wait for each other before the ones that hang are named and the run ends."""


class Validation(_Table):
    every: int = Field(1, ge=1)
    """Epochs between validations; the last epoch is always validated."""
    batch_size: int | None = Field(None, ge=1)
    """Pictures a rank at once; unset: as in training."""


class Checkpoint(_Table):
    every_steps: int | None = Field(None, ge=1)
    """Also write a checkpoint every so many steps; the end of an epoch always writes one."""
    every_minutes: float | None = Field(15.0, gt=0)
    """Also write one when the last is so many minutes old."""
    keep: int = Field(2, ge=1)
    """Checkpoints to keep beside the best one; with 2 there is one to go back to if the last is damaged."""


class RunConfig(_Table):
    """All that determines a run."""

    name: str = Field(min_length=1)
    seed: int = Field(0, ge=0, lt=2**31)
    data: Data
    model: Model
    split: Split = Split()
    optim: Optim
    schedule: Schedule = Schedule()
    train: Train
    parallel: Parallel = Parallel()
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        size, block = self.data.image_size, self.split.block
        if size % block:
            divisors = [str(s) for s in range(1, 33) if size % s == 0]
            allowed = f"a divisor of data.image_size = {size}: {', '.join(divisors)}"
            raise _mistake("split.block", block, allowed)
        if self.schedule.warmup_epochs >= self.train.epochs:
            allowed = f"less than train.epochs = {self.train.epochs}"
            raise _mistake("schedule.warmup_epochs", self.schedule.warmup_epochs, allowed)
        if self.schedule.lr_min > self.optim.lr:
            raise _mistake("schedule.lr_min", self.schedule.lr_min, f"at most optim.lr = {self.optim.lr}")
        if self.train.batch_size % self.train.accumulation:
            allowed = f"a multiple of train.accumulation = {self.train.accumulation}"
            raise _mistake("train.batch_size", self.train.batch_size, allowed)
        return self

    def steps_per_epoch(self, pictures: int) -> int:
        """Whole batches in so many pictures; what is left over opens the next epoch.

        Raises UserError where there is not one.
        """
        steps = pictures // self.train.batch_size
        if not steps:
            raise UserError(f"train.batch_size: {self.train.batch_size} given, but the data has {pictures} pictures")
        return steps

    def rank_batch_size(self, world_size: int) -> int:
        """Pictures that one rank takes through a branch at once.

        Raises UserError where the batch cannot be shared out evenly over `world_size` ranks.
        """
        parts = world_size * self.train.accumulation
        if self.train.batch_size % parts:
            below = self.train.batch_size // parts * parts
            raise UserError(
                f"train.batch_size: {self.train.batch_size} given, "
                f"but {world_size} ranks with train.accumulation = {self.train.accumulation} need a multiple of "
                f"{parts}, for example {' or '.join(str(b) for b in (below, below + parts) if b)}"
            )
        return self.train.batch_size // parts


def load(path: str | Path, overrides: Sequence[str] = (), data: str | Path | None = None) -> RunConfig:
    """Reads a train config and the data config it names (relative to itself), or the file `data` instead.

    `overrides` are ``a.b=value`` with a TOML value (a bare word counts as a string).
    Raises UserError: file, key, what was given, what is allowed, the nearest valid key.
    """
    path = Path(path)
    table = _read(path)
    table.setdefault("name", path.stem)
    sources = _Sources(path)
    if data is None and isinstance(table.get("data"), str):
        data = os.path.normpath(path.parent / table["data"])
    if data is not None:
        table["data"] = {"name": Path(data).stem, **_read(Path(data))}
        sources.add(("data",), str(data))
    for override in overrides:
        keys, value = _parse_override(override)
        _assign(table, keys, value, override)
        sources.add(keys, f"--set {override}")
    try:
        return RunConfig.model_validate(table)
    except ValidationError as error:
        raise UserError("\n".join(_explain(item, sources, table) for item in error.errors())) from None


def _read(path: Path) -> Table:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"{path}: no such config file{hint}")
    try:
        return tomli.loads(path.read_text(encoding="utf-8"))
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def _parse_override(override: str) -> tuple[tuple[str, ...], object]:
    key, separator, text = override.partition("=")
    keys = tuple(key.strip().split("."))
    if not separator or not all(keys):
        raise UserError(f"--set {override}: expected key=value, for example --set optim.lr=0.02")
    try:
        return keys, tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        return keys, text.strip()


def _assign(table: Table, keys: tuple[str, ...], value: object, override: str) -> None:
    for depth, key in enumerate(keys[:-1], start=1):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {override}: {'.'.join(keys[:depth])} is a value, not a table")
    table[keys[-1]] = value


class _Sources:
    """Remembers which file or --set a key came from."""

    def __init__(self, path: Path) -> None:
        self._sources: dict[tuple[str, ...], str] = {(): str(path)}

    def add(self, keys: tuple[str, ...], source: str) -> None:
        self._sources[keys] = source

    def of(self, keys: tuple[str, ...]) -> str:
        """Where `keys`, something below it, or else the nearest table above it was set."""
        below = [source for known, source in self._sources.items() if known[: len(keys)] == keys and keys]
        above = [self._sources[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in self._sources]
        return (below or above)[0]


def _explain(error: Mapping[str, Any], sources: _Sources, table: Table) -> str:
    """One line for one of pydantic's errors."""
    kind, given = error["type"], error["input"]
    loc = tuple(str(part) for part in error["loc"])
    if kind == "cross_check":
        context = error["ctx"]
        loc, given, allowed = tuple(context["key"].split(".")), context["given"], context["allowed"]
        return f"{sources.of(loc)}: {'.'.join(loc)}: {given!r} given; allowed: {allowed}"
    places = [depth for depth, part in enumerate(error["loc"]) if isinstance(part, int)]
    if places or kind in ("too_long", "tuple_type"):
        # a list of numbers: too short, too long or with something else in it
        loc = loc[: places[0]] if places else loc
        return f"{sources.of(loc)}: {'.'.join(loc)}: {_value_at(table, loc)!r} given; expected {_length(loc)} numbers"
    key, source = ".".join(loc), sources.of(loc)
    if kind == "missing":
        return f"{source}: {key}: missing; expected: {_field_type(loc)}"
    if kind == "model_type":
        return f"{source}: {key}: {given!r} given; expected a table [{key}]"
    if kind == "extra_forbidden":
        known = list(_table_at(loc[:-1]).model_fields)
        near = difflib.get_close_matches(loc[-1], known, n=1) or [k for k in _all_keys() if k.endswith("." + loc[-1])]
        hint = f"did you mean {'.'.join((*loc[:-1], near[0])) if near[0] in known else near[0]}?" if near else ""
        where = f"[{'.'.join(loc[:-1])}]" if loc[:-1] else "the top level"
        return f"{source}: {key}: unknown key; {hint or f'allowed in {where}: ' + ', '.join(known)}"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{source}: {key}: {given!r} given; {message.replace('input should', 'it should')}"


def _value_at(table: Table, loc: tuple[str, ...]) -> object:
    for key in loc[:-1]:
        table = table[key]
    return table[loc[-1]]


def _length(loc: tuple[str, ...]) -> int:
    """Number of entries of a key that takes a list of numbers."""
    return len(getattr(_table_at(loc[:-1]).model_fields[loc[-1]].annotation, "__args__", ()))


def _table_at(loc: tuple[str, ...]) -> type[BaseModel]:
    table: type[BaseModel] = RunConfig
    for key in loc:
        annotation = table.model_fields[key].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        table = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return table


def _field_type(loc: tuple[str, ...]) -> str:
    annotation = _table_at(loc[:-1]).model_fields[loc[-1]].annotation
    if isinstance(annotation, type):
        return f"a table [{'.'.join(loc)}]" if issubclass(annotation, BaseModel) else annotation.__name__
    options = getattr(annotation, "__args__", ())
    return " or ".join(repr(option) for option in options if not isinstance(option, type)) or str(annotation)


def _all_keys(table: type[BaseModel] | None = None, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a train config."""
    for name, field in (table or RunConfig).model_fields.items():
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        below = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if below:
            yield from _all_keys(below[0], f"{prefix}{name}.")
        else:
            yield prefix + name
