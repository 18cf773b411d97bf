"""Networks against torchvision's and timm's, and what each key of [model] and [[branch]] changes."""

from __future__ import annotations

import math
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from torchvision.ops import StochasticDepth

from bandsplit.config import loading, schema
from bandsplit.errors import UserError
from bandsplit.models import networks
from bandsplit.models.ensemble import Ensemble, parameters_of_branches
from bandsplit.runs.directory import resolved
from tests.conftest import REPOSITORY

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
MOBILENETS = ("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large")
OTHERS = ("alexnet", "vgg16", "vgg16_bn", *MOBILENETS, "inception_v3")


def built(arch: str, in_channels: int = 3, classes: int = 10, size: int = 32, **keys: Any) -> Any:
    return networks.build(schema.Model(arch=arch, **keys), in_channels, classes, size)


def on_meta(arch: str, in_channels: int = 3, classes: int = 10, size: int = 32, **keys: Any) -> Any:
    with torch.device("meta"):
        return built(arch, in_channels, classes, size, **keys)


def torchvisions(arch: str, **keys: Any) -> Any:
    """torchvision's network on the meta device, without Inception's auxiliary head."""
    if arch == "inception_v3":
        keys |= {"aux_logits": False, "init_weights": False}
    with torch.device("meta"):
        return torchvision.models.get_model(arch, weights=None, **keys)


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in network.state_dict().items()}


# ---------------------------------------------------------------------------------------------------- torchvision's


@pytest.mark.parametrize("arch", [*RESNETS, *OTHERS])
def test_for_whole_images_it_is_torchvisions_network(arch: str) -> None:
    ours = on_meta(arch, classes=1000, size=299 if arch == "inception_v3" else 224)
    assert shapes(ours) == shapes(torchvisions(arch))


@pytest.mark.parametrize(
    ("arch", "size"),
    [
        *(("resnet18", 64), ("resnet50", 64), ("alexnet", 224), ("inception_v3", 75)),
        pytest.param("vgg16_bn", 224, marks=pytest.mark.slow),
        *((arch, 64) for arch in MOBILENETS),
    ],
)
def test_the_same_weights_give_torchvisions_logits(arch: str, size: int) -> None:
    ours = built(arch, classes=7, size=size).eval()
    theirs = torchvisions(arch, num_classes=7).eval()
    theirs.load_state_dict(ours.state_dict(), assign=True)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_resnets_take_images_that_are_not_square() -> None:
    assert built("resnet18", width=0.125)(torch.zeros(2, 3, 64, 48)).shape == (2, 10)


def test_initialization_is_torchvisions() -> None:
    ours = built("resnet18", classes=1000, size=224).state_dict()
    theirs = torchvision.models.resnet18().state_dict()
    for name in ("conv1.weight", "layer1.0.conv1.weight", "layer4.1.conv2.weight", "fc.weight"):
        assert float(ours[name].std()) == pytest.approx(float(theirs[name].std()), rel=0.05)


@pytest.mark.parametrize(
    ("arch", "size"),
    [
        *(pytest.param(arch, size, marks=pytest.mark.slow) for arch, size in (("alexnet", 224), ("vgg16_bn", 32))),
        *((arch, 32) for arch in MOBILENETS),
    ],
)
def test_initialization_of_the_others_is_torchvisions(arch: str, size: int) -> None:
    torch.manual_seed(0)
    ours = built(arch, classes=1000, size=size).state_dict()
    theirs = torchvision.models.get_model(arch, weights=None).state_dict()
    compared = 0
    for name, value in theirs.items():
        value = value.double()
        if value.shape != ours[name].shape or value.dim() == 0:
            continue  # the smaller fully connected layer, and batch counters
        if value.numel() < 500 and bool(value.std() > 0):
            continue  # too few for a standard deviation
        error = 8 * float(value.std()) / math.sqrt(value.numel()) + 1e-9
        compared += 1
        assert float(ours[name].double().mean()) == pytest.approx(float(value.mean()), abs=error), name
        assert float(ours[name].std()) == pytest.approx(float(value.std()), abs=error), name
    assert compared > 10


def test_initialization_of_inception_is_torchvisions() -> None:
    for name, value in built("inception_v3", size=75).state_dict().items():
        if name.endswith("conv.weight") or name == "fc.weight":
            assert float(value.std()) == pytest.approx(0.1, rel=0.05), name
        elif "running_var" in name or name.endswith("bn.weight"):
            assert bool((value == 1).all()), name


@pytest.mark.parametrize("bands", [1, 4, 16])
def test_the_first_convolution_takes_three_channels_a_band(bands: int) -> None:
    network = built("resnet18", in_channels=3 * bands, classes=5, width=0.25)
    assert network(torch.zeros(2, 3 * bands, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("arch", OTHERS)
@pytest.mark.parametrize("in_channels", [1, 12])
def test_the_others_take_any_number_of_channels_and_classes(arch: str, in_channels: int) -> None:
    network = on_meta(arch, in_channels, classes=5, size=80)
    assert network(torch.empty(2, in_channels, 80, 80, device="meta")).shape == (2, 5)
    # only the first convolution and what gives the classes depend on them, and what shrinks with the map
    other = shapes(torchvisions(arch, num_classes=5))
    different = [name for name, shape in shapes(network).items() if shape != other[name]]
    assert len(different) == 1 + arch.startswith(("alexnet", "vgg"))


@pytest.mark.parametrize("arch", ["resnet34", *MOBILENETS])
def test_parameters_shrink_with_the_square_of_the_width(arch: str) -> None:
    whole, half = (networks.count_parameters(on_meta(arch, width=width)) for width in (1, 0.5))
    if arch == "resnet34":
        assert whole / half == pytest.approx(4, rel=0.02)
    else:
        assert half == networks.count_parameters(torchvisions(arch, width_mult=0.5, num_classes=10)) < whole / 2


# ---------------------------------------------------------------------------------------------------- sizes of bands


@pytest.mark.parametrize(
    ("arch", "size", "inputs"),
    [
        *(("vgg16", 32, 512), ("vgg16", 56, 512), ("vgg16_bn", 112, 512 * 9), ("vgg16", 224, 512 * 49)),
        *(("vgg16", 448, 512 * 49), ("alexnet", 63, 256), ("alexnet", 112, 256 * 4), ("alexnet", 224, 256 * 36)),
    ],
)
def test_the_first_fully_connected_layer_shrinks_with_the_map(arch: str, size: int, inputs: int) -> None:
    network = on_meta(arch, size=size)
    assert next(m for m in network.classifier if isinstance(m, nn.Linear)).in_features == inputs
    assert network(torch.empty(2, 3, size, size, device="meta")).shape == (2, 10)


def test_a_map_of_one_pixel_equals_torchvisions_upsampled_map() -> None:
    # 36 copies of one pixel times 36 weights are that pixel times the sum of the weights
    ours = built("alexnet", size=64).eval()
    theirs = torchvision.models.alexnet(num_classes=10).eval()
    ours.load_state_dict(
        {
            name: value.view(4096, 256, 36).sum(dim=2) if name == "classifier.1.weight" else value
            for name, value in theirs.state_dict().items()
        }
    )
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x))


def forwards(network: nn.Module, size: int) -> bool:
    try:
        network(torch.empty(2, 3, size, size, device="meta"))
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("arch", [*RESNETS, *OTHERS])
def test_the_smallest_input_is_what_torchvisions_network_takes(arch: str) -> None:
    smallest = networks.SMALLEST.get(arch, 1)
    theirs = torchvisions(arch).eval()
    assert forwards(theirs, smallest)
    assert forwards(on_meta(arch, size=smallest).eval(), smallest)
    if smallest > 1:
        assert not forwards(theirs, smallest - 1)
        with pytest.raises(
            UserError,
            match=f"model.arch: '{arch}' needs inputs of at least {smallest} x {smallest}, but a branch gets "
            f"{smallest - 1} x {smallest - 1}; allowed: larger images",
        ):
            built(arch, size=smallest - 1)


def test_bands_that_are_too_small_are_found_before_a_run_starts(config_file: Path) -> None:
    config = loading.load(config_file, ["model.arch=vgg16", "model.width=1"])
    with pytest.raises(UserError, match="'vgg16' needs inputs of at least 32 x 32, but a branch gets 16 x 16"):
        parameters_of_branches(config)


# ---------------------------------------------------------------------------------------------------- ResNets


@pytest.mark.parametrize("tweaks", [["b"], ["b", "c"]])
def test_stems_keep_the_map_larger(tweaks: list[str]) -> None:
    maps, convolutions = {}, {}
    for stem in ("standard", "no_stride", "small"):
        network = built("resnet18", width=0.125, stem=stem, tweaks=tweaks)
        network.layer1.register_forward_hook(lambda _, __, out, stem=stem: maps.update({stem: out.shape[-1]}))
        network(torch.zeros(2, 3, 32, 32))
        convolutions[stem] = [m.kernel_size[0] for m in (network.conv1.modules()) if isinstance(m, nn.Conv2d)]
    assert maps == {"standard": 8, "no_stride": 16, "small": 32}
    deep = {stem: [3, 3, 3] for stem in maps}
    assert convolutions == (deep if "c" in tweaks else {"standard": [7], "no_stride": [7], "small": [3]})


def test_without_stride_the_stem_is_torchvisions_but_for_its_stride() -> None:
    ours = built("resnet18", stem="no_stride").eval()
    theirs = torchvisions("resnet18", num_classes=10).eval()
    theirs.conv1.stride = (1, 1)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x))


def test_tweak_b_moves_the_stride_of_a_bottleneck() -> None:
    strides = {}
    for tweaks in ([], ["b"]):
        network = on_meta("resnet50", tweaks=tweaks)
        blocks = [network.layer1[0], network.layer2[0], network.layer2[1]]
        strides["".join(tweaks)] = [(b.conv1.stride[0], b.conv2.stride[0]) for b in blocks]
    assert strides == {"": [(1, 1), (2, 1), (1, 1)], "b": [(1, 1), (1, 2), (1, 1)]}


def test_tweak_c_is_three_small_convolutions() -> None:
    network = on_meta("resnet18", in_channels=12, tweaks=["b", "c"])
    convolutions = [m for m in network.conv1 if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.stride[0]) for m in convolutions] == [
        (12, 32, 2),
        (32, 32, 1),
        (32, 64, 1),
    ]
    thin = on_meta("resnet18", tweaks=["c"], width=0.5)
    assert [m.out_channels for m in thin.conv1 if isinstance(m, nn.Conv2d)] == [16, 16, 32]
    fresh = built("resnet18", tweaks=["c"]).conv1[3].weight.detach()
    assert float(fresh.std()) == pytest.approx(math.sqrt(2 / (9 * 32)), rel=0.05)  # fan-out, as all other convolutions


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_tweak_d_averages_before_the_shortcut(arch: str) -> None:
    network = built(arch, width=0.25, tweaks=["b", "d"]).eval()
    first = network.layer2[0]
    x = torch.randn(2, first.conv1.in_channels, 8, 8)
    weight = first.downsample[1].weight[:, :, 0, 0]
    expected = torch.einsum("oc,bchw->bohw", weight, avg_pool2d(x, 2)) / math.sqrt(1 + 1e-5)  # a fresh norm
    torch.testing.assert_close(first.downsample(x), expected)
    assert network(torch.zeros(2, 3, 35, 35)).shape == (2, 10)  # maps of odd size


def test_with_b_c_and_d_it_is_timms_resnet50d() -> None:
    ours = on_meta("resnet50", classes=1000, size=224, tweaks=["b", "c", "d"])
    assert networks.count_parameters(ours) == 25_576_264  # timm 1.0.31


def test_with_b_c_and_d_the_logits_are_timms() -> None:
    timm = pytest.importorskip("timm")
    ours = built("resnet50", tweaks=["d", "c", "b"]).eval()
    theirs = timm.create_model("resnet50d", num_classes=10).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 66, 66)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("zero_gamma", [False, True])
def test_with_zero_gamma_a_block_begins_as_its_shortcut(arch: str, zero_gamma: bool) -> None:
    network = built(arch, width=0.25, zero_gamma=zero_gamma)
    block = network.layer3[1]
    x = torch.rand(2, block.conv1.in_channels, 4, 4)  # not negative, as the output of the previous block
    assert torch.equal(block(x), x) == zero_gamma
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    at_zero = sum(bool((norm.weight == 0).all()) for norm in norms)
    assert at_zero == (len(network.blocks()) if zero_gamma else 0)


def test_stochastic_depth_drops_late_blocks_more() -> None:
    rates = [m.p for m in on_meta("resnet18", drop_path=0.7).modules() if isinstance(m, StochasticDepth)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    assert not any(isinstance(m, StochasticDepth) for m in on_meta("resnet18").modules())
    assert shapes(on_meta("resnet18", drop_path=0.7)) == shapes(on_meta("resnet18"))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_stochastic_depth_drops_a_block_image_by_image(arch: str) -> None:
    def last_block(drop_path: float, x: Tensor | None = None) -> tuple[Any, Tensor]:
        torch.manual_seed(3)
        block = built(arch, width=0.125, drop_path=drop_path).layer4[-1]
        for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.eval()  # so that images are independent of each other
        return block, x if x is not None else torch.rand(64, block.conv1.in_channels, 3, 3)

    block, x = last_block(drop_path=0.25)
    always, _ = last_block(drop_path=0)
    always.eval()
    residual = always.last_norm(
        always.conv2(always.relu(always.bn1(always.conv1(x))))
        if arch == "resnet18"
        else always.conv3(always.relu(always.bn2(always.conv2(always.relu(always.bn1(always.conv1(x)))))))
    )
    out = block(x)
    dropped = torch.tensor([torch.equal(o, i) for o, i in zip(out, x, strict=True)])
    assert 4 <= int(dropped.sum()) <= 32
    expected = torch.relu(x + residual / 0.75)
    torch.testing.assert_close(out[~dropped], expected[~dropped])
    torch.testing.assert_close(block.eval()(x), always(x))


# ---------------------------------------------------------------------------------------------------- dropout, weights


@pytest.mark.parametrize("arch", OTHERS)
def test_dropout_replaces_the_architectures_own(arch: str) -> None:
    def rates(network: nn.Module) -> set[float]:
        return {m.p for m in network.modules() if isinstance(m, nn.Dropout)}

    assert rates(on_meta(arch, size=80)) == {0.2 if arch in MOBILENETS else 0.5}
    assert rates(on_meta(arch, size=80, dropout=0.9)) == {0.9}
    assert rates(on_meta(arch, size=80, dropout=0)) == {0}


@pytest.mark.parametrize(("arch", "size"), [("resnet50", 32), ("alexnet", 64), ("mobilenet_v3_small", 32)])
@pytest.mark.parametrize("init", ["xavier_uniform", "kaiming_normal", "default"])
def test_first_weights(arch: str, size: int, init: str) -> None:
    network = built(arch, size=size, init=init)
    as_said = []
    for layer in (m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)):
        weight = layer.weight.detach()
        fan_in, fan_out = weight[0].numel(), weight.shape[0] * weight[0, 0].numel()
        bound = math.sqrt(6 / (fan_in + fan_out))
        std, largest = {
            "xavier_uniform": (bound / math.sqrt(3), bound),
            "kaiming_normal": (math.sqrt(2 / fan_in), math.inf),
            "default": (0.0, 0.0),
        }[init]
        # six standard deviations of an estimate from this number of values
        close = abs(float(weight.std()) - std) < 6 * std / math.sqrt(2 * weight.numel())
        as_said.append(close and float(weight.abs().max()) <= 1.0001 * largest)
        as_said.append(layer.bias is None or not bool(layer.bias.any()))
    assert all(as_said) == (init != "default")


def test_weights_follow_torchs_random_state() -> None:
    for arch, size in (("alexnet", 64), ("resnet18", 32), ("mobilenet_v2", 32)):
        networks = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            networks.append(next(built(arch, size=size).parameters()))
        assert torch.equal(networks[0], networks[1])
        assert not torch.equal(networks[0], networks[2])


# ---------------------------------------------------------------------------------------------------- timm


def test_without_timm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"model.source: 'timm' given, but .*; pip install -e \.\[timm\]"):
        built("resnet18", source="timm")


class _Averaging(nn.Module):
    """A network that needs 5 x 5 pixels."""

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, classes, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean(dim=(2, 3))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A fake timm with one network; returns the arguments of its calls."""
    seen: list[dict[str, Any]] = []

    def create_model(name: str, **keys: Any) -> nn.Module:
        seen.append({"name": name, **keys})
        if name not in ("averaging", "positions"):
            raise RuntimeError(f"Unknown model ({name})")
        return _Averaging(keys["in_chans"], keys["num_classes"])

    def get_pretrained_cfg(name: str) -> Any:
        known = {"averaging": False, "positions": True}
        return types.SimpleNamespace(fixed_input_size=known[name]) if name in known else None

    stand_in: Any = types.ModuleType("timm")
    stand_in.create_model, stand_in.get_pretrained_cfg = create_model, get_pretrained_cfg
    monkeypatch.setitem(sys.modules, "timm", stand_in)
    return seen


def test_timm_is_asked_for_channels_and_classes(calls: list[dict[str, Any]]) -> None:
    network = built("averaging", in_channels=12, classes=7, size=9, source="timm", init="kaiming_normal")
    assert calls[-1] == {"name": "averaging", "pretrained": False, "in_chans": 12, "num_classes": 7}
    assert network(torch.zeros(2, 12, 9, 9)).shape == (2, 7)
    assert not bool(network.conv.bias.any())
    built("positions", size=9, source="timm")
    assert calls[-1]["img_size"] == 9


@pytest.mark.usefixtures("calls")
def test_what_timm_refuses_is_one_message() -> None:
    with pytest.raises(UserError, match=r"model.arch: timm cannot build 'resnet35' for 3 channels, .*: Unknown model"):
        built("resnet35", source="timm")
    with pytest.raises(UserError, match="'averaging' needs inputs of at least 5 x 5, but a branch gets 4 x 4"):
        built("averaging", size=4, source="timm")
    with pytest.raises(
        UserError, match="timm cannot build 'positions' for 3 channels, 4 x 4 pixels and 10 .*Kernel size"
    ):
        built("positions", size=4, source="timm")


@pytest.mark.parametrize("arch", ["resnet18", "mobilenetv3_small_100", "vit_tiny_patch16_224"])
def test_timms_networks_are_built(arch: str) -> None:
    pytest.importorskip("timm")
    assert on_meta(arch, 12, 5, 32, source="timm")(torch.empty(2, 12, 32, 32, device="meta")).shape == (2, 5)
    if arch == "resnet18":
        assert built(arch, 12, 5, 32, source="timm")(torch.zeros(2, 12, 32, 32)).shape == (2, 5)


def test_errors_of_timm_itself() -> None:
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=r"timm cannot build 'resnet35' .*: RuntimeError: Unknown model \(resnet35\)"):
        built("resnet35", source="timm")
    with pytest.raises(UserError, match="'inception_v3' needs inputs of at least 75 x 75, but a branch gets 56 x 56"):
        on_meta("inception_v3", size=56, source="timm")


def test_smaller_images_of_validation_are_refused_before_training(config_file: Path) -> None:
    keys = ["model.arch=inception_v3", "model.width=1", "model.stem=standard", "split.block=4"]
    config = loading.load(
        config_file, [*keys, "data.image_size=336", "data.val_image_size=288", "data.resize_size=336"]
    )
    with torch.device("meta"), pytest.raises(UserError, match="needs inputs of at least 75 x 75, but a branch gets 72"):
        Ensemble.of(config)


# ---------------------------------------------------------------------------------------------------- refused keys

MISTAKES = {
    "model.arch=resnet35": r"model.arch: 'resnet35' given; it should be 'resnet18', .*'mobilenet_v3_large', 'inception",
    "model.arch=vgg16": (
        r"model.width: 0.125 given; allowed: 1.0 for vgg16; other values are supported by resnet18, .*mobilenet_v2"
    ),
    "model.arch=vgg16 model.width=1 model.stem=small": r"model.stem: 'small' given; allowed: 'standard' for vgg16",
    "model.arch=mobilenet_v2 model.tweaks=['d']": r"model.tweaks: \['d'\] given; allowed: \['b'\] for mobilenet_v2",
    "model.arch=mobilenet_v2 model.zero_gamma=true": "model.zero_gamma: True given; allowed: False for mobilenet_v2",
    "model.arch=mobilenet_v2 model.drop_path=0.1": "model.drop_path: 0.1 given; allowed: 0.0 for mobilenet_v2",
    "model.dropout=0.1": (
        "model.dropout: 0.1 given; allowed: unset for resnet18; other values are supported by alexnet, vgg16"
    ),
    "model.dropout=2": "model.dropout: 2 given; it should be less than or equal to 1",
    "model.drop_path=-1": "model.drop_path: -1 given; it should be greater than or equal to 0",
    "model.tweaks=['e']": r"model.tweaks: \['e'\] given; allowed: a list of \"b\", \"c\" and \"d\", each at most once",
    "model.tweaks=['c','c']": "allowed: a list of",
    "model.tweaks=bcd": "model.tweaks: 'bcd' given; allowed: a list of",
    "model.tweaks=[['b']]": "allowed: a list of",
    "model.stem=tiny": "model.stem: 'tiny' given; it should be 'standard', 'no_stride' or 'small'",
    "model.init=zeros": "model.init: 'zeros' given; it should be 'default', 'xavier_uniform' or 'kaiming_normal'",
    "model.source=torch": "model.source: 'torch' given; it should be 'torchvision' or 'timm'",
    "model.source=timm": "model.width: 0.125 given; allowed: 1.0 for timm's resnet18",
    "model.source=timm model.width=1 model.stem=small": "model.stem: 'small' given; allowed: 'standard' for timm's",
    "model.source=timm model.width=1 model.dropout=0.1": "model.dropout: 0.1 given; allowed: unset for timm's resnet18",
    "model.source=timm model.width=1 model.bn_batch_size=4": "model.bn_batch_size: 4 given; allowed: 'rank' for timm's",
}


@pytest.mark.parametrize(("overrides", "message"), MISTAKES.items())
def test_keys_without_a_meaning_are_refused(config_file: Path, overrides: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        loading.load(config_file, overrides.split(" "))


def test_every_architecture_loads_with_what_it_writes_out(config_file: Path, tmp_path: Path) -> None:
    keys = [["model.arch=" + arch] for arch in (*RESNETS, *OTHERS)]
    keys += [["model.source=timm", "model.arch=anything"], ["model.arch=resnet50", "model.tweaks=[]"]]
    keys += [["model.arch=resnet18", "model.tweaks=['d','b','c']", "model.stem=no_stride", "model.drop_path=0.1"]]
    keys += [["model.arch=alexnet", "model.dropout=0"]]
    for overrides in keys:
        config = loading.load(config_file, [*overrides, "model.width=1"])
        written = tmp_path / "resolved.toml"
        written.write_text(tomli_w.dumps(resolved(config)))
        assert loading.load(written) == config


# ---------------------------------------------------------------------------------------------------- [[branch]]

BRANCHES = """
[[branch]]
bands = [0]
[[branch]]
bands = [1, 2]
arch = "resnet34"
[[branch]]
bands = [3]
width = 0.25
stem = "small"
"""


@pytest.fixture
def of_branches(config_file: Path) -> Path:
    config_file.write_text(config_file.read_text() + BRANCHES)
    return config_file


def test_branches_differ_as_their_tables_say(of_branches: Path) -> None:
    config = loading.load(of_branches)
    assert config.split.groups == ((0,), (1, 2), (3,))
    assert config.model_of(0) == config.model
    assert config.model_of(1) == config.model.model_copy(update={"arch": "resnet34"})
    assert config.model_of(2) == config.model.model_copy(update={"width": 0.25, "stem": "small"})
    expected = [("resnet18", 3, 0.125, "standard"), ("resnet34", 6, 0.125, "standard"), ("resnet18", 3, 0.25, "small")]
    parameters = [
        networks.count_parameters(on_meta(arch, channels, width=width, stem=stem))
        for arch, channels, width, stem in expected
    ]
    assert parameters_of_branches(config) == (parameters, parameters)
    assert config.networks == "1 x resnet18, 1 x resnet34, 1 x resnet18 of width 0.25"
    ensemble = Ensemble.of(config).eval()
    assert ensemble([torch.zeros(2, 3 * n, 16, 16) for n in (1, 2, 1)]).shape == (3, 2, 10)


def test_a_branch_alone_is_the_one_of_the_ensemble(of_branches: Path) -> None:
    whole = Ensemble.of(loading.load(of_branches)).branches
    config = loading.load(of_branches, ["split.only=[2, 1]"])
    assert config.split.groups == ((3,), (1, 2))
    assert config.networks == "1 x resnet18 of width 0.25, 1 x resnet34"
    for branch, number in zip(Ensemble.of(config).branches, (2, 1), strict=True):
        torch.testing.assert_close(branch.state_dict(), whole[number].state_dict(), rtol=0, atol=0)


def test_without_tables_every_branch_is_the_model(config_file: Path) -> None:
    config = loading.load(config_file)
    assert config.branch == ()
    assert all(config.model_of(number) is config.model for number in range(4))
    assert config.networks == "4 x resnet18"


def test_a_config_with_branches_survives_being_written_out(of_branches: Path, tmp_path: Path) -> None:
    config = loading.load(of_branches, ["split.only=[1]"])
    written = tmp_path / "resolved.toml"
    written.write_text(tomli_w.dumps(resolved(config)))
    assert loading.load(written) == config
    assert schema.RunConfig.model_validate({name: getattr(config, name) for name in schema.RunConfig.model_fields})


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("bands = [3]\n", "", "tiny.toml: branch.2.bands: missing; expected: band numbers"),
        ("bands = [3]", "bands = [4]", r"split.branches: \[4\] given; allowed: bands 0 to 3, since block = 2"),
        ("bands = [3]", "bands = []", r"branch.bands: \[\] given; allowed: band numbers, such as \[0, 1\]"),
        ("bands = [3]", "bands = 3", "branch.bands: 3 given; allowed: band numbers"),
        ("width = 0.25", "widht = 0.25", r"tiny.toml: branch.2.widht: unknown key; did you mean width\?"),
        ("width = 0.25", "lr = 1", r"branch.2.lr: unknown key; allowed in \[\[branch\]\]: bands, arch, width, stem"),
        ("width = 0.25", "width = 9", "branch.2.width: 9 given; it should be less than or equal to 4"),
        ('"small"', '"tiny"', "branch.2.stem: 'tiny' given; it should be 'standard', 'no_stride' or 'small'"),
        ("resnet34", "resnet35", "branch.1.arch: 'resnet35' given; allowed: 'resnet18', 'resnet34'"),
        ("resnet34", "vgg16", "branch.1.width: 0.125 given; allowed: 1.0 for vgg16"),
        ("width = 0.125", "width = 0.125\nzero_gamma = true", None),
        ('"resnet34"', '"vgg16"\nwidth = 1\n#', None),
        (
            "block = 2",
            'block = 2\nbranches = "all"',
            "split.branches: 'all' given; allowed: unset, since",
        ),
        ("block = 2", "block = 2\nbranches = [[0], [1, 2]]", r"split.branches: .* given; allowed: unset"),
        ("block = 2", "block = 2\nbranches = 3", "split.branches: 3 given; allowed: unset"),
        ("block = 2", "block = 2\nbranches = [[0], [1, 2], [3]]", None),
        ("block = 2", 'block = 2\nbranches = "each"', None),
        ("block = 2", "block = 2\nonly = [3]", r"split.only: \[3\] given; allowed: branches 0 to 2"),
    ],
)
def test_mistakes_in_branches(of_branches: Path, before: str, after: str, message: str | None) -> None:
    text = of_branches.read_text()
    assert text.count(before) == 1
    of_branches.write_text(text.replace(before, after))
    if message is None:
        assert loading.load(of_branches).split.groups == ((0,), (1, 2), (3,))
        return
    with pytest.raises(UserError, match=message):
        loading.load(of_branches)


def test_a_key_of_the_model_must_fit_every_branch(of_branches: Path) -> None:
    text = of_branches.read_text().replace("width = 0.125", "width = 1\nzero_gamma = true")
    of_branches.write_text(text.replace("resnet34", "alexnet"))
    message = "branch.1.arch: 'alexnet' given; allowed: an architecture that supports model.zero_gamma = True"
    with pytest.raises(UserError, match=message):
        loading.load(of_branches)


def test_the_key_branch_is_a_list_of_tables(config_file: Path) -> None:
    for value in ("3", "[3]", '"each"', "[[0], [1]]"):
        with pytest.raises(UserError, match=r"--set branch=.*: branch(.0)?: .* given; expected tables \[\[branch\]\]"):
            loading.load(config_file, [f"branch={value}"])


# ---------------------------------------------------------------------------------------------------- published sizes


def test_published_sizes_are_reached(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(REPOSITORY / "script/model_sizes.py"), run_name="__main__")
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in capsys.readouterr().out.splitlines()[2:]]
    equal = {(row[0], row[5]) for row in rows if row[6] == "equal"}
    assert equal == {
        ("VGG-16", "527.79"),
        ("VGG-16 with batch norm, a branch of sub4", "207.82"),
        ("AlexNet", "233.08"),
        ("ResNet-34", "83.15"),
        ("ResNet-50 without buffers", "97.49"),
        ("ResNet-50 with buffers", "97.69"),
        ("ResNet-50, ImageNet-21K", "171.56"),
    }
