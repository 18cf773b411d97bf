"""Networks against torchvision's, and what width and stem change."""

from __future__ import annotations

import pytest
import torch
import torchvision

from bandsplit import models, schema


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_at_width_one_it_is_torchvisions_network(arch: str) -> None:
    with torch.device("meta"):
        ours = models.build(schema.Model(arch=arch), in_channels=3, classes=1000)  # type: ignore[arg-type]
        theirs = torchvision.models.get_model(arch)
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}


def test_the_same_weights_give_torchvisions_logits() -> None:
    ours = models.build(schema.Model(arch="resnet18"), in_channels=3, classes=7).eval()
    theirs = torchvision.models.resnet18(num_classes=7).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 48)
    torch.testing.assert_close(ours(x), theirs(x))


def test_initialisation_is_torchvisions() -> None:
    ours = models.build(schema.Model(arch="resnet18"), in_channels=3, classes=1000).state_dict()
    theirs = torchvision.models.resnet18().state_dict()
    for name in ("conv1.weight", "layer1.0.conv1.weight", "layer4.1.conv2.weight", "fc.weight"):
        assert float(ours[name].std()) == pytest.approx(float(theirs[name].std()), rel=0.05)


@pytest.mark.parametrize("bands", [1, 4, 16])
def test_the_first_convolution_takes_three_channels_a_band(bands: int) -> None:
    network = models.build(schema.Model(arch="resnet18", width=0.25), in_channels=3 * bands, classes=5)
    assert network(torch.zeros(2, 3 * bands, 32, 32)).shape == (2, 5)


def test_parameters_shrink_with_the_square_of_the_width() -> None:
    sizes = [
        models.count_parameters(models.build(schema.Model(arch="resnet34", width=width), 3, 10)) for width in (1, 0.5)
    ]
    assert sizes[0] / sizes[1] == pytest.approx(4, rel=0.02)


def test_the_small_stem_keeps_the_map_four_times_larger() -> None:
    maps = {}
    for stem in ("standard", "small"):
        network = models.build(schema.Model(arch="resnet18", width=0.125, stem=stem), 3, 10)  # type: ignore[arg-type]
        network.layer1.register_forward_hook(lambda _, __, out, stem=stem: maps.update({stem: out.shape[-1]}))
        network(torch.zeros(2, 3, 32, 32))
    assert maps == {"standard": 8, "small": 32}
