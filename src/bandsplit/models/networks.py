"""Network architectures adapted to a branch: input channels, width, and a stem for small inputs."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import StochasticDepth

from bandsplit.errors import UserError
from bandsplit.models.recomputation import Stages, run

SMALLEST = {"alexnet": 63, "vgg16": 32, "vgg16_bn": 32, "inception_v3": 75}
"""Smallest side of the inputs in pixels; torchvision's other architectures have no minimum."""


class Architecture(Protocol):
    """What a network is built from: the keys of [model], which an exported file has too."""

    @property
    def source(self) -> str: ...
    @property
    def arch(self) -> str: ...
    @property
    def width(self) -> float: ...
    @property
    def stem(self) -> str: ...
    @property
    def tweaks(self) -> Sequence[str]: ...
    @property
    def zero_gamma(self) -> bool: ...
    @property
    def drop_path(self) -> float: ...
    @property
    def dropout(self) -> float | None: ...
    @property
    def init(self) -> str: ...


def build(config: Architecture, in_channels: int, classes: int, size: int) -> nn.Module:
    """Builds a network (B, in_channels, size, size) -> logits (B, classes), initialized from torch's random state.

    Raises UserError if the architecture needs larger inputs, or if timm cannot be imported or cannot build it.
    """
    if config.source == "timm":
        network = _of_timm(config.arch, in_channels, classes, size)
    else:
        require_size(config, size)
        if config.arch in _RESNETS:
            network = _ResNet(config, in_channels, classes)
        else:
            network = _of_torchvision(config, in_channels, classes, size)
    _initialize(network, config)
    return network


def require_size(config: Architecture, size: int) -> None:
    """Raises UserError if a torchvision architecture needs inputs larger than size x size."""
    if config.source == "torchvision" and size < SMALLEST.get(config.arch, 1):
        raise _too_small(config.arch, SMALLEST[config.arch], size)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count_trained(module: nn.Module) -> int:
    """Number of parameters that are not frozen."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def first_convolution(network: nn.Module) -> tuple[str, nn.Conv2d]:
    """The convolution that reads the input, and its name."""
    return next((name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d))


def head_of(network: nn.Module) -> str:
    """Name of the last fully connected layer, whose outputs are the logits."""
    names: list[str] = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return names[-1]


def freeze(network: nn.Module, parts: Sequence[str]) -> None:
    """Excludes modules and parameters of these names from training.

    Raises UserError if the network has no such part, or if nothing is left to train.
    """
    for part in parts:
        own = [p for name, p in network.named_parameters() if f"{name}.".startswith(f"{part}.")]
        if not own:
            names = ", ".join(name for name, module in network.named_children() if count_parameters(module))
            raise UserError(f"train.freeze: {part!r} given; allowed: {names}, or parts of these such as layer1.0.conv1")
        for parameter in own:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in network.parameters()):
        raise UserError(f"train.freeze: {list(parts)} given, which leaves nothing to train")


def frozen_modules(network: nn.Module) -> list[nn.Module]:
    """Modules without a parameter that is trained, but with some that are not."""
    owned = [(module, list(module.parameters())) for module in network.modules()]
    return [module for module, own in owned if own and not any(p.requires_grad for p in own)]


def layers_of(network: nn.Module) -> dict[str, int]:
    """Number of the layer of each parameter, from 0 at the input, for `optim.layer_decay`.

    timm's networks bring theirs. In others these are the stem, residual blocks, single convolutions and fully connected
    layers, in their order; a norm belongs to the layer before it. For ResNets these are timm's too.
    """
    network_of_timm: Any = network
    if hasattr(network, "group_matcher"):
        layers: dict[str, int] = importlib.import_module("timm.models").group_parameters(
            network, network_of_timm.group_matcher(coarse=False), reverse=True
        )
        return layers
    layers, number = {}, -1
    for name, module in _layers(network):
        number += not isinstance(module, _BatchNorm)
        layers |= {parameter: number for parameter, _ in module.named_parameters(prefix=name)}
    return layers


def _layers(module: nn.Module, above: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Children with parameters, and in the place of a Sequential, but for the stem of a ResNet, its own."""
    for name, child in module.named_children():
        if isinstance(child, nn.Sequential) and not (isinstance(module, _ResNet) and name == "conv1"):
            yield from _layers(child, f"{above}{name}.")
        elif count_parameters(child):
            yield above + name, child


def recompute(network: Any) -> None:
    """Turns on activation checkpointing (`train.activation_checkpointing`) in a network of torchvision."""
    if isinstance(network, _ResNet):
        network.recompute = True
    for name in ("features", "layer1", "layer2", "layer3", "layer4"):
        if hasattr(network, name):
            setattr(network, name, Stages(*getattr(network, name)))


def _too_small(arch: str, smallest: int, size: int) -> UserError:
    return UserError(
        f"model.arch: {arch!r} needs inputs of at least {smallest} x {smallest}, but a branch gets {size} x {size}; "
        "allowed: larger images (data.image_size, augment.progressive.min_size), a smaller split.block, another arch"
    )


# ---------------------------------------------------------------------------------------------------- ResNets


class _Basic(BasicBlock):
    """torchvision's BasicBlock with stochastic depth (drop path) on the residual branch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop_path: nn.Module = nn.Identity()

    @property
    def last_norm(self) -> nn.Module:
        norm: nn.Module = self.bn2
        return norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h/stride, w/stride)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.drop_path(self.bn2(self.conv2(out)))
        out += x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(out)
        return result


class _Bottleneck(Bottleneck):
    """torchvision's Bottleneck with stochastic depth (drop path) on the residual branch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop_path: nn.Module = nn.Identity()

    @property
    def last_norm(self) -> nn.Module:
        norm: nn.Module = self.bn3
        return norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h/stride, w/stride)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.drop_path(self.bn3(self.conv3(out)))
        out += x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(out)
        return result


_RESNETS: dict[str, tuple[type[_Basic | _Bottleneck], list[int]]] = {
    "resnet18": (_Basic, [2, 2, 2, 2]),
    "resnet34": (_Basic, [3, 4, 6, 3]),
    "resnet50": (_Bottleneck, [3, 4, 6, 3]),
    "resnet101": (_Bottleneck, [3, 4, 23, 3]),
    "resnet152": (_Bottleneck, [3, 8, 36, 3]),
}


class _ResNet(ResNet):
    """torchvision's ResNet with any number of input channels, a width factor, a choice of stem, and tweaks b, c and d.

    With 3 channels, width 1, the standard stem and tweak b, its state dict is compatible with torchvision's ResNet;
    resnet50 with tweaks b, c and d is timm's resnet50d. Tweaks: He et al., *Bag of Tricks* (CVPR 2019), section 4.
    """

    def __init__(self, config: Architecture, in_channels: int, classes: int) -> None:
        block, layers = _RESNETS[config.arch]
        self.width, self.tweaks, self.recompute = config.width, config.tweaks, False
        super().__init__(block, layers, num_classes=classes)
        channels = self._scaled(64)
        stride = 2 if config.stem == "standard" else 1
        self.conv1: nn.Module
        if "c" in config.tweaks:
            self.conv1 = self._deep_stem(in_channels, channels, stride)
        elif config.stem == "small":
            self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=7, stride=stride, padding=3, bias=False)
        if config.stem == "small":
            self.maxpool = nn.Identity()
        for module in self.conv1.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(self._scaled(512) * block.expansion, classes)
        if config.drop_path:
            # the drop rate grows linearly with depth, from 0 to drop_path (Huang et al., ECCV 2016)
            blocks = self.blocks()
            for i, residual in enumerate(blocks):
                residual.drop_path = StochasticDepth(config.drop_path * i / (len(blocks) - 1), "row")

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> logits (B, classes)."""
        stem = nn.Sequential(self.conv1, self.bn1, self.relu, self.maxpool)
        x = run([stem], x, self.recompute)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits

    def blocks(self) -> list[_Basic | _Bottleneck]:
        return [module for module in self.modules() if isinstance(module, _Basic | _Bottleneck)]

    def _scaled(self, channels: int) -> int:
        """Channels times the width factor, rounded to a multiple of 8."""
        return max(8, round(channels * self.width / 8) * 8)

    def _deep_stem(self, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        """Tweak c: three 3x3 convolutions instead of one 7x7, (B, in, h, w) -> (B, out, h/stride, w/stride)."""
        middle = self._scaled(32)
        return nn.Sequential(
            nn.Conv2d(in_channels, middle, kernel_size=3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, middle, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, out_channels, kernel_size=3, padding=1, bias=False),
        )

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        if planes == 64:  # the first stage; torchvision assumes a stem of 64 channels
            self.inplanes = self._scaled(64)
        layer: nn.Sequential = super()._make_layer(block, self._scaled(planes), *args, **kwargs)
        first: Any = layer[0]
        if "b" not in self.tweaks and isinstance(first, Bottleneck):
            first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride
        if "d" in self.tweaks and first.downsample is not None:
            convolution, norm = first.downsample
            pool: nn.Module = nn.Identity()
            if convolution.stride != (1, 1):
                # ceil_mode rounds odd sizes up, like the strided 3x3 convolution of the residual branch
                pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
                convolution.stride = (1, 1)
            first.downsample = nn.Sequential(pool, convolution, norm)
        return layer


# ------------------------------------------------------------------------- other torchvision architectures


def _of_torchvision(config: Architecture, in_channels: int, classes: int, size: int) -> nn.Module:
    """Builds AlexNet, VGG, MobileNet or Inception; adapts it on the meta device, then initializes the weights."""
    options: dict[str, Any] = {} if config.dropout is None else {"dropout": config.dropout}
    if config.arch.startswith("mobilenet"):
        options["width_mult"] = config.width
    if config.arch == "inception_v3":
        options |= {"aux_logits": False, "init_weights": False}
    device = torch.get_default_device()
    with torch.device("meta"):
        network: nn.Module = torchvision.models.get_model(config.arch, weights=None, num_classes=classes, **options)
        name, old = first_convolution(network)
        network.set_submodule(name, _with_in_channels(old, in_channels))
        if config.arch.startswith(("alexnet", "vgg")):
            _fit_classifier(network, in_channels, size)
    network.to_empty(device=device)
    _start_like_torchvision(network, config.arch)
    return network


def _with_in_channels(old: nn.Conv2d, in_channels: int) -> nn.Conv2d:
    shape: Any = {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding}
    return nn.Conv2d(in_channels, old.out_channels, **shape, bias=old.bias is not None)


def _fit_classifier(network: Any, in_channels: int, size: int) -> None:
    """Resizes the first fully connected layer if the feature map is smaller than its input (6x6 or 7x7).

    torchvision's adaptive pooling would upsample such a map.
    """
    features = network.features(torch.empty(1, in_channels, size, size))
    if features.shape[-1] < network.avgpool.output_size[0]:
        network.avgpool = nn.Identity()
        i = next(i for i, module in enumerate(network.classifier) if isinstance(module, nn.Linear))
        network.classifier[i] = nn.Linear(features[0].numel(), network.classifier[i].out_features)


def _start_like_torchvision(network: nn.Module, arch: str) -> None:
    """Initializes weights like torchvision's constructors; AlexNet keeps torch's defaults."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()
        if not isinstance(module, nn.Conv2d | nn.Linear) or arch == "alexnet":
            continue
        if arch == "inception_v3":
            nn.init.normal_(module.weight, std=0.1)  # torchvision truncates at 20 standard deviations, which is slow
            continue
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        else:
            nn.init.normal_(module.weight, std=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _of_timm(arch: str, in_channels: int, classes: int, size: int) -> nn.Module:
    """Builds a timm model. Raises UserError, with timm's error, if timm cannot build it or run it at this size."""
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise UserError(
            f"model.source: 'timm' given, but timm cannot be imported ({error}); pip install -e .[timm]"
        ) from None
    options: dict[str, Any] = {"pretrained": False, "in_chans": in_channels, "num_classes": classes}
    try:
        about = timm.get_pretrained_cfg(arch)
        if about is not None and about.fixed_input_size:
            options["img_size"] = size  # position embeddings depend on the size
        with torch.device("meta"):
            trial = timm.create_model(arch, **options).eval()
        wrong = _refusal(trial, in_channels, size)
        if wrong is None:
            network: nn.Module = timm.create_model(arch, **options)
            return network
    except Exception as error:  # timm raises many types; all are due to the name or shape given
        wrong, trial = error, None
    if trial is not None and "img_size" not in options:
        for larger in range(size + 1, 513):
            if _refusal(trial, in_channels, larger) is None:
                raise _too_small(arch, larger, size)
    shape = f"{in_channels} channels, {size} x {size} pixels and {classes} classes"
    raise UserError(f"model.arch: timm cannot build {arch!r} for {shape}: {type(wrong).__name__}: {wrong}") from None


def _refusal(network: nn.Module, in_channels: int, size: int) -> Exception | None:
    """The error of a forward pass on the meta device with an input of size x size; None if it succeeds."""
    try:
        with torch.no_grad():
            network(torch.empty(1, in_channels, size, size, device="meta"))
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        return error
    return None


# ---------------------------------------------------------------------------------------------------- initialization


def _initialize(network: nn.Module, config: Architecture) -> None:
    """Applies `model.init` and `model.zero_gamma` over the architecture's default initialization."""
    if config.init != "default":
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                if config.init == "xavier_uniform":
                    nn.init.xavier_uniform_(module.weight)
                else:
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    if config.zero_gamma and isinstance(network, _ResNet):
        for block in network.blocks():
            nn.init.zeros_(block.last_norm.weight)  # type: ignore[arg-type]
