"""Bands stay channels_last from the operator to the last convolution, forward and backward, without a copy between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bandsplit.config import loading
from bandsplit.distributed.ranks import Ranks
from bandsplit.training.session import Plan, Session

NETWORKS = {
    "resnet": ["model.arch=resnet18"],
    "bottleneck": ["model.arch=resnet50", 'model.tweaks=["b", "c", "d"]'],
    "small stem": ["model.stem=small", "model.drop_path=0.1"],
    "all bands": ["split.branches=all"],
}


@pytest.mark.parametrize("keys", NETWORKS.values(), ids=NETWORKS.keys())
def test_every_map_is_channels_last(config_file: Path, keys: list[str]) -> None:
    config = loading.load(config_file, [*keys, "data.check=off", "train.batch_size=4"])
    session = Session(Plan.of(config, Ranks(0, 1, 0, 1, torch.device("cpu"))))
    (batch,) = session.feed.take(1, ahead=False)
    wrong: list[str] = []
    firsts: list[int] = []
    for x, learner in zip(batch.inputs, session.learners, strict=True):
        convolutions = [(name, m) for name, m in learner.network.named_modules() if isinstance(m, nn.Conv2d)]
        for name, module in convolutions:
            module.register_forward_hook(note(name, wrong))
            module.register_full_backward_hook(note(f"{name} backward", wrong))
        convolutions[0][1].register_forward_pre_hook(lambda _, given: firsts.append(given[0].data_ptr()))
        learner.step([x], [batch.labels], lr=0.1)
    assert wrong == []
    assert firsts == [x.data_ptr() for x in batch.inputs]


def note(name: str, wrong: list[str]) -> Any:
    """A hook that adds the name of a module with a map that is not channels_last."""

    def hook(_: nn.Module, given: tuple[Tensor | None, ...], result: Any) -> None:
        results = result if isinstance(result, tuple) else (result,)
        maps = [x for x in (*given, *results) if x is not None and x.shape[2:].numel() > 1 and x.shape[1] > 1]
        wrong.extend(name for x in maps if not x.is_contiguous(memory_format=torch.channels_last))

    return hook
