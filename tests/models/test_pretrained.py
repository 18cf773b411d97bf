"""Trained weights in branches, against the networks that they come from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torchvision.transforms.v2.functional import normalize

from bandsplit.config import loading
from bandsplit.config.schema import RunConfig
from bandsplit.errors import UserError
from bandsplit.inference import weights
from bandsplit.inference.loading import load
from bandsplit.models.ensemble import Ensemble
from bandsplit.models.networks import first_convolution
from bandsplit.runs.initial import begin, initial_weights
from bandsplit.runs.restored import Restored
from bandsplit.spectral import transforms
from bandsplit.spectral.view import View
from bandsplit.training.learner import learners_of
from tests.compare import assert_equal
from tests.conftest import Done, run
from tests.training.tiny import ALONE, FP32

CLASSES = [f"class {i}" for i in range(10)]
ALL = ["split.branches=all", "model.stem=no_stride", "model.width=1", "data.image_size=64", "data.resize_size=64"]


def randomized(network: nn.Module) -> nn.Module:
    """In evaluation mode, with norms that do something."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low in ((module.running_mean, -0.5), (module.running_var, 0.5), (module.weight, 0.5)):
                values.data.copy_(low + torch.rand(values.shape, generator=generator))  # type: ignore[union-attr]
    return network.eval()


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return randomized(torchvision.models.resnet18(num_classes=10))


@pytest.fixture
def file(resnet: nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "resnet18.pth"
    torch.save(resnet.state_dict(), path)
    return path


def images(config: RunConfig) -> Tensor:
    """Pixels (B, H, W, 3), uint8, of the size of a config."""
    size = (2, config.data.image_size, config.data.image_size, 3)
    return torch.randint(256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def inputs(config: RunConfig) -> list[Tensor]:
    """Bands of the images for each branch, as in training."""
    view, split = View.of(config), config.split
    return transforms.split_images(images(config), view.matrix, split.block, view.mean, view.std, groups=split.groups)


def normalized(config: RunConfig) -> Tensor:
    """The images as torchvision's networks read them."""
    return normalize(images(config).movedim(-1, 1) / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def begun(config: RunConfig, classes: list[str] = CLASSES) -> Any:
    """The branches of a config with the weights that they begin with, in evaluation mode."""
    config = config.with_classes(len(classes))
    own = range(len(config.split.groups))
    ensemble = Ensemble.of(config)
    begin(initial_weights(config, own, classes), config.split.numbers, ensemble)
    return ensemble.eval()


@pytest.mark.parametrize(
    "keys",
    [
        [],
        ["split.transform=dct1d", "split.norm=none"],
        ["split.transform=random", "split.scale=0.5", "split.sigma=[2, 1, 0.5, 0.1]"],
        ["data.std=[50, 60, 70]"],
        ["split.block=1", "model.stem=standard"],
    ],
    ids=str,
)
@torch.no_grad()
def test_on_all_bands_the_logits_are_those_on_pixels(
    resnet: nn.Module, file: Path, config_file: Path, keys: list[str]
) -> None:
    config = loading.load(config_file, [*ALL, *keys, f"model.init_from={file}"])
    expected = resnet(normalized(config))
    torch.testing.assert_close(begun(config)(inputs(config))[0], expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


def test_the_dry_run_reads_the_weights_that_the_run_would(
    file: Path, config_file: Path, run_here: Callable[..., Done]
) -> None:
    keys = [word for key in [*ALL, f"model.init_from={file}"] for word in ("--set", key)]
    done = run_here("train.py", config_file, "--dry-run", *keys)
    assert done.returncode == 0, done.stderr
    assert f"\nbegins    with {file}" in done.stdout
    assert "split.sigma" not in done.stdout
    done = run_here("train.py", config_file, "--dry-run", *keys, "--set", "split.scale=0.5")
    assert done.returncode == 0, done.stderr
    (begins,) = (line for line in done.stdout.splitlines() if line.startswith("begins"))
    assert begins.endswith("; as if split.sigma, measured when the run starts, were 1")
    done = run_here("train.py", config_file, "--dry-run", *keys, "--set", "model.arch=resnet34")
    assert done.returncode == 2
    assert f"error: model.init_from: {file} is another network" in done.stderr


@torch.no_grad()
def test_deep_stems_of_timm_are_exact_too(config_file: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    theirs = randomized(timm.create_model("resnet50d", num_classes=10))
    torch.save({"state_dict": {f"module.{key}": x for key, x in theirs.state_dict().items()}}, tmp_path / "ddp.pt")
    keys = ["model.arch=resnet50", "model.tweaks=b,c,d", f"model.init_from={tmp_path / 'ddp.pt'}"]
    config = loading.load(config_file, [*ALL, *keys])
    torch.testing.assert_close(begun(config)(inputs(config))[0], theirs(normalized(config)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_transformer_whose_patches_do_not_divide_other_sizes_is_exact_too(config_file: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("test_vit", img_size=64, num_classes=10).eval()
    torch.save(theirs.state_dict(), tmp_path / "vit.pt")
    keys = ["model.source=timm", "model.arch=test_vit", "model.stem=standard", "split.block=1"]
    config = loading.load(config_file, [*ALL, *keys, f"model.init_from={tmp_path / 'vit.pt'}"])
    torch.testing.assert_close(begun(config)(inputs(config))[0], theirs(normalized(config)), rtol=1e-4, atol=1e-4)


def test_an_average_of_weights_begins_with_the_trained_ones(file: Path, config_file: Path) -> None:
    config = loading.load(config_file, [*ALL, "train.ema_decay=0.9", f"model.init_from={file}"]).with_classes(10)
    trained = initial_weights(config, range(1), CLASSES)
    ensemble, (learner,) = learners_of(config, 12, FP32, ALONE, trained)
    assert learner.validated is not ensemble.branches[0]
    for each in (learner.validated, ensemble.branches[0]):
        assert_equal(dict(each.state_dict()), dict(trained[0].state))


@pytest.mark.parametrize("transform", ["dct2d", "dct1d"])
@torch.no_grad()
def test_the_shares_of_bands_add_up(resnet: Any, file: Path, config_file: Path, transform: str) -> None:
    """The convolution is linear: the outputs of one-band branches sum to that on pixels."""
    keys = [*ALL, "split.branches=each", f"split.transform={transform}", f"model.init_from={file}"]
    config = loading.load(config_file, keys)
    ensemble = begun(config)
    outputs = [branch.conv1(x) for branch, x in zip(ensemble.branches, inputs(config), strict=True)]
    expected = resnet.conv1(normalized(config))
    torch.testing.assert_close(sum(outputs), expected, rtol=1e-4, atol=1e-4)
    shares = [initial.share for initial in initial_weights(config.with_classes(10), range(4), CLASSES).values()]
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize(("block", "every"), [(2, 1), (4, 2)])
@torch.no_grad()
def test_a_small_kernel_has_the_middle_and_a_large_block_fewer_places(
    resnet: Any, file: Path, config_file: Path, block: int, every: int
) -> None:
    """3 x 3 over blocks reach from `block` pixels before the first of the block to `block` after its last."""
    keys = [*ALL, "model.stem=small", f"split.block={block}", f"model.init_from={file}"]
    config = loading.load(config_file, keys)
    weight = resnet.conv1.weight.clone()
    for tap, offset in enumerate(range(-3, 4)):
        if not -block <= offset < 2 * block:
            weight[:, :, tap], weight[:, :, :, tap] = 0, 0
    expected = conv2d(normalized(config), weight, stride=2, padding=3)[:, :, ::every, ::every]
    torch.testing.assert_close(begun(config).branches[0].conv1(inputs(config)[0]), expected, rtol=1e-4, atol=1e-4)
    initial = initial_weights(config.with_classes(10), range(1), CLASSES)[0]
    assert initial.share == pytest.approx(float(weight.square().sum() / resnet.conv1.weight.square().sum()), rel=1e-2)
    bands = f"{block**2} of {block**2} bands of {block} x {block} blocks"
    told = f"7 x 7 over pixels with a stride of 2 pixels, becomes 3 x 3 over {bands} with a stride of {block} pixels"
    assert initial.words == f"{file}; its first convolution, {told}"


@pytest.mark.parametrize("classes", [CLASSES[:3], CLASSES])
def test_another_number_of_classes_gets_a_new_head(
    resnet: nn.Module, file: Path, config_file: Path, classes: list[str]
) -> None:
    config = loading.load(config_file, [*ALL, "data.classes=none", f"model.init_from={file}"])
    branch, theirs = begun(config, classes).branches[0], resnet.state_dict()
    fresh = Ensemble.of(config.with_classes(len(classes))).branches[0]
    for key, value in branch.state_dict().items():
        if key != "conv1.weight":
            new = key.startswith("fc.") and len(classes) == 3
            assert torch.equal(value, (fresh.state_dict() if new else theirs)[key])
    words = initial_weights(config.with_classes(len(classes)), range(1), classes)[0].words
    assert words.endswith("; new head, for 3 classes instead of 10") == (len(classes) == 3)


def exported(ensemble: Ensemble, config: RunConfig, classes: list[str], path: Path) -> None:
    """Writes what is read of a file of `bandsplit export`, in float16."""
    view = View.of(config)
    network = config.model.model_dump(mode="json", include={"source", "arch", "width", "stem", "tweaks"})
    pairs = zip(config.split.numbers, config.split.groups, strict=True)
    about = {
        "classes": classes, "block": config.split.block, "matrix": view.matrix.tolist(), "std": view.std,
        "image_size": config.data.image_size,
        "branches": [{"number": k, "bands": bands, "network": network} for k, bands in pairs],
    }  # fmt: skip
    state = {key: value.half() if value.is_floating_point() else value for key, value in ensemble.state_dict().items()}
    save_file(state, path, {"bandsplit": json.dumps(about)})


def test_weights_of_a_run_and_of_an_exported_one_come_back(
    finished: Callable[..., Path], config_file: Path, tmp_path: Path
) -> None:
    """Branch by branch, with the head where classes have the same names; over another transform, through pixels."""
    restored = Restored.of(finished(1), "best")
    weights.write(load(finished(1)), tmp_path / "run.safetensors", torch.float16)
    for source, exact in ((finished(1), 1e-6), (tmp_path / "run.safetensors", 2e-3)):
        config = loading.load(config_file, [f"model.init_from={source}"])
        ours = begun(config, restored.classes)
        for (key, a), b in zip(ours.state_dict().items(), restored.ensemble.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=exact, atol=exact, msg=key)
        assert initial_weights(config, range(4), CLASSES)[0].words.endswith("; new head, for 10 other classes")
        other = loading.load(config_file, [f"model.init_from={source}", "split.branches=[[0], [1], [2], [3], [0, 1]]"])
        with pytest.raises(UserError, match=r"has branches \[0, 1, 2, 3\]; allowed: one with branch 4, or with one"):
            begun(other)


def test_the_only_branch_that_had_begun_is_not_for_all(
    finished: Callable[..., Path], config_file: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(finished(1), tmp_path / "run", symlinks=True))
    config = (run_dir / "config.toml").read_text()
    for change in (("start_epochs = []", "start_epochs = [9, 9, 0, 9]"), ("\nepochs = 2\n", "\nepochs = 20\n")):
        assert change[0] in config
        config = config.replace(*change)
    (run_dir / "config.toml").write_text(config)
    with pytest.raises(UserError, match=r"has branches \[2\]; allowed: one with branch 0, or with one branch for all"):
        initial_weights(loading.load(config_file, [f"model.init_from={run_dir}"]), range(4), CLASSES)


@torch.no_grad()
def test_one_network_on_one_transform_serves_all_branches_of_another(
    file: Path, config_file: Path, tmp_path: Path
) -> None:
    first = loading.load(config_file, [*ALL, "split.transform=dct1d", f"model.init_from={file}"])
    exported(begun(first), first, CLASSES, tmp_path / "one.safetensors")
    keys = [*ALL, "split.branches=[[0, 1, 2, 3], [3, 2, 1, 0]]", f"model.init_from={tmp_path / 'one.safetensors'}"]
    second = loading.load(config_file, keys)
    expected = begun(first)(inputs(first))[0]
    for logits in begun(second)(inputs(second)):
        torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.02)


def test_a_network_on_one_band_is_nothing_for_another(file: Path, config_file: Path, tmp_path: Path) -> None:
    first = loading.load(config_file, [*ALL, "split.branches=[[0]]", f"model.init_from={file}"])
    exported(begun(first), first, CLASSES, tmp_path / "low.safetensors")
    keys = [*ALL, "split.branches=[[1]]", f"model.init_from={tmp_path / 'low.safetensors'}"]
    with pytest.raises(UserError, match="low.safetensors reads none of the bands of a branch that begins with it"):
        begun(loading.load(config_file, keys))


def test_torchvisions_weights_are_read_from_its_cache(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    config = loading.load(config_file, [*ALL, "model.init_from=torchvision"])
    with pytest.raises(UserError, match=r"'torchvision' given, but https.*resnet18-f37072fd.pth cannot be read: "):
        begun(config)
    (tmp_path / "hub/checkpoints").mkdir(parents=True, exist_ok=True)
    theirs = torchvision.models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "hub/checkpoints/resnet18-f37072fd.pth")
    assert torch.equal(begun(config).branches[0].layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)
    keys = ["model.source=timm", "model.arch=resnet10t", "model.width=1", "model.init_from=torchvision"]
    with pytest.raises(UserError, match="'torchvision' given, but it has no weights of 'resnet10t'"):
        begun(loading.load(config_file, keys))


def test_a_bottleneck_with_its_strides_elsewhere_is_another_network(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tweak b moves them, which no weight shows: torchvision's ResNet-50 has it, a file of weights does not say."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    cached, plain = tmp_path / "hub/checkpoints/resnet50-11ad3fa6.pth", tmp_path / "plain.pth"
    with torch.device("meta"):
        theirs = torchvision.models.resnet50().state_dict()
    torch.save({key: torch.tensor(1.0).expand(x.shape) for key, x in theirs.items()}, cached)
    plain.symlink_to(cached)
    keys, export = [*ALL, "model.arch=resnet50"], tmp_path / "export.safetensors"
    own = loading.load(config_file, [*keys, "model.tweaks=[]", "model.width=0.125"]).with_classes(10)
    exported(Ensemble.of(own), own, CLASSES, export)

    def words(*overrides: str) -> str:
        config = loading.load(config_file, [*keys, *overrides]).with_classes(10)
        return initial_weights(config, range(1), CLASSES)[0].words

    assert words("model.init_from=torchvision").startswith("torchvision's ResNet50_Weights.IMAGENET1K_V2; ")
    with pytest.raises(UserError, match=r"layer2\.0\.conv1 has a stride of 1, here 2 \(model\.tweaks\), layer2"):
        words("model.init_from=torchvision", "model.tweaks=[]")
    for tweaks, told in ('["b"]', "with"), ("[]", "without"):
        said = words(f"model.init_from={plain}", f"model.tweaks={tweaks}")
        assert said.startswith(f"{plain} (assumed to be {told} tweak b); ")
    assert words(f"model.init_from={export}", "model.tweaks=[]", "model.width=0.125") == str(export)
    with pytest.raises(UserError, match=r"layer2\.0\.conv1 has a stride of 2, here 1"):
        words(f"model.init_from={export}", "model.width=0.125")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pth", None, "none.pth' given, but there is no such file; allowed: 'torchvision', 'timm', a file"),
        (".", None, "not a run directory: it has no config.toml"),
        ("text.pth", b"weights", "text.pth: cannot be read as weights alone: "),
        ("text.safetensors", b"weights", "text.safetensors: not a safetensors file: "),
        ("epoch.pth", {"epoch": 3}, "epoch.pth: holds no state dict, also not as 'state_dict' or 'model'"),
        (
            "cifar.pth",
            torchvision.models.resnet18().state_dict() | {"conv1.weight": torch.zeros(64, 3, 3, 3)},
            "is another network: conv1.weight is (64, 3, 3, 3), here (8, 3, 7, 7), ",
        ),
        (
            "other.pth",
            {"conv1.weight": torch.zeros(8, 3, 7, 7), "stem.bias": torch.zeros(8)},
            "is another network: bn1.weight is missing, bn1.bias is missing, bn1.running_mean is missing and ",
        ),
    ],
)
def test_what_cannot_be_read_is_one_message(
    config_file: Path, tmp_path: Path, name: str, content: Any, message: str
) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(UserError, match="model.init_from") as error:
        begun(loading.load(config_file, [f"model.init_from={tmp_path / name}"]))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_network_of_another_width_is_named_by_its_weights(file: Path, config_file: Path) -> None:
    with pytest.raises(UserError, match=r"conv1.weight is \(64, 3, 7, 7\), here \(8, 3, 7, 7\)"):
        begun(loading.load(config_file, ["model.stem=no_stride", f"model.init_from={file}"]))


def test_a_branch_may_begin_with_weights_of_its_own(file: Path, config_file: Path) -> None:
    with config_file.open("a") as config:
        config.write(f'[[branch]]\nbands = [0]\nwidth = 1.0\ninit_from = "{file}"\n[[branch]]\nbands = [1]\n')
    loaded = loading.load(config_file)
    assert list(initial_weights(loaded.with_classes(10), range(2), CLASSES)) == [0]
    assert first_convolution(begun(loaded).branches[1])[1].out_channels == 8


@pytest.mark.slow
def test_timms_weights_are_read_from_its_cache(config_file: Path, tmp_path: Path) -> None:
    """In a process of its own: the place of the cache is read when the library is imported."""
    timm = pytest.importorskip("timm")
    snapshot = tmp_path / "hub/models--timm--resnet18.a1_in1k/snapshots/0"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0")
    theirs = timm.create_model("resnet18").state_dict()
    theirs["layer4.1.bn2.bias"].fill_(3)
    save_file(theirs, snapshot / "model.safetensors")
    code = (
        "import sys; from bandsplit.config import loading; from bandsplit.runs.initial import initial_weights\n"
        "for arch in ('resnet18', 'resnet34'):\n"
        "    config = loading.load(sys.argv[1], [*sys.argv[2:], f'model.arch={arch}']).with_classes(10)\n"
        "    initial = initial_weights(config, range(1), 'abcdefghij')[0]\n"
        "    print(initial.words, '|', initial.state['layer4.1.bn2.bias'].mean().item())\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = run(str(script), config_file, *ALL, "model.init_from=timm", env=env)
    assert done.stdout.startswith("timm's resnet18; its first convolution, 7 x 7 over pixels with"), done.stderr
    assert done.stdout.endswith("; new head, for 10 classes instead of 1000 | 3.0\n")
    assert "UserError: model.init_from: 'timm' given, but its 'resnet34' cannot be loaded: " in done.stderr
