"""Trained weights for a branch to begin with: the first convolution is adapted to its bands, the head to the classes.

The first convolution of a trained network reads pixels, or bands of another split. It is written as a convolution over
raw pixels, and this one as a convolution over blocks, with the inverse of the transform (doc/method.md). That is exact
for all bands if the kernel has room for it and both have the same stride in pixels. A kernel without room for it gets
its middle, and a branch without some of the bands its share: for uncorrelated pixels the least-squares solution, since
the rows of all transforms are orthogonal.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torchvision
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck

from bandsplit.config import schema
from bandsplit.errors import UserError
from bandsplit.models import networks
from bandsplit.paths import reading_from
from bandsplit.spectral.view import View

IMAGENET_STD = schema.Data.model_fields["std"].default
"""What pixels are divided by for a file of weights that does not say it."""

FOR_ALL = -1
"""In place of the number of a branch: one network for all branches to begin with."""


@dataclass(frozen=True)
class Channels:
    """What the input channels of a network hold: channel 3 i + c is color c of its i-th band."""

    block: int
    matrix: npt.NDArray[np.float64]
    """(N, N), the transform of a block."""
    bands: Sequence[int]
    std: Sequence[float]
    """What each color is divided by, on the 0..255 scale of the pixels."""

    @classmethod
    def of(cls, view: View, bands: Sequence[int]) -> Channels:
        return cls(view.split.block, view.matrix, bands, view.std)

    @classmethod
    def pixels(cls, std: Sequence[float] = IMAGENET_STD) -> Channels:
        return cls(1, np.eye(1), [0], std)

    def __str__(self) -> str:
        if self.block == 1:
            return "pixels"
        return f"{len(self.bands)} of {len(self.matrix)} bands of {self.block} x {self.block} blocks"


@dataclass(frozen=True)
class Trained:
    """A trained network."""

    name: str
    state: Mapping[str, Tensor]
    network: nn.Module
    """For the sizes, strides and paddings of its convolutions; it need not have the weights."""
    channels: Channels
    classes: Sequence[str] | None = None
    """Names of its classes, if known."""


@dataclass(frozen=True)
class Initial:
    """Weights that a branch begins with."""

    state: dict[str, Tensor]
    """Its state dict, without the head if that is new."""
    share: float
    """Of the squared weights of the trained first convolution, over pixels, how much that of the branch has."""
    words: str
    """What was done, for the log."""


def adapted(branch: nn.Module, trained: Trained, channels: Channels, classes: Sequence[str]) -> Initial:
    """The weights of a trained network for a branch that reads `channels` and tells `classes` apart.

    `branch` may be on the meta device, and is not changed. Raises UserError if the trained network read none of its
    bands, and, naming some of the weights, if it is another network.
    """
    own, state = branch.state_dict(), dict(trained.state)
    name, convolution = networks.first_convolution(branch)
    _, first = networks.first_convolution(trained.network)
    words, share, key = trained.name, 1.0, f"{name}.weight"
    weight = state.get(key)
    if weight is not None and weight.shape[1:] == (3 * len(trained.channels.bands), *first.kernel_size):
        pixels = over_pixels(weight, trained.channels)
        start = -int(first.padding[0]) * trained.channels.block
        fitted = over_blocks(pixels, start, channels, convolution.kernel_size[0], int(convolution.padding[0]))
        state[key] = fitted.to(own[key].dtype)
        share = float(over_pixels(fitted, channels).square().sum() / pixels.square().sum())
        if share < 1e-6:  # orthogonal, but for rounding
            raise UserError(f"model.init_from: {trained.name} reads none of the bands of a branch that begins with it")
        before, after = _described(first, trained.channels), _described(convolution, channels)
        if before != after:
            words += f"; its first convolution, {before}, becomes {after}"
    head = networks.head_of(branch)
    count, theirs = own[f"{head}.weight"].shape[0], state.get(f"{head}.weight")
    if theirs is not None and (len(theirs) != count or trained.classes not in (None, list(classes))):
        other = f"{count} classes instead of {len(theirs)}" if len(theirs) != count else f"{count} other classes"
        words += f"; new head, for {other}"
        own = {key: value for key, value in own.items() if not key.startswith(f"{head}.")}
        state = {key: value for key, value in state.items() if not key.startswith(f"{head}.")}
    wrong = [*_other_weights(own, state), *_other_strides(branch, trained.network)]
    if wrong:
        more = f" and {len(wrong) - 3} more" * (len(wrong) > 3)
        raise UserError(f"model.init_from: {trained.name} is another network: {', '.join(wrong[:3])}{more}")
    return Initial(state, share, words)


def _described(convolution: nn.Conv2d, channels: Channels) -> str:
    size, stride = convolution.kernel_size[0], convolution.stride[0] * channels.block
    return f"{size} x {size} over {channels} with a stride of {stride} pixel{'s' * (stride > 1)}"


def _other_weights(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    counter = "num_batches_tracked"  # missing in old files, and not read by batch norm
    wrong = [f"{key} is missing" for key in own if key not in state and not key.endswith(counter)]
    wrong += [f"{key} is unknown here" for key in state if key not in own]
    wrong += [
        f"{key} is {tuple(state[key].shape)}, here {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    return wrong


def _other_strides(branch: nn.Module, network: nn.Module) -> list[str]:
    """Of all convolutions but the first, which is adapted: weights say nothing of strides, which tweak b moves."""
    ours, theirs = (
        {name: module.stride[0] for name, module in each.named_modules() if isinstance(module, nn.Conv2d)}
        for each in (branch, network)
    )
    del ours[networks.first_convolution(branch)[0]]
    return [
        f"{name} has a stride of {theirs[name]}, here {stride} (model.tweaks)"
        for name, stride in ours.items()
        if theirs.get(name, stride) != stride
    ]


# ------------------------------------------------------------------------------------------- the first convolution


def over_pixels(weight: Tensor, channels: Channels) -> Tensor:
    """A kernel over bands, (O, 3·bands, k, k), as one over raw pixels, (O, 3, k·s, k·s), float64."""
    rows = torch.as_tensor(channels.matrix[list(channels.bands)])
    rows = rearrange(rows, "b (r t) -> b r t", r=channels.block)
    kernels = rearrange(weight.double(), "o (b c) i j -> b o c i j", c=3)
    pixels = rearrange(torch.einsum("bocij,brt->ocirjt", kernels, rows), "o c i r j t -> o c (i r) (j t)")
    return pixels / pixels.new_tensor(channels.std)[:, None, None]


def over_blocks(pixels: Tensor, start: int, channels: Channels, size: int, padding: int) -> Tensor:
    """A kernel over raw pixels, (O, 3, a, a), as one over bands, (O, 3·bands, size, size), float64.

    `start`: where the kernel over pixels begins, seen from the first pixel of a block; `padding`: that of the
    convolution over blocks. What has no room is left out.
    """
    s = channels.block
    before = start + padding * s
    after = size * s - before - pixels.shape[-1]
    blocks = F.pad(pixels * pixels.new_tensor(channels.std)[:, None, None], [before, after, before, after])
    columns = torch.as_tensor(np.linalg.inv(channels.matrix)[:, list(channels.bands)])
    columns = rearrange(columns, "(r t) b -> r t b", r=s)
    blocks = rearrange(blocks, "o c (i r) (j t) -> o c i r j t", r=s, t=s)
    return rearrange(torch.einsum("ocirjt,rtb->obcij", blocks, columns), "o b c i j -> o (b c) i j")


# ---------------------------------------------------------------------------------------------------- where from


def of_torchvision(model: schema.Model, size: int) -> Trained:
    """torchvision's default weights of an architecture, downloaded unless they are in torch's cache.

    `size`: side of the inputs in pixels.
    """
    try:
        weights: Any = torchvision.models.get_model_weights(model.arch).DEFAULT
    except ValueError:
        raise UserError(f"model.init_from: 'torchvision' given, but it has no weights of {model.arch!r}") from None
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # no network, a full disk, a damaged file
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"model.init_from: 'torchvision' given, but {weights.url} cannot be read: {error}; without a network, "
            f"copy the file to {cache}"
        ) from None
    channels = Channels.pixels([255 * x for x in weights.transforms().std])
    network = _on_pixels(model.model_copy(update={"tweaks": ("b",)}), size)  # as torchvision's ResNets
    return Trained(f"torchvision's {weights}", state, network, channels)


def of_timm(model: schema.Model, size: int) -> Trained:
    """timm's default weights of the network of the same name; resnet50 with tweaks b, c and d is its resnet50d.

    `size`: side of the inputs in pixels, to which timm fits position embeddings.
    """
    name = f"{model.arch}d" if model.source == "torchvision" and model.tweaks == ("b", "c", "d") else model.arch
    try:
        timm = importlib.import_module("timm")
        about = timm.get_pretrained_cfg(name)
        options = {"img_size": size} if about is not None and about.fixed_input_size else {}
        network = timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # not installed, unknown, no weights, no network
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model.init_from: 'timm' given, but its {name!r} cannot be loaded: {reason}") from None
    channels = Channels.pixels([255 * x for x in network.pretrained_cfg["std"]])
    return Trained(f"timm's {name}", network.state_dict(), network, channels)


def of_file(path: Path, model: schema.Model, size: int) -> dict[int, Trained]:
    """The weights in a file, by branch or FOR_ALL: of a network on pixels, or of an exported ensemble.

    A .safetensors file, or what torch.save has written: a state dict, also as "state_dict" or "model" of a dict, and
    with the prefix "module." of DDP, whose strides are those of `model`.  `size`: side of the inputs in pixels.
    """
    if path.suffix == ".safetensors":
        state, metadata = _of_safetensors(path)
        if "bandsplit" in metadata:
            return _of_export(path, state, metadata["bandsplit"])
    else:
        state = _of_torch(path)
    network, name = _on_pixels(model, size), str(path)
    if any(isinstance(module, Bottleneck) for module in network.modules()):
        name += f" (assumed to be {'with' if 'b' in model.tweaks else 'without'} tweak b)"
    return {FOR_ALL: Trained(name, state, network, Channels.pixels())}


def _on_pixels(model: schema.Model, size: int) -> nn.Module:
    """The architecture with its standard stem, on images of size x size pixels, without weights."""
    with torch.device("meta"):
        return networks.build(model.model_copy(update={"stem": "standard"}), 3, 2, size)


def _of_torch(path: Path) -> dict[str, Tensor]:
    with reading_from(path):
        try:
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # damaged bytes can make torch and pickle raise anything
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"model.init_from: {path}: cannot be read as weights alone: {reason}") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"model.init_from: {path}: holds no state dict, also not as 'state_dict' or 'model'")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _of_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with reading_from(path):
        try:
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"model.init_from: {path}: not a safetensors file: {error}") from None


def _of_export(path: Path, state: Mapping[str, Tensor], text: str) -> dict[int, Trained]:
    """The branches of an exported ensemble, by their number in the run: tensors are named branches.{i}.{key}.

    A single one is FOR_ALL.
    """
    try:
        about = json.loads(text)
        found = {}
        for i, branch in enumerate(about["branches"]):
            bands, prefix = branch["bands"], f"branches.{i}."
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            with torch.device("meta"):
                model = schema.Model.model_validate(branch["network"])
                size = about["image_size"] // about["block"]
                network = networks.build(model, 3 * len(bands), len(about["classes"]), size)
            channels = Channels(about["block"], np.array(about["matrix"]), bands, about["std"])
            found[branch["number"]] = Trained(str(path), own, network, channels, about["classes"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"model.init_from: {path}: its description cannot be understood: {error}") from None
    return found if len(found) > 1 else {FOR_ALL: next(iter(found.values()))}
