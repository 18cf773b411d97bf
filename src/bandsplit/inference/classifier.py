"""A trained ensemble as one module: images in, fused logits out; split, normalization and fusion in plain torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, overload

import torch
from torch import Tensor, nn

from bandsplit.inference.description import Branch, Description
from bandsplit.inference.preparation import Source, prepared
from bandsplit.models import networks
from bandsplit.models.ranking import likeliest
from bandsplit.spectral import transforms

BATCH = 64
"""Images that `predict` classifies at once."""


@dataclass(frozen=True)
class Guess:
    """A class, and how confident the model is of it."""

    label: int
    """Index of the class."""
    name: str
    """Readable name of the class."""
    confidence: float
    """Probability by the softmax of the logits, 0 to 1."""


@dataclass(frozen=True)
class Prediction:
    """What the model says of an image."""

    top: list[Guess]
    """The k likeliest classes by the fused logits, best first."""
    votes: list[Guess]
    """The likeliest class of each branch by its own logits."""


class Classifier(nn.Module):
    """Branches, the split before them and the fusion after them.

    Made by `bandsplit.load`, in evaluation mode, on the CPU and in float32. `state_dict` has the branches alone; half
    precision: `model.branches.half()`, or autocast.
    """

    matrix: Tensor
    mean: Tensor
    std: Tensor
    weights: Tensor

    def __init__(self, description: Description, state: Mapping[str, Tensor]) -> None:
        """`state`: weights by name, `branches.{i}.{key}`, which it shares.

        Raises RuntimeError if these do not fit the networks, and UserError if timm is needed and cannot build one.
        """
        super().__init__()
        self.description = description
        self.branches = nn.ModuleList(_built(branch, description) for branch in description.branches)
        for name, values in (
            ("matrix", description.matrix),
            ("mean", [[[value]] for value in description.mean]),
            ("std", [[[value]] for value in description.std]),
            ("weights", description.weights),
        ):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)
        self.load_state_dict(state, assign=True)
        self.eval()

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names as in the data, in the order of the logits."""
        return self.description.classes

    @property
    def names(self) -> tuple[str, ...]:
        """Readable names of the classes, in the same order."""
        return self.description.names

    @property
    def bands(self) -> tuple[tuple[int, ...], ...]:
        """The bands that each branch reads."""
        return tuple(branch.bands for branch in self.description.branches)

    def only(self, numbers: Sequence[int]) -> Self:
        """The model of some branches, by their numbers in the run, as `Description.only` fuses them.

        It shares their weights, on their device and in their dtype. Raises UserError as `Description.only` does.
        """
        description = self.description.only(numbers)
        places = [self.description.branches.index(branch) for branch in description.branches]
        state = {
            f"branches.{i}.{key}": x
            for i, place in enumerate(places)
            for key, x in self.branches[place].state_dict().items()
        }
        model = type(self)(description, state).to(self.weights.device)
        model.branches.to(next(self.branches.parameters()).dtype)  # buffers that are not saved
        return model

    def forward(self, images: Tensor) -> Tensor:
        """Fused logits (B, classes), float32, of images as `split` takes them."""
        return self.fuse(self.branch_logits(images))

    def branch_logits(self, images: Tensor) -> Tensor:
        """Logits (branches, B, classes), float32, of images as `split` takes them."""
        return self.logits_of(self.inputs(images))

    def logits_of(self, inputs: Sequence[Tensor]) -> Tensor:
        """Inputs of the branches (B, 3·bands, h, w) -> logits (branches, B, classes), float32."""
        dtype = next(self.branches.parameters()).dtype
        return torch.stack([branch(x.to(dtype)).float() for branch, x in zip(self.branches, inputs, strict=True)])

    def fuse(self, logits: Tensor) -> Tensor:
        """Logits (branches, B, classes) -> Σ_k weights[k] z_k, (B, classes), in float32 also under autocast."""
        return (self.weights[:, None, None] * logits).sum(0)

    def inputs(self, images: Tensor) -> list[Tensor]:
        """What each branch reads of the images: its bands as channels, (B, 3·bands, h, w)."""
        return transforms.stack(self.split(images), self.bands)

    def split(self, images: Tensor) -> Tensor:
        """Normalizes images and splits them into their bands.

        Args:
            images: (B, 3, H, W), RGB; uint8 from 0 to 255 or floating point from 0 to 1. H and W are multiples of the
                block; networks such as VGG and AlexNet need the size of the crop in validation.

        Returns:
            (N, B, 3, H/block, W/block), float32.

        Raises:
            ValueError: `images` has another shape or dtype.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images of shape {tuple(images.shape)}: expected (B, 3, H, W)")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"images of dtype {images.dtype}: expected uint8, or floating point from 0 to 1")
        values = images.float() * (255 if images.is_floating_point() else 1)
        return transforms.split((values - self.mean) / self.std, self.matrix, self.description.block)

    @overload
    def predict(self, images: Source, k: int = 5) -> Prediction: ...
    @overload
    def predict(self, images: list[Any] | tuple[Any, ...], k: int = 5) -> list[Prediction]: ...
    def predict(self, images: Source | list[Any] | tuple[Any, ...], k: int = 5) -> Prediction | list[Prediction]:
        """Prepares images as in validation and classifies them: one prediction for one image, a list for a list.

        Args:
            images: one image, or a list of images of any sizes.
            k: how many classes of each image to return.

        Raises UserError if a file cannot be read, and ValueError if an array or tensor is no image.
        """
        if not isinstance(images, list | tuple):
            return self.predict([images], k)[0]
        return [
            prediction
            for first in range(0, len(images), BATCH)
            for prediction in self.predict_prepared(
                [prepared(image, self.description) for image in images[first : first + BATCH]], k
            )
        ]

    def predict_prepared(self, crops: Sequence[Tensor], k: int = 5) -> list[Prediction]:
        """Classifies crops of `preparation.prepared` at once."""
        if not crops:
            return []
        with torch.inference_mode():
            return self.predictions(self.branch_logits(torch.stack(list(crops)).to(self.weights.device)), k)

    def predictions(self, logits: Tensor, k: int = 5) -> list[Prediction]:
        """The predictions for B images, from the logits (branches, B, classes) of their branches."""
        if k < 1:
            raise ValueError(f"k = {k}: must be at least 1")
        top = self._guesses(self.fuse(logits), k)
        votes = [self._guesses(each, 1) for each in logits]
        return [Prediction(best, [vote[i][0] for vote in votes]) for i, best in enumerate(top)]

    def _guesses(self, logits: Tensor, k: int) -> list[list[Guess]]:
        """Logits (B, classes) -> the k likeliest classes of each image."""
        labels = likeliest(logits, k)
        rows = zip(labels.tolist(), logits.double().softmax(-1).gather(-1, labels).tolist(), strict=True)
        return [[Guess(i, self.names[i], p) for i, p in zip(*row, strict=True)] for row in rows]


def _built(branch: Branch, description: Description) -> nn.Module:
    """The network of a branch, without weights where it has no state but what is saved."""
    size = description.image_size // description.block
    device = torch.device("meta" if branch.network.source == "torchvision" else "cpu")
    with torch.random.fork_rng(devices=[]), device:
        return networks.build(branch.network, 3 * len(branch.bands), len(description.classes), size)
