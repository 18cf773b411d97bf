"""Which classes a network predicts."""

import torch
from torch import Tensor


def likeliest(logits: Tensor, count: int) -> Tensor:
    """Logits (..., classes) -> the `count` classes (..., count) with the largest, or all classes, largest first.

    The first is that of `argmax`, here and wherever a class is predicted: of equal logits, as bfloat16 often has them,
    the class that comes first. `topk` takes any of them.
    """
    best = logits.topk(min(count, logits.shape[-1]), dim=-1).indices
    first = logits.argmax(-1, keepdim=True)
    return torch.cat([first, torch.where(best == first, best[..., :1], best)[..., 1:]], dim=-1)
