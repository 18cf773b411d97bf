"""branches.json: multiplications against a count by hand, and energies that an orthonormal transform preserves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bandsplit.config import loading
from bandsplit.models.costs import costs_of
from bandsplit.models.ensemble import Ensemble
from bandsplit.training.branches import band_energy
from bandsplit.training.session import Plan, Session
from tests.training.tiny import ALONE


def counted(network: nn.Module, channels: int, size: int) -> int:
    """Multiplications of convolutions and linear layers, from the shapes that pass through the network."""
    total = 0

    def count(layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += output.numel() * layer.weight[0].numel()  # type: ignore[operator,index,union-attr]

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    network.eval()(torch.zeros(1, channels, size, size))
    return total


@pytest.mark.parametrize("branches", ['"each"', "[[0], [1, 2, 3]]"])
def test_multiplications_of_every_branch_and_image_size(config_file: Path, branches: str) -> None:
    growing = "augment.progressive={min_size=16, ramp_end=1, multiple=2}"
    config = loading.load(config_file, [f"split.branches={branches}", growing, "data.classes=10"])
    networks = Ensemble.of(config).branches
    for network, cost, group in zip(networks, costs_of(config), config.split.groups, strict=True):
        assert cost.macs == {size: counted(network, 3 * len(group), size // 2) for size in (16, 32)}
        assert cost.parameters == sum(p.numel() for p in network.parameters())


def energies(config_file: Path, *keys: str) -> list[float | None]:
    """Of the first training batch."""
    config = loading.load(config_file, list(keys))
    session = Session(Plan.of(config, ALONE.ranks))
    try:
        return band_energy(session, session.feed.take(1, ahead=False))
    finally:
        session.loader.close()


def test_an_orthonormal_transform_preserves_the_energy_of_all_bands(config_file: Path) -> None:
    """Parseval: of one batch, the bands of the spectrum have the energy of the pixels together, but not each.

    It does not matter which branches read a band; of a band that none reads, nothing is known.
    """
    spectrum = energies(config_file, "split.transform=dct2d")
    pixels = energies(config_file, "split.transform=identity")
    assert math.fsum(filter(None, spectrum)) == pytest.approx(math.fsum(filter(None, pixels)), rel=1e-5)
    assert spectrum[0] == max(filter(None, spectrum)) > 2 * max(filter(None, pixels))
    some = energies(config_file, "split.transform=dct2d", "split.branches=[[0], [0, 1], [3]]")
    assert some == [pytest.approx(spectrum[0]), pytest.approx(spectrum[1]), None, pytest.approx(spectrum[3])]


def test_a_run_writes_the_file_once_on_any_number_of_ranks(finished: Callable[..., Path]) -> None:
    config = loading.load(finished(1) / "config.toml")
    for ranks in (1, 2):
        written = json.loads((finished(ranks) / "branches.json").read_text())
        assert written["branches"] == [
            {"bands": [k], "parameters": cost.parameters, "macs": {str(size): n for size, n in cost.macs.items()}}
            for k, cost in enumerate(costs_of(config))
        ]
        assert written["band_energy"][0] == max(written["band_energy"])
