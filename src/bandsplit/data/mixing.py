"""Mixup and CutMix of bands."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchvision.transforms import v2

from bandsplit import seeds
from bandsplit.config import schema


def mix(
    inputs: Sequence[Tensor], labels: Tensor, config: schema.RunConfig, batch: int, stream: int
) -> tuple[list[Tensor], Tensor]:
    """Mixup or CutMix of a batch: inputs (B, channels, h, w), all mixed in the same way; labels (B,).

    Inputs may differ in h = w.
    The split is linear and acts on each block separately, so mixing bands equals mixing images, with CutMix boxes in
    whole blocks.  Random numbers depend on the seed, the image stream and the index of the batch in it.
    Returns inputs and labels (B, classes), float32; both unchanged if the config has no mixing.
    """
    alphas = config.mix.mixup, config.mix.cutmix
    if not any(alphas):
        return list(inputs), labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derived(config.seed, f"mixing batch {batch}", stream))
        if torch.rand(()) >= config.mix.probability:
            return list(inputs), one_hot(labels, config.classes).float()
        cut = alphas[1] > 0 and (not alphas[0] or bool(torch.rand(()) < 0.5))
        transform = (v2.CutMix if cut else v2.MixUp)(alpha=alphas[cut], num_classes=config.classes)
        grid = math.gcd(*(x.shape[-1] for x in inputs))  # whole cells of it are whole pixels of each input
        drawn = transform.make_params([torch.empty(1, 1, grid, grid)])
    drawn |= {"labels": labels, "batch_size": len(labels)}
    mixed = {}
    for x in {id(x): x for x in inputs}.values():  # branches may share one
        box = {"box": [edge * (x.shape[-1] // grid) for edge in drawn["box"]]} if cut else {}
        mixed[id(x)] = transform.transform(x, drawn | box).contiguous(memory_format=torch.channels_last)
    return [mixed[id(x)] for x in inputs], transform.transform(labels, drawn)
