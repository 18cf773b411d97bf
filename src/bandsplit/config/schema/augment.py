"""[augment]: augmentation of training images between crop and split."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from bandsplit.config.schema.base import Fraction, Range, Table, mistake


class Color(Table):
    """Color jitter: one uniform draw per image and key, applied in DALI's order with its formulas.

    Saturation and hue first: chroma is scaled by `saturation` and rotated by the hue angle in YIQ, which keeps luma.
    Then out = brightness · (128 + contrast · (in − 128)), rounded and clamped to 0 .. 255; torchvision uses the image's
    mean gray instead of 128.  He et al., Bag of Tricks (CVPR 2019): brightness and saturation [0.6, 1.4], hue "from 0.6
    to 1.4", which is 144 if read like torchvision's ColorJitter (0.4 of a turn).
    """

    brightness: Range = (1.0, 1.0)
    """Smallest and largest factor."""
    contrast: Range = (1.0, 1.0)
    """Range of the factor of the contrast."""
    saturation: Range = (1.0, 1.0)
    """Range of the factor of the saturation."""
    hue: float = Field(0.0, ge=0, le=180)
    """Largest hue rotation in degrees, in either direction."""

    @model_validator(mode="after")
    def _check(self) -> Color:
        for key in ("brightness", "contrast", "saturation"):
            low, high = getattr(self, key)
            if not 0 <= low <= high:
                raise mistake(f"augment.color.{key}", [low, high], "0 <= smallest <= largest")
        return self


class RandAugment(Table):
    """`n` random operations of the same magnitude (Cubuk et al., 2020)."""

    type: Literal["rand_augment"] = "rand_augment"
    operations: Literal["paper", "timm"] = "paper"
    """`paper`: 14, including identity; `timm`: the 15 of timm's `rand-m…-inc1`, including invert and solarize-add."""
    probability: Fraction = 1.0
    """Probability that a chosen operation is applied; 0.5 in timm."""
    n: int = Field(2, ge=1, le=14)
    """Operations per image, applied one after another."""
    m: float = Field(7.0, ge=0, le=10)
    """Magnitude from 0 to 10, as in timm; torchvision's scale goes to 30."""
    std: float = Field(0.0, ge=0)
    """Standard deviation of the magnitude per operation and image; the result is clamped to 0 .. 10 and rounded to
    0.01.  Wightman et al., ResNet strikes back (2021): n = 2, m = 7, std = 0.5."""


class AutoAugment(Table):
    """One of the 25 operation pairs learned on ImageNet (Cubuk et al., CVPR 2019)."""

    type: Literal["auto_augment"] = "auto_augment"


class TrivialAugment(Table):
    """One of 14 operations with a random magnitude, "wide" ranges (Müller and Hutter, ICCV 2021)."""

    type: Literal["trivial_augment"] = "trivial_augment"


class Erasing(Table):
    """Random erasing (Zhong et al., AAAI 2020), filled with the mean of the data."""

    probability: Fraction = 0.5
    """Probability that a rectangle of an image is erased."""
    scale: Range = (0.02, 0.4)
    """Range of the erased fraction of the image area."""
    ratio: Range = (0.3, 1 / 0.3)
    """Range of the rectangle's aspect ratio, height / width."""

    @model_validator(mode="after")
    def _check(self) -> Erasing:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise mistake("augment.erasing.scale", [low, high], "0 < smallest <= largest <= 1")
        flattest, tallest = self.ratio
        if not 0 < flattest <= tallest:
            raise mistake("augment.erasing.ratio", [flattest, tallest], "0 < smallest <= largest")
        if max(flattest, 1 / tallest) * high > 1:
            allowed = f"one that fits into the image with augment.erasing.scale up to {high}"
            raise mistake("augment.erasing.ratio", [flattest, tallest], allowed)
        return self


class Progressive(Table):
    """Progressive resizing: smaller training images in the first epochs, one size per epoch.

    Epochs up to `ramp_start` use `min_size`, epochs from `ramp_end` on data.image_size, with linear interpolation in
    between, rounded to a `multiple`.  FFCV's 88-epoch ImageNet recipe ramps from 160 to 192 between epochs 65 and 76.
    """

    min_size: int = Field(ge=1)
    """Image side in pixels in the first epochs."""
    ramp_start: int = Field(0, ge=0)
    """Epoch from which images grow."""
    ramp_end: int = Field(ge=1)
    """First epoch with images of full size."""
    multiple: int = Field(32, ge=1)
    """Sizes in between are rounded to a multiple of this."""

    @model_validator(mode="after")
    def _check(self) -> Progressive:
        if self.ramp_start >= self.ramp_end:
            allowed = f"less than augment.progressive.ramp_end = {self.ramp_end}"
            raise mistake("augment.progressive.ramp_start", self.ramp_start, allowed)
        return self


def _with_type(table: object) -> object:
    types = ("rand_augment", "auto_augment", "trivial_augment")
    if isinstance(table, dict) and "type" not in table:
        raise mistake("augment.auto.type", None, ", ".join(map(repr, types)))
    return table


class Augment(Table):
    """Augmentation of training images between crop and split, in the order of these keys; off by default.

    Each uses its own random numbers: turning one on does not change crops, flips or the others.
    """

    auto: Annotated[RandAugment | AutoAugment | TrivialAugment | None, BeforeValidator(_with_type)] = Field(
        None, discriminator="type"
    )
    """Augmentation by random operations; `type` must be given."""
    color: Color | None = None
    pca_noise: float = Field(0.0, ge=0)
    """σ of the lighting noise (Krizhevsky et al., NIPS 2012, section 4.1, has 0.1): multiples of the principal
    components of ImageNet's colors, three normal draws per image, shared by all its pixels."""
    erasing: Erasing | None = None
    repeats: int = Field(1, ge=1)
    """Repeated augmentation (Hoffer et al., CVPR 2020): copies of each image in a rank's batch, each cropped, flipped
    and augmented separately; the length of an epoch stays the same, with fewer distinct images."""
    progressive: Progressive | None = None
