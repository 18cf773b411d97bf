"""What a TOML file may say: frozen pydantic models.  `configuration.load` fills them from files."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeGuard

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from bandsplit.errors import UserError

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


class Color(_Table):
    """Colours scaled at random, one uniform draw a picture for each key, in DALI's order and by its formulas.

    First saturation and hue: chroma times `saturation` and turned by the hue angle, in YIQ, whose luma they keep; then
    out = brightness · (128 + contrast · (in − 128)), rounded and clamped to 0 .. 255, where torchvision has the mean
    grey of the picture instead of 128.  He et al., Bag of tricks (CVPR 2019): brightness and saturation [0.6, 1.4],
    and hue "from 0.6 to 1.4", which as torchvision's ColorJitter reads it (0.4 of a turn) is 144.
    """

    brightness: Range = (1.0, 1.0)
    """Smallest and largest factor."""
    contrast: Range = (1.0, 1.0)
    saturation: Range = (1.0, 1.0)
    hue: float = Field(0.0, ge=0, le=180)
    """Largest turn of the hue, either way, in degrees."""

    @model_validator(mode="after")
    def _check(self) -> Color:
        for key in ("brightness", "contrast", "saturation"):
            low, high = getattr(self, key)
            if not 0 <= low <= high < float("inf"):
                raise _mistake(f"augment.color.{key}", [low, high], "0 <= smallest <= largest")
        return self


class RandAugment(_Table):
    """`n` random operations of the same strength (Cubuk et al., 2020)."""

    type: Literal["rand_augment"] = "rand_augment"
    operations: Literal["paper", "timm"] = "paper"
    """`paper`: 14, identity among them; `timm`: its 15 of `rand-m…-inc1`, with inversion and additive solarising."""
    probability: Fraction = 1.0
    """Chance of each chosen operation to be applied; timm's is 0.5."""
    n: int = Field(2, ge=1, le=14)
    """Operations a picture, one after the other."""
    m: float = Field(7.0, ge=0, le=10)
    """Strength: 0 none, 10 the most, as in timm; torchvision counts to 30 where this counts to 10."""
    std: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Standard deviation of the strength of each operation on each picture, in units of `m`; the result is clamped to
    0 .. 10 and rounded to 0.01.  Wightman et al., ResNet strikes back (2021): n = 2, m = 7, std = 0.5."""


class AutoAugment(_Table):
    """One of 25 pairs of operations, those learned on ImageNet (Cubuk et al., CVPR 2019)."""

    type: Literal["auto_augment"] = "auto_augment"


class TrivialAugment(_Table):
    """One random operation of 14 with a random strength, from the wide ranges (Müller and Hutter, ICCV 2021)."""

    type: Literal["trivial_augment"] = "trivial_augment"


class Erasing(_Table):
    """Random erasing (Zhong et al., AAAI 2020): a rectangle filled with the data's mean."""

    probability: Fraction = 0.5
    """Share of pictures that lose a rectangle."""
    area: Range = (0.02, 0.4)
    """Smallest and largest share of the picture that it covers."""
    aspect: Range = (0.3, 1 / 0.3)
    """Smallest and largest height / width of it."""

    @model_validator(mode="after")
    def _check(self) -> Erasing:
        low, high = self.area
        if not 0 < low <= high <= 1:
            raise _mistake("augment.erasing.area", [low, high], "0 < smallest <= largest <= 1")
        flattest, tallest = self.aspect
        if not 0 < flattest <= tallest < float("inf"):
            raise _mistake("augment.erasing.aspect", [flattest, tallest], "0 < smallest <= largest")
        if max(flattest, 1 / tallest) * high > 1:
            allowed = f"one that fits into the picture with augment.erasing.area up to {high}"
            raise _mistake("augment.erasing.aspect", [flattest, tallest], allowed)
        return self


class Progressive(_Table):
    """Smaller training pictures at first; every epoch has one size.

    Epochs 0 .. `ramp_start` have `min_size`, those from `ramp_end` on data.image_size, and those between lie on a line
    between the two, rounded to a `multiple`.  FFCV's ImageNet recipe of 88 epochs goes from 160 to 192, 65 to 76.
    """

    min_size: int = Field(ge=1)
    """Side in pixels of the first pictures."""
    ramp_start: int = Field(0, ge=0)
    ramp_end: int = Field(ge=1)
    multiple: int = Field(32, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Progressive:
        if self.ramp_start >= self.ramp_end:
            allowed = f"less than augment.progressive.ramp_end = {self.ramp_end}"
            raise _mistake("augment.progressive.ramp_start", self.ramp_start, allowed)
        return self


def _with_type(table: object) -> object:
    types = ("rand_augment", "auto_augment", "trivial_augment")
    if isinstance(table, dict) and "type" not in table:
        raise _mistake("augment.auto.type", None, ", ".join(map(repr, types)))
    return table


class Augment(_Table):
    """What else happens to training pictures between crop and split, in the order of these keys; by default nothing.

    Each has random numbers of its own: none changes crops, flips, or what another does.
    """

    auto: Annotated[RandAugment | AutoAugment | TrivialAugment | None, BeforeValidator(_with_type)] = Field(
        None, discriminator="type"
    )
    color: Color | None = None
    pca_noise: float = Field(0.0, ge=0, allow_inf_nan=False)
    """σ of the lighting noise (Krizhevsky et al., NIPS 2012, section 4.1, has 0.1): multiples of the principal
    components of ImageNet's colours, three normal numbers a picture, the same for all its pixels."""
    erasing: Erasing | None = None
    repeats: int = Field(1, ge=1)
    """Repeated augmentation (Hoffer et al., CVPR 2020): each picture of a rank's batch is in it so many times, cropped,
    flipped and augmented anew each time; an epoch has as many pictures as before, and so much fewer different ones."""
    progressive: Progressive | None = None


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
    val_image_size: int | None = Field(None, ge=1)
    """Validation: the same; unset: as in training."""
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

    @property
    def val_size(self) -> int:
        """Side in pixels of the squares that are validated."""
        return self.val_image_size or self.image_size

    @model_validator(mode="after")
    def _check(self) -> Data:
        if self.val_size > self.resize_size:
            key = "data.image_size" if self.val_image_size is None else "data.val_image_size"
            raise _mistake(key, self.val_size, f"at most data.resize_size = {self.resize_size}")
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


_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
_MOBILENETS = ("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large")
_WITH_DROPOUT = ("alexnet", "vgg16", "vgg16_bn", *_MOBILENETS, "inception_v3")
_ONLY_FOR = {
    "width": (*_RESNETS, *_MOBILENETS),
    "stem": _RESNETS,
    "tweaks": _RESNETS,
    "zero_gamma": _RESNETS,
    "drop_path": _RESNETS,
    "dropout": _WITH_DROPOUT,
}
"""Keys of [model] that mean something for these architectures of torchvision's alone."""

Stem = Literal["standard", "no_stride", "small"]


def _tweaks(value: object) -> object:
    """Accepts letters, each once, with one message for everything else; keeps them in the order of the alphabet."""
    letters = value if isinstance(value, list | tuple) else ["none"]
    if all(letter in ("b", "c", "d") for letter in letters) and len(set(letters)) == len(letters):
        return tuple(sorted(letters))
    raise _mistake("model.tweaks", value, 'a list of "b", "c" and "d", each at most once')


class Model(_Table):
    """The network of every branch."""

    source: Literal["torchvision", "timm"] = "torchvision"
    """`torchvision`: fitted to the size of a band here; `timm`: any network of timm's (pip install bandsplit[timm])."""
    arch: str
    """A ResNet (resnet18 to resnet152), alexnet, vgg16, vgg16_bn, mobilenet_v2, mobilenet_v3_small, mobilenet_v3_large
    or inception_v3 without its auxiliary head, from 75 x 75 on; or timm's name."""
    width: float = Field(1.0, gt=0, le=4)
    """Factor on the number of channels of every stage."""
    stem: Stem = "standard"
    """`standard`: 7x7 stride 2 and max-pooling; `no_stride`: 7x7 stride 1 and max-pooling, for bands as channels,
    where the split has taken the stride already; `small`: 3x3 stride 1, no pooling, for small bands."""
    tweaks: Annotated[tuple[Literal["b", "c", "d"], ...], BeforeValidator(_tweaks)] = ("b",)
    """Changes to a ResNet (He et al., Bag of Tricks, CVPR 2019): `b` has the stride of a bottleneck in its 3x3, not in
    its first 1x1; `c` has three 3x3 as the first convolution; `d` averages before the 1x1 of a strided shortcut."""
    zero_gamma: bool = False
    """The last norm of every residual block starts at 0, and the block as its shortcut."""
    drop_path: Fraction = 0.0
    """Stochastic depth: probability that a picture skips the last residual block; 0 for the first, linear between."""
    dropout: Fraction | None = None
    """Dropout of the classifier; unset: the architecture's own."""
    init: Literal["default", "xavier_uniform", "kaiming_normal"] = "default"
    """First weights of convolutions and fully connected layers, whose biases then start at 0; `default`: the
    architecture's own."""
    norm_batch: Annotated[Literal["rank", "all"] | int, _count_or("model.norm_batch", "rank", "all")] = "rank"
    """Pictures over which batch normalisation takes its statistics: "rank", those that a rank takes through a branch
    at once, which depends on the number of ranks and on `parallel.branch_groups`; "all", those of all ranks together;
    or a number, which makes accuracy independent of the launch."""

    @property
    def takes_one_size(self) -> bool:
        """Whether the network may be bound to the size of the inputs that it was built for."""
        return self.source == "timm" or self.arch in ("alexnet", "vgg16", "vgg16_bn")

    @field_validator("arch")
    @classmethod
    def _known(cls, arch: str, info: ValidationInfo) -> str:
        known = dict.fromkeys((*_RESNETS, *_WITH_DROPOUT))
        if info.data.get("source") == "torchvision" and arch not in known:
            names = ", ".join(map(repr, known))
            raise PydanticCustomError("unknown_arch", "Input should be {allowed}", {"given": arch, "allowed": names})
        return arch

    @model_validator(mode="after")
    def _check(self) -> Model:
        name = self.arch if self.source == "torchvision" else f"timm's {self.arch}"
        for key, archs in _ONLY_FOR.items():
            given, default = getattr(self, key), type(self).model_fields[key].default
            if given != default and (self.source != "torchvision" or self.arch not in archs):
                only = "unset" if default is None else repr(list(default) if isinstance(default, tuple) else default)
                allowed = f"{only} for {name}; others are for {', '.join(archs)}"
                raise _mistake(f"model.{key}", list(given) if isinstance(given, tuple) else given, allowed)
        if self.source == "timm" and self.norm_batch != "rank":
            raise _mistake("model.norm_batch", self.norm_batch, "'rank' for timm's networks, whose norms are their own")
        return self


def _is_list(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(value, list | tuple)


def _bands(value: object) -> object:
    if isinstance(value, list | tuple) and value and all(type(k) is int for k in value):
        return tuple(value)
    raise _mistake("branch.bands", value, "band numbers, such as [0, 1]")


class Branch(_Table):
    """A branch of its own kind, a table [[branch]] each: what it reads and how it differs from [model]."""

    bands: Annotated[tuple[int, ...], BeforeValidator(_bands)]
    arch: str | None = None
    width: float | None = Field(None, gt=0, le=4)
    stem: Stem | None = None


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


class _Optimizer(_Table):
    """What all optimizers share; each branch has one of its own."""

    lr: float = Field(gt=0)
    """Peak learning rate: for the global batch as it is, or with `base_batch` for a batch of that size."""
    base_batch: int | None = Field(None, ge=1)
    """Batch that `lr` is meant for; it is scaled to train.batch_size."""
    scaling: Literal["linear", "sqrt"] = "linear"
    """With `base_batch`: lr grows with the batch, or with its square root."""
    weight_decay: float = Field(1e-4, ge=0)
    decay_norm_and_bias: bool = True
    """Whether weight decay acts on normalisation and biases too (on everything with one dimension)."""


class SGD(_Optimizer):
    type: Literal["sgd"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False

    @model_validator(mode="after")
    def _check(self) -> SGD:
        if self.nesterov and not self.momentum:
            raise _mistake("optim.momentum", self.momentum, "above 0 with optim.nesterov")
        return self


Betas = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)]


class Adam(_Optimizer):
    """Weight decay is added to the gradient, as Adam has it."""

    type: Literal["adam"] = "adam"
    betas: Betas = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)


class AdamW(_Optimizer):
    """Weight decay acts on the weights alone."""

    type: Literal["adamw"] = "adamw"
    betas: Betas = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)


class RMSprop(_Optimizer):
    type: Literal["rmsprop"] = "rmsprop"
    alpha: float = Field(0.9, gt=0, lt=1)
    momentum: float = Field(0.9, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    centered: bool = False


class Lamb(_Optimizer):
    """timm's LAMB: pip install bandsplit[timm]."""

    type: Literal["lamb"] = "lamb"
    betas: Betas = (0.9, 0.999)
    eps: float = Field(1e-6, gt=0)


def _default_type(name: str) -> BeforeValidator:
    """A table without `type` is of this one."""
    return BeforeValidator(lambda table: {"type": name, **table} if isinstance(table, dict) else table)


Optim = Annotated[SGD | Adam | AdamW | RMSprop | Lamb, Field(discriminator="type"), _default_type("sgd")]


class _Schedule(_Table):
    warmup_epochs: float = Field(0.0, ge=0)
    """Epochs in which the learning rate rises linearly to its peak, before the schedule begins."""


class Cosine(_Schedule):
    """Half a cosine from the peak to `lr_min`."""

    type: Literal["cosine"] = "cosine"
    lr_min: float = Field(0.0, ge=0)
    period_epochs: float | None = Field(None, gt=0)
    """Epochs from peak to `lr_min`; unset: all that there are."""
    after: Literal["bounce", "restart"] = "bounce"
    """After a period: back up along the cosine, as torch's CosineAnnealingLR does, or from the peak again."""


class Step(_Schedule):
    """Multiplied by `gamma` every so many epochs, or at given ones; epochs count from the beginning of the run."""

    type: Literal["step"] = "step"
    every_epochs: float | None = Field(None, gt=0)
    milestones: Annotated[tuple[float, ...], Field(strict=False)] = ()
    gamma: float = Field(0.1, gt=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> Step:
        if (self.every_epochs is None) == (not self.milestones):
            raise _mistake("schedule.milestones", list(self.milestones), "either milestones or schedule.every_epochs")
        return self


class OneCycle(_Schedule):
    """Smith and Topin, Super-Convergence (2018): up and down once, momentum against it."""

    type: Literal["one_cycle"] = "one_cycle"
    peak_at: float = Field(0.3, gt=0, lt=1)
    """Share of all steps after which the peak is reached."""
    start_factor: float = Field(1 / 25, gt=0, le=1)
    """First learning rate, as a factor on the peak."""
    end_factor: float = Field(1e-4 / 25, ge=0, le=1)
    """Last learning rate, as a factor on the peak."""
    momentum: Annotated[tuple[Fraction, Fraction] | None, Field(strict=False)] = (0.85, 0.95)
    """Momentum (Adam's first beta) at the peak and at both ends; unset: as the optimizer has it."""


class Linear(_Schedule):
    """A line from the peak to `lr_min`."""

    type: Literal["linear"] = "linear"
    lr_min: float = Field(0.0, ge=0)


class Constant(_Schedule):
    type: Literal["constant"] = "constant"


Schedule = Annotated[Cosine | Step | OneCycle | Linear | Constant, Field(discriminator="type"), _default_type("cosine")]


class CrossEntropy(_Table):
    type: Literal["cross_entropy"] = "cross_entropy"
    smoothing: Fraction = 0.0


class BinaryCrossEntropy(_Table):
    """Each class by itself (Wightman et al., ResNet strikes back, 2021), mean over pictures and classes."""

    type: Literal["bce"] = "bce"
    smoothing: Fraction = 0.0
    target_threshold: float | None = Field(None, ge=0, lt=1)
    """Targets above it count as 1, the others as 0; unset: as smoothing and mixing leave them."""


Loss = Annotated[CrossEntropy | BinaryCrossEntropy, Field(discriminator="type"), _default_type("cross_entropy")]


class Distillation(_Table):
    """Every branch also learns from the fused logits of a trained run, on the same pictures, mixed alike.

    Loss: label_weight · [loss] + weight · T² · KL(teacher ‖ branch) with softmax(logits / T) of both (Hinton, Vinyals
    and Dean, 2015).  The defaults are those of He et al., Bag of Tricks (CVPR 2019), section 5.3.
    """

    teacher: str = Field(min_length=1)
    """Run directory of the teacher, whose split may be another; `~` and `$VARIABLES` are expanded."""
    checkpoint: Annotated[Literal["best", "last"] | int, _count_or("distillation.checkpoint", "best", "last")] = "best"
    """"best", "last" or the number of a step."""
    temperature: float = Field(20.0, gt=0, allow_inf_nan=False)
    """T above."""
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    label_weight: float = Field(1.0, ge=0, allow_inf_nan=False)


class Mix(_Table):
    """Mixing of pictures and labels within a batch, on the bands; the same for all branches."""

    mixup: float = Field(0.0, ge=0)
    """α of the Beta distribution (Zhang et al., ICLR 2018); 0: off."""
    cutmix: float = Field(0.0, ge=0)
    """The same for boxes, whose sides are multiples of the block (Yun et al., ICCV 2019); both: one by chance."""
    probability: Fraction = 1.0
    """Share of batches that are mixed at all."""


class Train(_Table):
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    """Pictures an optimizer step, over all ranks."""
    accumulation: int = Field(1, ge=1)
    """Parts into which a rank's share of the batch is cut to save memory."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 autocast on a GPU, fp32 on a CPU; `tf32`: fp32 with the GPU's shorter products; `fp16` scales the
    loss."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of a branch's gradients; unset: not clipped."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Validate and keep a running mean of the weights as well, which forgets at this rate a step; unset: none."""
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
    branch: Annotated[tuple[Branch, ...], Field(strict=False)] = ()
    """All branches one by one, in place of `split.branches`; empty: all of them are as [model] says."""
    augment: Augment = Augment()
    optim: Optim
    schedule: Schedule = Cosine()
    loss: Loss = CrossEntropy()
    distillation: Distillation | None = None
    mix: Mix = Mix()
    train: Train
    parallel: Parallel = Parallel()
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()

    @model_validator(mode="before")
    @classmethod
    def _bands_of_branches(cls, given: Any) -> Any:
        """[[branch]] says which bands a branch reads: `split.branches` follows."""
        branches = given.get("branch") if isinstance(given, dict) else None
        tables = [b.model_dump() if isinstance(b, Branch) else b for b in branches] if _is_list(branches) else []
        if not tables or not all(isinstance(table, dict) and _is_list(table.get("bands")) for table in tables):
            return given  # nothing to do, or a mistake that [[branch]] itself will report
        split = given.get("split", {})
        split = split.model_dump() if isinstance(split, Split) else split
        if not isinstance(split, dict):
            return given
        bands, said = [list(table["bands"]) for table in tables], split.get("branches", "each")
        if said != "each" and [list(g) if _is_list(g) else g for g in (said if _is_list(said) else [said])] != bands:
            raise _mistake("split.branches", said, f"unset, since [[branch]] says {bands}")
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
                raise _mistake("split.block", block, allowed)
        models = [self.model, *(self.model_of(k) for k in range(len(self.branch)))]
        if any(model.takes_one_size for model in models):
            allowed = "unset for networks whose fully connected layers fit one size (VGG, AlexNet) and for timm's"
            if self.data.val_size != self.data.image_size:
                raise _mistake("data.val_image_size", self.data.val_image_size, allowed)
            if self.augment.progressive is not None:
                raise _mistake("augment.progressive.min_size", self.augment.progressive.min_size, allowed)
        self._check_progressive()
        if self.schedule.warmup_epochs >= self.train.epochs:
            allowed = f"less than train.epochs = {self.train.epochs}"
            raise _mistake("schedule.warmup_epochs", self.schedule.warmup_epochs, allowed)
        if isinstance(self.schedule, Cosine | Linear) and self.schedule.lr_min > self.peak_lr:
            raise _mistake("schedule.lr_min", self.schedule.lr_min, f"at most optim.lr = {self.peak_lr}")
        if self.train.precision == "fp16" and self.train.on_nonfinite == "lower_lr":
            allowed = "'stop' or 'skip' with fp16, whose loss scale is found by gradients that are not finite"
            raise _mistake("train.on_nonfinite", "lower_lr", allowed)
        if self.train.batch_size % self.train.accumulation:
            allowed = f"a multiple of train.accumulation = {self.train.accumulation}"
            raise _mistake("train.batch_size", self.train.batch_size, allowed)
        return self

    def _check_progressive(self) -> None:
        progressive, block, size = self.augment.progressive, self.split.block, self.data.image_size
        if progressive is None:
            return
        for key in ("min_size", "multiple"):
            given = getattr(progressive, key)
            if given % block:
                raise _mistake(f"augment.progressive.{key}", given, f"a multiple of split.block = {block}")
        if progressive.min_size >= size:
            raise _mistake("augment.progressive.min_size", progressive.min_size, f"less than data.image_size = {size}")
        if progressive.ramp_end >= self.train.epochs:
            allowed = f"less than train.epochs = {self.train.epochs}"
            raise _mistake("augment.progressive.ramp_end", progressive.ramp_end, allowed)

    def _check_branch(self, number: int) -> None:
        """What [[branch]] and [model] say must make a network together."""
        try:
            self.model_of(number)
        except ValidationError as error:
            wrong = error.errors()[0]
            context = wrong["ctx"]
            key = context.get("key", "model.arch").removeprefix("model.")
            if key in Branch.model_fields:
                raise _mistake(f"branch.{number}.{key}", context["given"], context["allowed"]) from None
            allowed = f"one for which model.{key} = {context['given']!r} means something"
            raise _mistake(f"branch.{number}.arch", self.branch[number].arch, allowed) from None

    def model_of(self, number: int) -> Model:
        """The network of a branch, counted in the whole ensemble."""
        if not self.branch:
            return self.model
        own = self.branch[number].model_dump(exclude={"bands"}, exclude_none=True)
        return Model.model_validate({**self.model.model_dump(), **own}) if own else self.model

    @property
    def networks(self) -> str:
        """The networks of this run in words: `4 x resnet18`, or `1 x resnet34, 3 x resnet18 of width 0.5`."""
        models = [self.model_of(number) for number in self.split.numbers]
        kinds = [f"{m.arch} of width {m.width:g}" if m.width != self.model.width else m.arch for m in models]
        return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))

    @property
    def peak_lr(self) -> float:
        """`optim.lr`, scaled to the batch where `optim.base_batch` says so (Goyal et al., 2017; Krizhevsky, 2014)."""
        optim = self.optim
        factor = self.train.batch_size / optim.base_batch if optim.base_batch else 1.0
        return optim.lr * (factor if optim.scaling == "linear" else factor**0.5)

    def image_size_at(self, epoch: int) -> int:
        """Side in pixels of the training pictures of epoch 0, 1, …"""
        progressive, size = self.augment.progressive, self.data.image_size
        if progressive is None or epoch >= progressive.ramp_end:
            return size
        done = max(0, epoch - progressive.ramp_start) / (progressive.ramp_end - progressive.ramp_start)
        rounded = round((progressive.min_size + done * (size - progressive.min_size)) / progressive.multiple)
        return min(size, max(progressive.min_size, rounded * progressive.multiple))

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
