"""[model] and [[branch]]: the networks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from bandsplit.config.schema.base import Fraction, Table, count_or, mistake

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
"""Keys of [model] that only these architectures of torchvision have."""

Stem = Literal["standard", "no_stride", "small"]


def _tweaks(value: object) -> object:
    """Accepts letters, each once, and sorts them; one message for everything else."""
    letters = value if isinstance(value, list | tuple) else ["none"]
    if all(letter in ("b", "c", "d") for letter in letters) and len(set(letters)) == len(letters):
        return tuple(sorted(letters))
    raise mistake("model.tweaks", value, 'a list of "b", "c" and "d", each at most once')


class Model(Table):
    """The network of every branch."""

    source: Literal["torchvision", "timm"] = "torchvision"
    """`torchvision`: adapted to the size of a band; `timm`: any network of timm (pip install -e .[timm])."""
    arch: str
    """A ResNet (resnet18 to resnet152), alexnet, vgg16, vgg16_bn, mobilenet_v2, mobilenet_v3_small, mobilenet_v3_large
    or inception_v3 without its auxiliary head; or a timm model name."""
    width: float = Field(1.0, gt=0, le=4)
    """Multiplier on the channels of every stage."""
    stem: Stem = "standard"
    """`standard`: 7x7 stride 2 and max pooling; `no_stride`: 7x7 stride 1 and max pooling, since the split has already
    reduced the size; `small`: 3x3 stride 1, no pooling, for small bands."""
    tweaks: Annotated[tuple[Literal["b", "c", "d"], ...], BeforeValidator(_tweaks)] = ("b",)
    """ResNet variants (He et al., Bag of Tricks, CVPR 2019). `b`: a bottleneck's stride in its 3x3, not its first 1x1;
    `c`: three 3x3 convolutions as the stem; `d`: average pooling before the 1x1 of a strided shortcut."""
    zero_gamma: bool = False
    """Initializes the scale of the last norm in every residual block to 0, so that the block starts as its shortcut."""
    drop_path: Fraction = 0.0
    """Stochastic depth: probability that an image skips the last residual block, linear from 0 at the first."""
    dropout: Fraction | None = None
    """Dropout of the classifier; unset: the architecture's default."""
    init: Literal["default", "xavier_uniform", "kaiming_normal"] = "default"
    """Initialization of convolutions and fully connected layers, with zero biases; `default`: the architecture's."""
    init_from: str | None = Field(None, min_length=1)
    """Trained weights that every branch begins with: "torchvision", "timm", a file (.pth, .pt, .safetensors) or a run
    directory. The first convolution is adapted to the bands, and other classes get a new head. Unset: none."""
    bn_batch_size: Annotated[Literal["rank", "all"] | int, count_or("model.bn_batch_size", "rank", "all")] = "rank"
    """Images over which batch norm computes its statistics. "rank": those of one forward pass of a branch on one rank,
    which depends on the number of ranks and on `parallel.branch_groups`; "all": those of all ranks
    that train the branch; or a number, which makes accuracy independent of the launch."""

    @property
    def takes_one_size(self) -> bool:
        """Whether the network may be limited to the input size it was built for."""
        return self.source == "timm" or self.arch in ("alexnet", "vgg16", "vgg16_bn")

    @property
    def can_recompute(self) -> bool:
        """Whether `train.activation_checkpointing` is supported."""
        return self.source == "torchvision" and self.arch != "inception_v3"

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
                allowed = f"{only} for {name}; other values are supported by {', '.join(archs)}"
                raise mistake(f"model.{key}", list(given) if isinstance(given, tuple) else given, allowed)
        if self.source == "timm" and self.bn_batch_size != "rank":
            allowed = "'rank' for timm's networks, which bring their own norm layers"
            raise mistake("model.bn_batch_size", self.bn_batch_size, allowed)
        return self


def _bands(value: object) -> object:
    if isinstance(value, list | tuple) and value and all(type(k) is int for k in value):
        return tuple(value)
    raise mistake("branch.bands", value, "band numbers, such as [0, 1]")


class Branch(Table):
    """One branch, given as a table [[branch]]: its bands, and where its network differs from [model]."""

    bands: Annotated[tuple[int, ...], BeforeValidator(_bands)]
    """The bands that it reads."""
    arch: str | None = None
    """As in [model]; unset: that of [model]. Likewise below."""
    width: float | None = Field(None, gt=0, le=4)
    """As in [model]."""
    stem: Stem | None = None
    """As in [model]."""
    init_from: str | None = Field(None, min_length=1)
    """As in [model]; unset or "none": that of [model]. For new weights in some branches, set it in the others alone."""
