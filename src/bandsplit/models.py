"""An architecture fitted to a branch: its input channels, its width and a stem that suits the size of a band."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from bandsplit import schema

_RESNETS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}


class _ResNet(ResNet):
    """torchvision's ResNet with any number of input channels, every width multiplied, and a choice of stem.

    With 3 channels, width 1 and the standard stem it is torchvision's own network, key by key.
    """

    def __init__(self, arch: str, in_channels: int, classes: int, width: float, stem: str) -> None:
        block, layers = _RESNETS[arch]
        self.width = width
        super().__init__(block, layers, num_classes=classes)
        channels = self._scaled(64)
        if stem == "small":
            self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(self._scaled(512) * block.expansion, classes)

    def _scaled(self, channels: int) -> int:
        return max(8, round(channels * self.width / 8) * 8)

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        if planes == 64:  # the first stage follows the stem, whose width torchvision fixes at 64
            self.inplanes = self._scaled(64)
        layer: nn.Sequential = super()._make_layer(block, self._scaled(planes), *args, **kwargs)
        return layer


def build(config: schema.Model, in_channels: int, classes: int) -> nn.Module:
    """A network (B, in_channels, h, w) -> logits (B, classes), freshly initialised from torch's random state."""
    return _ResNet(config.arch, in_channels, classes, config.width, config.stem)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
