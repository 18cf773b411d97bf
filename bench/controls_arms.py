"""The arms of bench/controls.py: what they are called, what belongs together, and what they cost to use."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from bandsplit.config import loading
from bandsplit.config.schema import RunConfig
from bandsplit.models.costs import costs_of
from bandsplit.models.precision import Precision
from bandsplit.training.memory import Memory, estimate, of_teacher

CONFIGS = Path(__file__).resolve().parent.parent / "config/controls"
BASELINE = "rgb128"

LRS = (0.05, 0.1)
TEACHER_LR = LRS[0]
TEACHERS = {"coarse2_distilled": "coarse2_x4", "each_distilled": BASELINE, "stagewise": "low"}
TOGETHER = ("stagewise",)
"""Arms that predict together with their teacher."""

ACCUMULATED = "rgb128_accumulated"
"""Not trained: only its time and memory are of interest."""

VARIANTS: dict[str, dict[str, list[str]]] = {
    "rgb80": {"at 104": ["data.val_image_size=104", "data.resize_size=116"]},
    "rgb64": {"at 80": ["data.val_image_size=80", "data.resize_size=90"]},
}
"""Further evaluations of an arm, at larger images than it was trained on (FixRes: Touvron et al., NeurIPS 2019)."""

Times = dict[str, dict[str, float]]
"""Seconds of a step by arm and image size."""

RGB = "one network on RGB"
FAMILIES = {
    RGB: {
        "rgb128": "RGB 128, the baseline",
        "rgb128_growing": "RGB progressive, 64 to 128",
        "rgb128_thin": "RGB 128, half the width",
        "rgb128_deep": "RGB 128, deep stem",
        "rgb128_accumulated": "RGB 128, 4 accumulation steps",
        "rgb80": "RGB 80",
        "rgb64": "RGB 64",
    },
    "all bands as channels": {
        "coarse2": "2 x 2 DCT",
        "coarse2_half": "2 x 2 DCT, scale 0.5",
        "coarse2_unit": "2 x 2 DCT, scale 1",
        "coarse2_deep": "2 x 2 DCT, deep stem",
        "coarse2_unit_deep": "2 x 2 DCT, scale 1, deep stem",
        "coarse2_growing": "2 x 2 DCT, progressive",
        "coarse2_unit_growing": "2 x 2 DCT, scale 1, progressive",
        "coarse2_distilled": "2 x 2 DCT, distilled from 4",
        "coarse2_identity": "2 x 2 pixels",
        "coarse2_random": "2 x 2 random matrix",
        "coarse2_random_unit": "2 x 2 random matrix, scale 1",
        "coarse8": "8 x 8 DCT, small stem",
    },
    "branches on different bands": {
        "each_dct2d": "2 x 2 DCT, a branch each",
        "each_dct1d": "1 x 4 DCT, a branch each",
        "each_distilled": "a branch each, distilled",
        "each_identity": "2 x 2 pixels, a branch each",
        "overlap": "band 0 alone and with each other",
        "low_wide": "band 0 wide, 1 and 2 thin",
        "low": "band 0 alone",
        "stagewise": "band 0, then the rest",
    },
    "ensembles of identical networks": {
        "coarse2_x2": "2 of 2 x 2 DCT",
        "coarse2_x4": "4 of 2 x 2 DCT",
        "rgb64_x4": "4 of RGB 64",
    },
}
"""Arms with their names in the figure."""

PIXELS = ("low", "coarse2_identity", "coarse2_random", "coarse2_random_unit", "each_identity", "rgb64_x4")
"""Arms of the other families that read pixels, means of pixels, or bands of a matrix without frequencies."""

PAIRS = (
    ("coarse2_unit", "rgb128_growing"),
    ("coarse2_unit_growing", "rgb128_growing"),
    ("coarse2_unit", "rgb80"),
    ("coarse2_unit", "rgb64 lr 0.1"),
    ("coarse2_unit", "low"),
    ("coarse2_unit", "coarse2"),
    ("coarse2_unit", "coarse2_random_unit"),
    ("coarse2_random_unit", "coarse2_random"),
    ("coarse2", "coarse2_identity"),
    ("coarse2", "coarse2_random"),
    ("coarse2", "rgb80"),
    ("coarse2_deep", "coarse2"),
    ("coarse2_half", "coarse2"),
    ("coarse2_unit_deep", "coarse2_unit"),
    ("low", "rgb80"),
    ("low", "rgb64 lr 0.1"),
    ("low_wide (learned)", "low"),
    ("low_wide (learned)", "rgb80"),
    ("stagewise (mean)", "low"),
    ("each_dct2d (mean)", "rgb128"),
    ("each_dct2d (mean)", "rgb64_x4 (mean)"),
    ("each_dct2d (mean)", "rgb80"),
    ("each_dct2d (mean)", "low"),
    ("each_dct2d (mean)", "coarse2_unit"),
    ("each_dct2d (mean)", "each_dct1d (mean)"),
    ("each_dct2d (mean)", "each_identity (mean)"),
    ("each_distilled (mean)", "each_dct2d (mean)"),
    ("coarse2_distilled", "coarse2"),
    ("coarse2_x2 (mean)", "coarse2"),
    ("coarse2_x4 (mean)", "coarse2"),
    ("rgb64_x4 (mean)", "rgb64 lr 0.1"),
    ("rgb64 lr 0.1", "rgb64"),
    ("rgb128 lr 0.1", "rgb128"),
)
"""What is compared beside the baseline and the best network on RGB, by labels of the tables."""

FIRST = "first branch"
"""In place of a fusion: what the first branch of several says alone."""

CASCADES = (
    (("rgb64", "mean"), ("rgb128", "mean")),
    (("each_dct2d", FIRST), ("each_dct2d", "learned")),
    (("low_wide", FIRST), ("low_wide", "learned")),
    (("coarse2_x4", FIRST), ("coarse2_x4", "mean")),
    (("rgb64_x4", FIRST), ("rgb64_x4", "mean")),
)
"""Arms and fusions: the first of a pair sees all images, the second those of which the first is unsure."""

CLASSES = 10
"""That costs are computed for."""


def config_of(arm: str, overrides: Sequence[str] = ()) -> RunConfig:
    return loading.load(CONFIGS / f"{arm}.toml", overrides)


def grown(arm: str, epochs: int) -> list[str]:
    """Overrides that set the number of epochs, three quarters of which growing images take to reach their size."""
    sets = [f"train.epochs={epochs}"]
    if config_of(arm).augment.progressive:
        sets.append(f"augment.progressive.ramp_end={min(epochs - 1, max(1, round(0.75 * epochs)))}")
    return sets


def seconds_of(arm: str, epochs: int, steps: int, times: Times) -> float:
    """Time of that many epochs of `steps` steps; of a distilled arm without its teacher's training."""
    sizes = _sizes(arm, epochs)
    return steps * sum(times[arm][str(size)] for size in sizes)


@cache
def _sizes(arm: str, epochs: int) -> list[int]:
    """Of the training images, by epoch."""
    config = config_of(arm, grown(arm, epochs))
    return [config.image_size_at(epoch) for epoch in range(epochs)]


@cache
def macs_of(arm: str, fusion: str = "", variant: str = "") -> int:
    """Multiply-accumulates of a prediction: a forward pass over one validation image, or FIRST's part of it."""
    config = config_of(arm, VARIANTS[arm][variant] if variant else [])
    size = config.data.val_image_size or config.data.image_size
    config = config.with_values({"data": {"image_size": size}, "augment": {"progressive": None}}).with_classes(CLASSES)
    each = [cost.macs[size] for cost in costs_of(config)]
    if fusion == FIRST:
        return each[0]
    return sum(each) + (macs_of(TEACHERS[arm]) if arm in TOGETHER else 0)


@cache
def parameters_of(arm: str) -> int:
    """Parameters of the networks that predict."""
    own = sum(cost.parameters for cost in costs_of(config_of(arm).with_classes(CLASSES)))
    return own + (parameters_of(TEACHERS[arm]) if arm in TOGETHER else 0)


@cache
def memory_of(arm: str) -> Memory:
    """Of a step of training in float32, with its teacher; batch and image size of the config."""
    config, precision = config_of(arm).with_classes(CLASSES), Precision("fp32", torch.device("cpu"))
    alone = config.model_copy(update={"distillation": None})  # the teacher's run need not be there
    own = estimate(alone, 1, 1, precision)
    if arm not in TEACHERS:
        return own
    teacher, data = config_of(TEACHERS[arm]).with_classes(CLASSES), config.data
    return own.with_teacher(of_teacher(teacher, config.train.batch_size, data.image_size, data.prefetch, precision))
