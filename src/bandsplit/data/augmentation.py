"""What happens to training images between crop and split, as parts of the DALI graph: `config.augment`.

Images are uint8, HWC, RGB, all of one size, on the CPU or on a GPU; what is drawn for them is always on the CPU.
Every random operator has a seed of its own.  Left to the pipeline, seeds are handed out in the order of the graph, and
each augmentation would change the flips and what other augmentations do.
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

# Principal components of the RGB values of ImageNet's training images, one a column, and the standard deviations
# along them on the scale 0 .. 255.  Krizhevsky et al. (NIPS 2012), section 4.1, have the method but not the numbers:
# these are the ones of fb.resnet.torch, which others took over.
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
EIGENVALUES = (55.46, 4.794, 1.148)

_TRIVIAL_LEVELS = 31  # strengths 0 .. 30, as in the paper
_RAND_LEVELS = 1001  # strengths 0.00, 0.01, … 10.00


def needs_conditionals(augment: Augment) -> bool:
    """Whether a graph with these augmentations needs `enable_conditionals`."""
    return augment.auto is not None


def augmented(images: Any, config: RunConfig, stream: int) -> Any:
    """The images with all that `config.augment` says; `stream` is whose random numbers they get."""
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
    """Random numbers for every image of a batch, the same ones whatever else is drawn."""

    def __init__(self, seed: int, stream: int) -> None:
        self._seed, self._stream = seed, stream

    def uniform(self, purpose: str, low: float = 0.0, high: float = 1.0, shape: Sequence[int] = ()) -> Any:
        # DALI refuses a range whose ends are equal
        return low + (high - low) * fn.random.uniform(range=[0.0, 1.0], shape=list(shape), seed=self._for(purpose))

    def below(self, purpose: str, count: int, shape: Sequence[int] = ()) -> Any:
        """Whole numbers 0 .. count-1."""
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
    # an operator that takes a number a channel from the CPU, also for images on a GPU
    return fn.crop_mirror_normalize(images, mean=-noise, dtype=types.UINT8, output_layout="HWC")


def _erased(images: Any, erasing: Erasing, size: int, mean: Sequence[float], draw: _Draws) -> Any:
    """Zhong et al., algorithm 1, but for the rectangles that do not fit into the image.

    There everything is drawn again, which makes large areas rarer than small ones.  Here areas are uniform, aspects
    are uniform among those that fit, and so are places, in whole pixels.
    """
    area = draw.uniform("erasing.area", *erasing.scale)
    flattest = math.max(area, erasing.ratio[0])
    tallest = math.min(1.0 / area, erasing.ratio[1])
    aspect = flattest + (tallest - flattest) * draw.uniform("erasing.aspect")
    applied = draw.uniform("erasing.applied") < erasing.probability
    sides = fn.cast(applied * size * fn.stack(math.sqrt(area * aspect), math.sqrt(area / aspect)), dtype=types.INT32)
    corner = math.floor(draw.uniform("erasing.place", shape=(2,)) * (size + 1 - sides))
    fill = [float(round(value)) for value in mean]  # the operator would cut off what is behind the point
    return fn.erase(images, anchor=corner, shape=fn.cast(sides, dtype=types.FLOAT), axis_names="HW", fill_value=fill)


def _automatic(images: Any, auto: RandAugment | AutoAugment | TrivialAugment, size: int, draw: _Draws) -> Any:
    """DALI's operations and their ranges, with draws of our own: DALI's have one seed for all or none.

    Shifts are relative to the image: at most 100 of 224 pixels in RandAugment and 250 of 224 in AutoAugment, which
    are the published ones at 224; in TrivialAugment 32 pixels at any size, as published.  What comes in from outside
    is gray (128).
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
    # only `select` branches by image; rewriting the operations for that too would take minutes with many levels
    suite = [do_not_convert(operation.__call__) for operation in suite]
    with warnings.catch_warnings(record=True):  # DALI's suites use former names of its operators, and it says so
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
    """The operations and ranges of timm's `rand-m…-inc1`, all of them stronger with the magnitude, 0 .. 10."""
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
    """Keeps 4 bits of 8 at magnitude 0 and 1 at 3 and 4; at 4 timm's PosterizeIncreasing asks Pillow for 0, in vain."""
    return np.array(256 - 2 ** min(7, 4 + int(magnitude)), dtype=np.uint8)


class _Pairs:
    """AutoAugment's sub-policies as arrays (sub-policy, stage); stages that are not there have the probability 0."""

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
