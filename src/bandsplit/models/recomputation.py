"""Activation checkpointing: stages of a network keep their inputs alone, and are computed again in the backward pass.

Chen, Xu, Zhang, Guestrin, *Training Deep Nets with Sublinear Memory Cost* (2016).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run(stages: Iterable[nn.Module], x: Tensor, recompute: bool) -> Tensor:
    """The stages in turn; with `recompute` each keeps only its input, unless no gradients are wanted.

    Gradients, running statistics and random numbers are those without, bit for bit.
    """
    for stage in stages:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(stage, x, use_reentrant=False, context_fn=partial(_contexts, stage))
        else:
            x = stage(x)
    return x


def _contexts(stage: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the forward pass, and for its repetition."""
    return nullcontext(), _copied_buffers(stage)


@contextmanager
def _copied_buffers(stage: nn.Module) -> Iterator[None]:
    """Context in which the stage has copies of its buffers, so that running statistics are not updated twice."""
    own = [(module, dict(module._buffers)) for module in stage.modules() if module._buffers]
    for module, buffers in own:
        module._buffers.update({name: None if x is None else x.clone() for name, x in buffers.items()})
    try:
        yield
    finally:
        for module, buffers in own:
            module._buffers.update(buffers)


class Stages(nn.Sequential):
    """A sequence of layers that is recomputed stage by stage; its names are those of the sequence.

    A stage of a plain sequence ends with its pooling, as in AlexNet and VGG; in a sequence of blocks each is a stage.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h', w')."""
        return run(self._stages(), x, recompute=True)

    def _stages(self) -> Iterator[nn.Module]:
        stage: list[nn.Module] = []
        for layer in self:
            stage.append(layer)
            if isinstance(layer, nn.MaxPool2d) or any(layer.children()):
                yield nn.Sequential(*stage)
                stage = []
        if stage:
            yield nn.Sequential(*stage)
