"""Standard deviations of the bands of training images, by which `split.scale` divides."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from einops import reduce

from bandsplit.config.schema import Augment, Mix, RunConfig
from bandsplit.data import source
from bandsplit.data.loader import Streams
from bandsplit.data.source import Images
from bandsplit.data.store.manifest import StoredImages, bands_of
from bandsplit.distributed.ranks import Ranks
from bandsplit.errors import UserError
from bandsplit.progress import followed

IMAGES, AT_ONCE = 1024, 64

_ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


def with_sigma(config: RunConfig, files: Images, ranks: Ranks) -> RunConfig:
    """The config with `split.sigma`, measured if `split.scale` needs it and it is not given; every rank must call it.

    Raises UserError if a band is constant.
    """
    if not config.split.scale or config.split.sigma is not None:
        return config
    return config.with_values({"split": {"sigma": ranks.from_first(partial(measured, config, files))}})


def measured(config: RunConfig, files: Images) -> tuple[float, ...]:
    """σ of every band, to six digits: over all colors and places of about 1,024 training images, or of all.

    The images are the first of the shuffled list, in crops as in training, before mirroring, augmentation and mixing.
    They come from the CPU in one stream, whatever the run has, so that σ depends on data and seed alone: runs of
    single branches that read a band have the same, and can be joined.  1 for a band that no branch reads from a band
    store.
    """
    stored = bands_of(config.split) if isinstance(files, StoredImages) else [*range(config.split.bands)]
    batches = math.ceil(min(IMAGES, len(files)) / AT_ONCE)
    batch_size = min(IMAGES, len(files)) // batches
    plain = config.model_copy(update={"augment": Augment(), "mix": Mix()}).with_values(
        {
            "split": {"branches": (tuple(stored),), "only": None, "scale": 0.0},
            "data": {"hflip": 0.0, "in_memory": False},
            "train": {"batch_size": batch_size, "grad_accum_steps": 1},
        }
    )
    loader = source.training_loader(plain, Streams(plain, 1, _ALONE), files, half=False, states=None, teacher=None)
    sums: npt.NDArray[np.float64] = np.zeros((2, len(stored)))
    values = 0
    for _ in followed(range(batches), "measuring deviations of bands", batches, "batches"):
        (x,) = next(loader).inputs
        x = x.double()
        sums += [reduce(each, "b (k c) h w -> k", "sum", c=3).numpy() for each in (x, x.square())]
        values += x.numel() // len(stored)
    mean, square = sums / values
    sigma = np.ones(config.split.bands)
    sigma[stored] = np.sqrt(np.maximum(square - mean**2, 0.0))
    if constant := [band for band in stored if sigma[band] < 1e-6]:
        raise UserError(
            f"split.scale: {config.split.scale} given, but band {constant[0]} is constant in {batches * batch_size} "
            "training images, so that its deviation is 0; allowed: 0, or deviations of your own in split.sigma"
        )
    return tuple(float(f"{x:.6g}") for x in sigma)
