"""Compare network sizes with published ones, in MiB of float32: ``python script/model_sizes.py``.

Sizes are of the weights, and of weights and batch norm running statistics. Computed on the meta device.
"""

from __future__ import annotations

import torch
from torch import nn

from bandsplit.config import schema
from bandsplit.errors import UserError
from bandsplit.models import networks

MIB = 2**20

# network, architecture, side of the input, classes, published MiB, remark for sizes that differ
PUBLISHED = (
    ("VGG-16", "vgg16", 224, 1000, 527.79, ""),
    ("VGG-16 with batch norm, a branch of sub4", "vgg16_bn", 112, 1000, 207.82, ""),
    ("VGG-16, a branch of sub16", "vgg16", 56, 1000, 128.05, "why is not known; without the last layer: 128.16"),
    ("AlexNet", "alexnet", 224, 1000, 233.08, ""),
    ("AlexNet, a branch of sub4", "alexnet", 112, 1000, 61.04, "not with torchvision's layers; why is not known"),
    ("AlexNet, a branch of sub16", "alexnet", 56, 1000, 37.73, "not with torchvision's layers: "),
    ("ResNet-34", "resnet34", 224, 1000, 83.15, ""),
    ("ResNet-50 without buffers", "resnet50", 224, 1000, 97.49, ""),
    ("ResNet-50 with buffers", "resnet50", 224, 1000, 97.69, ""),
    ("ResNet-34, ImageNet-21K", "resnet34", 224, 21841, 122.35, "another number of classes: "),
    ("ResNet-50, ImageNet-21K", "resnet50", 224, 10450, 171.56, "with 10,450 of the classes and with buffers"),
)


def network(arch: str, size: int, classes: int) -> nn.Module:
    """A network for RGB images on the meta device."""
    with torch.device("meta"):
        return networks.build(schema.Model(arch=arch), 3, classes, size)


def sizes(network: nn.Module) -> tuple[float, float]:
    """MiB of the weights, and of weights, running means and running variances."""
    weights = sum(parameter.nbytes for parameter in network.parameters())
    statistics = sum(buffer.nbytes for buffer in network.buffers() if buffer.is_floating_point())
    return weights / MIB, (weights + statistics) / MIB


def fitting_classes(arch: str, published: float) -> str:
    """Numbers of classes for which a ResNet has the published size in MiB, with and without buffers."""
    one, two = (sizes(network(arch, 224, classes)) for classes in (1, 2))
    ranges = []
    for i, what in enumerate(("without", "with")):
        low, high = ((published + half - one[i]) / (two[i] - one[i]) + 1 for half in (-0.005, 0.005))
        ranges.append(f"{low:.0f} to {high:.0f} classes {what} buffers")
    return " or ".join(ranges) + " would fit"


def main() -> None:
    print("| network | input | classes | weights | with buffers | published | difference | |")
    print("|---|---|---|---|---|---|---|---|")
    for name, arch, size, classes, published, remark in PUBLISHED:
        row = f"| {name} | {size}² | {classes:,} |"
        try:
            ours = sizes(network(arch, size, classes))
        except UserError:
            print(f"{row} | | {published:.2f} | | {remark}torchvision's takes {networks.SMALLEST[arch]}² and more |")
            continue
        difference = min((round(mib, 2) - published for mib in ours), key=abs)
        equal = abs(difference) < 0.005
        if not equal and arch.startswith("resnet"):
            remark += fitting_classes(arch, published)
        print(
            f"{row} {ours[0]:.2f} | {ours[1]:.2f} | {published:.2f} | {'equal' if equal else f'{difference:+.2f}'} "
            f"| {remark} |"
        )


if __name__ == "__main__":
    main()
