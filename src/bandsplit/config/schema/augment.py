"""[augment]: what happens to training images between crop and split."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from bandsplit.config.schema.base import Fraction, Range, Table, mistake


class Color(Table):
    """Colours scaled at random, one uniform draw a image for each key, in DALI's order and by its formulas.

    First saturation and hue: chroma times `saturation` and turned by the hue angle, in YIQ, whose luma they keep; then
    out = brightness · (128 + contrast · (in − 128)), rounded and clamped to 0 .. 255, where torchvision has the mean
    grey of the image instead of 128.  He et al., Bag of tricks (CVPR 2019): brightness and saturation [0.6, 1.4],
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
                raise mistake(f"augment.color.{key}", [low, high], "0 <= smallest <= largest")
        return self


class RandAugment(Table):
    """`n` random operations of the same strength (Cubuk et al., 2020)."""

    type: Literal["rand_augment"] = "rand_augment"
    operations: Literal["paper", "timm"] = "paper"
    """`paper`: 14, identity among them; `timm`: its 15 of `rand-m…-inc1`, with inversion and additive solarising."""
    probability: Fraction = 1.0
    """Chance of each chosen operation to be applied; timm's is 0.5."""
    n: int = Field(2, ge=1, le=14)
    """Operations a image, one after the other."""
    m: float = Field(7.0, ge=0, le=10)
    """Strength: 0 none, 10 the most, as in timm; torchvision counts to 30 where this counts to 10."""
    std: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Standard deviation of the strength of each operation on each image, in units of `m`; the result is clamped to
    0 .. 10 and rounded to 0.01.  Wightman et al., ResNet strikes back (2021): n = 2, m = 7, std = 0.5."""


class AutoAugment(Table):
    """One of 25 pairs of operations, those learned on ImageNet (Cubuk et al., CVPR 2019)."""

    type: Literal["auto_augment"] = "auto_augment"


class TrivialAugment(Table):
    """One random operation of 14 with a random strength, from the wide ranges (Müller and Hutter, ICCV 2021)."""

    type: Literal["trivial_augment"] = "trivial_augment"


class Erasing(Table):
    """Random erasing (Zhong et al., AAAI 2020): a rectangle filled with the data's mean."""

    probability: Fraction = 0.5
    """Share of images that lose a rectangle."""
    scale: Range = (0.02, 0.4)
    """Smallest and largest share of the image that it covers."""
    ratio: Range = (0.3, 1 / 0.3)
    """Smallest and largest height / width of it."""

    @model_validator(mode="after")
    def _check(self) -> Erasing:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise mistake("augment.erasing.scale", [low, high], "0 < smallest <= largest <= 1")
        flattest, tallest = self.ratio
        if not 0 < flattest <= tallest < float("inf"):
            raise mistake("augment.erasing.ratio", [flattest, tallest], "0 < smallest <= largest")
        if max(flattest, 1 / tallest) * high > 1:
            allowed = f"one that fits into the image with augment.erasing.scale up to {high}"
            raise mistake("augment.erasing.ratio", [flattest, tallest], allowed)
        return self


class Progressive(Table):
    """Smaller training images at first; every epoch has one size.

    Epochs 0 .. `ramp_start` have `min_size`, those from `ramp_end` on data.image_size, and those between lie on a line
    between the two, rounded to a `multiple`.  FFCV's ImageNet recipe of 88 epochs goes from 160 to 192, 65 to 76.
    """

    min_size: int = Field(ge=1)
    """Side in pixels of the first images."""
    ramp_start: int = Field(0, ge=0)
    ramp_end: int = Field(ge=1)
    multiple: int = Field(32, ge=1)

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
    """What else happens to training images between crop and split, in the order of these keys; by default nothing.

    Each has random numbers of its own: none changes crops, flips, or what another does.
    """

    auto: Annotated[RandAugment | AutoAugment | TrivialAugment | None, BeforeValidator(_with_type)] = Field(
        None, discriminator="type"
    )
    color: Color | None = None
    pca_noise: float = Field(0.0, ge=0, allow_inf_nan=False)
    """σ of the lighting noise (Krizhevsky et al., NIPS 2012, section 4.1, has 0.1): multiples of the principal
    components of ImageNet's colours, three normal numbers a image, the same for all its pixels."""
    erasing: Erasing | None = None
    repeats: int = Field(1, ge=1)
    """Repeated augmentation (Hoffer et al., CVPR 2020): each image of a rank's batch is in it so many times, cropped,
    flipped and augmented anew each time; an epoch has as many images as before, and so much fewer different ones."""
    progressive: Progressive | None = None
