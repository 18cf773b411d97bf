"""Augmentation of training images between crop and split (`config.augment`), as operators of the DALI graph.

Images are uint8, HWC, RGB, all of one size, on the CPU or on a GPU; random numbers are always drawn on the CPU.
Every random operator has its own seed.  The pipeline would assign seeds in graph order, so that adding one augmentation
would change the flips and the other augmentations.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from nvidia.dali import fn as dali_fn
from nvidia.dali import math as dali_math
from nvidia.dali import types
from nvidia.dali.auto_aug import augmentations as operations
from nvidia.dali.auto_aug.auto_augment import get_image_net_policy
from nvidia.dali.auto_aug.core import select, signed_bin
from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite
from nvidia.dali.auto_aug.trivial_augment import get_trivial_augment_wide_suite
from nvidia.dali.pipeline import do_not_convert

from bandsplit import seeds
from bandsplit.config.schema import Augment, AutoAugment, Color, Erasing, RandAugment, RunConfig, TrivialAugment

fn: Any = dali_fn
math: Any = dali_math

# Principal components of the RGB values of ImageNet's training images, one per column, and the standard deviations
# along them on the scale 0 .. 255.  Krizhevsky et al. (NIPS 2012), section 4.1, give the method but not the numbers;
# these are from fb.resnet.torch and widely used.
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
EIGENVALUES = (55.46, 4.794, 1.148)

_TRIVIAL_LEVELS = 31  # magnitudes 0 .. 30, as in the paper
_RAND_LEVELS = 1001  # magnitudes 0.00, 0.01, … 10.00


def needs_conditionals(augment: Augment) -> bool:
    """Whether a graph with these augmentations needs `enable_conditionals`."""
    return augment.auto is not None


def augmented(images: Any, config: RunConfig, stream: int) -> Any:
    """Applies `config.augment` to the images, with the random numbers of the image stream `stream`."""
    augment, draw = config.augment, _Draws(config.seed, stream)
    if augment.auto is not None:
        images = _automatic(images, augment.auto, config.data.image_size, draw)
    if augment.color is not None:
        images = _colored(images, augment.color, draw)
    if augment.pca_noise:
        images = _lit(images, augment.pca_noise, draw)
    if augment.erasing is not None:
        images = _erased(images, augment.erasing, config.data.image_size, config.data.mean, draw)
    return images


class _Draws:
    """Random numbers for every image of a batch; each purpose has its own seed, independent of what else is drawn."""

    def __init__(self, seed: int, stream: int) -> None:
        self._seed, self._stream = seed, stream

    def uniform(self, purpose: str, low: float = 0.0, high: float = 1.0, shape: Sequence[int] = ()) -> Any:
        # DALI rejects an empty range
        return low + (high - low) * fn.random.uniform(range=[0.0, 1.0], shape=list(shape), seed=self._for(purpose))

    def below(self, purpose: str, count: int, shape: Sequence[int] = ()) -> Any:
        """Integers 0 .. count-1."""
        values = list(range(count))
        return fn.random.uniform(values=values, shape=list(shape), dtype=types.INT32, seed=self._for(purpose))

    def normal(self, purpose: str, shape: Sequence[int]) -> Any:
        return fn.random.normal(shape=list(shape), seed=self._for(purpose))

    def _for(self, purpose: str) -> int:
        return seeds.derived(self._seed, f"augment.{purpose}", self._stream)


def _colored(images: Any, color: Color, draw: _Draws) -> Any:
    return fn.color_twist(
        images,
        brightness=draw.uniform("color.brightness", *color.brightness),
        contrast=draw.uniform("color.contrast", *color.contrast),
        saturation=draw.uniform("color.saturation", *color.saturation),
        hue=draw.uniform("color.hue", -color.hue, color.hue),
    )


def _lit(images: Any, sigma: float, draw: _Draws) -> Any:
    """Adds Σ σ·αᵢ·λᵢ·pᵢ, with three normal numbers α for each image; rounds and clamps to 0 .. 255."""
    components = sigma * np.array(EIGENVECTORS, dtype=np.float32) * np.array(EIGENVALUES, dtype=np.float32)
    alpha = draw.normal("pca_noise", (1, 3))
    noise = fn.reductions.sum(types.Constant(components) * alpha, axes=1)
    # this operator takes one number per channel from the CPU, also for images on a GPU
    return fn.crop_mirror_normalize(images, mean=-noise, dtype=types.UINT8, output_layout="HWC")


def _erased(images: Any, erasing: Erasing, size: int, mean: Sequence[float], draw: _Draws) -> Any:
    """Zhong et al., algorithm 1, except for rectangles that do not fit into the image.

    The paper then draws everything again, which makes large areas rarer than small ones.  Here the area is uniform, the
    aspect ratio is uniform among those that fit, and the position is uniform in whole pixels.
    """
    area = draw.uniform("erasing.area", *erasing.scale)
    flattest = math.max(area, erasing.ratio[0])
    tallest = math.min(1.0 / area, erasing.ratio[1])
    aspect = flattest + (tallest - flattest) * draw.uniform("erasing.aspect")
    applied = draw.uniform("erasing.applied") < erasing.probability
    sides = fn.cast(applied * size * fn.stack(math.sqrt(area * aspect), math.sqrt(area / aspect)), dtype=types.INT32)
    corner = math.floor(draw.uniform("erasing.place", shape=(2,)) * (size + 1 - sides))
    fill = [float(round(value)) for value in mean]  # the operator would truncate them
    return fn.erase(images, anchor=corner, shape=fn.cast(sides, dtype=types.FLOAT), axis_names="HW", fill_value=fill)


def _automatic(images: Any, auto: RandAugment | AutoAugment | TrivialAugment, size: int, draw: _Draws) -> Any:
    """DALI's operations and ranges with our own random draws, since DALI has one seed for all of them, or none.

    Translations are relative to the image: at most 100 of 224 pixels in RandAugment and 250 of 224 in AutoAugment, the
    published values at 224; in TrivialAugment 32 pixels at any size, as published.  Pixels from outside the image are
    gray (128).
    """
    if isinstance(auto, RandAugment):
        suite = _timms_suite() if auto.operations == "timm" else get_rand_augment_suite(use_shape=True)
        levels, stages = _RAND_LEVELS, auto.n
        chosen = draw.below("auto.operation", len(suite), (stages,))
        if auto.probability < 1:
            applied = draw.uniform("auto.applied", shape=(stages,)) < auto.probability
            identity = len(suite)
            suite = [*suite, operations.identity]
            chosen = identity + applied * (chosen - identity)
        strength = math.clamp(auto.m + auto.std * draw.normal("auto.strength", (stages,)), 0.0, 10.0)
        level = fn.cast(strength * ((levels - 1) / 10), dtype=types.INT32)
    elif isinstance(auto, TrivialAugment):
        suite, levels, stages = get_trivial_augment_wide_suite(), _TRIVIAL_LEVELS, 1
        chosen = draw.below("auto.operation", len(suite), (stages,))
        level = draw.below("auto.strength", levels, (stages,))
    else:
        policy = get_image_net_policy(use_shape=True, max_translate_rel=250 / 224)
        suite, levels = [*policy.augmentations.values(), operations.identity], policy.num_magnitude_bins
        table = _Pairs(policy.sub_policies, suite)
        stages = table.stages
        pair = draw.below("auto.pair", len(policy.sub_policies))
        applied = draw.uniform("auto.applied", shape=(stages,)) < types.Constant(table.probability)[pair]
        identity = len(suite) - 1
        chosen = identity + applied * (types.Constant(table.operation)[pair] - identity)
        level = types.Constant(table.level)[pair]
    signed = signed_bin(level, random_sign=draw.below("auto.sign", 2, (stages,)))
    # only `select` branches per image; DALI converting the operations for that too would take minutes with many levels
    suite = [do_not_convert(operation.__call__) for operation in suite]
    with warnings.catch_warnings(record=True):  # DALI's suites use deprecated names of its operators
        for stage in range(stages):
            images = select(
                suite,
                chosen[stage],
                data=images,
                magnitude_bin=signed[stage],
                num_magnitude_bins=levels,
                shape=(size, size),
                fill_value=128,
            )
    return images


def _timms_suite() -> list[Any]:
    """The operations and ranges of timm's `rand-m…-inc1`; all get stronger with the magnitude, 0 .. 10."""
    enhancing = (operations.color, operations.contrast, operations.brightness)
    return [
        operations.auto_contrast,
        operations.equalize,
        operations.invert,
        operations.rotate.augmentation((0, 30), True),
        operations.posterize.augmentation((0, 4), False, _posterizing_mask),
        operations.solarize.augmentation((256, 0)),
        operations.solarize_add.augmentation((0, 110)),
        *(operation.augmentation((0, 0.9), True, operations.shift_enhance_range) for operation in enhancing),
        operations.sharpness.augmentation((0, 0.9), True, operations.sharpness_kernel),
        operations.shear_x.augmentation((0, 0.3), True),
        operations.shear_y.augmentation((0, 0.3), True),
        operations.translate_x.augmentation((0, 0.45), True),
        operations.translate_y.augmentation((0, 0.45), True),
    ]


def _posterizing_mask(magnitude: float) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Keeps 4 of 8 bits at magnitude 0 and 1 bit at 3 and 4; at 4 timm asks Pillow for 0 bits, which it refuses."""
    return np.array(256 - 2 ** min(7, 4 + int(magnitude)), dtype=np.uint8)


class _Pairs:
    """AutoAugment's sub-policies as arrays (sub-policy, stage); missing stages have probability 0."""

    def __init__(self, sub_policies: Sequence[Any], suite: Sequence[Any]) -> None:
        self.stages = max(len(sub_policy) for sub_policy in sub_policies)
        shape = (len(sub_policies), self.stages)
        self.probability = np.zeros(shape, dtype=np.float32)
        self.operation, self.level = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)
        for row, sub_policy in enumerate(sub_policies):
            for stage, (operation, probability, level) in enumerate(sub_policy):
                self.probability[row, stage] = probability
                self.operation[row, stage] = suite.index(operation)
                self.level[row, stage] = level or 0
