"""Every shipped config: it loads, its network builds, its learning rates are correct, and it trains."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli
import torch

from bandsplit.config import loading, schema
from bandsplit.data import demo
from bandsplit.errors import UserError
from bandsplit.models.costs import costs_of
from bandsplit.models.ensemble import Ensemble
from bandsplit.runs import checkpoint
from bandsplit.runs.directory import resolved
from bandsplit.training import memory, optimizers, schedules
from tests.conftest import DATA_TOML, REPOSITORY, Shared, run
from tests.training.tiny import FP32

SHIPPED = sorted((REPOSITORY / "config/train").glob("*.toml"))
RECIPES = [path for path in SHIPPED if path.name.startswith("recipe_")]  # fragments without a network
CONFIGS = [path for path in SHIPPED if path not in RECIPES]
DATA = sorted((REPOSITORY / "config/data").glob("*.toml"))
STEPS = 100  # per epoch


def by_hand(config: schema.RunConfig) -> tuple[list[float], list[float | None]]:
    """Learning rate and momentum of ten steps, computed from the formulas with numpy."""
    schedule, optim = config.schedule, config.optim
    total = config.train.epochs * STEPS
    ratio = config.train.batch_size / (optim.base_batch or config.train.batch_size)
    peak = optim.lr * (ratio if optim.scaling == "linear" else math.sqrt(ratio))
    warm = int(schedule.warmup_epochs * STEPS)
    lrs: list[float] = []
    momenta: list[float | None] = []
    for step in (np.linspace(0, 1, 10) * (total - 1)).astype(int):
        t, momentum = step - warm, None
        if schedule.type == "cosine":
            period = (schedule.period_epochs or config.train.epochs - schedule.warmup_epochs) * STEPS
            phase = t / period
            lr = schedule.lr_min + (peak - schedule.lr_min) * np.cos(np.pi * phase / 2) ** 2
        elif schedule.type == "step":
            lr = peak * schedule.gamma ** (step // int(schedule.every_epochs * STEPS))
        elif schedule.type == "one_cycle":
            top = schedule.peak_at * total - 1
            height = np.interp(t, [0, top, total - 1], [0, 1, 2])
            wave = (1 - np.cos(np.pi * height)) / 2
            low = peak * (schedule.start_factor if height <= 1 else schedule.end_factor)
            lr = low + (peak - low) * wave
            momentum = schedule.momentum[1] - (schedule.momentum[1] - schedule.momentum[0]) * wave
        if step < warm:
            lr = peak * (step + 1) / warm
        lrs.append(float(lr))
        momenta.append(momentum)
    return lrs, momenta


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_loads_builds_and_has_its_learning_rates(path: Path) -> None:
    config = loading.load(path)
    steps = (np.linspace(0, 1, 10) * (config.train.epochs * STEPS - 1)).astype(int).tolist()
    lrs, momenta = by_hand(config)
    assert [schedules.lr_at(step, STEPS, config) for step in steps] == pytest.approx(lrs, rel=1e-6, abs=1e-12)
    ours = [schedules.momentum_at(step, STEPS, config) for step in steps]
    assert ours == [None if m is None else pytest.approx(m, rel=1e-6) for m in momenta]
    side, last = config.data.image_size // config.split.block, len(config.split.groups) - 1
    with torch.device("meta"):
        ensemble = Ensemble.of(config, range(last, last + 1)).eval()
        logits = ensemble([torch.empty(2, 3 * len(config.split.groups[last]), side, side)])
    assert logits.shape == (1, 2, config.data.classes)
    optimizer = optimizers.optimizer(ensemble.branches[0], config)
    assert optimizer.defaults["lr"] == pytest.approx(max(lrs) if config.schedule.type == "step" else config.peak_lr)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_header_names_its_own_command(path: Path) -> None:
    head = path.read_text().split("\n\n")[0]
    launched = f"config/train/{path.name}" if path.stem != "demo" else "torchrun src/train.py"
    assert head.startswith("# ")
    assert launched in head


@pytest.mark.parametrize("path", [p for p in CONFIGS if "_channels_" in p.stem], ids=lambda path: path.stem)
def test_its_header_states_its_cost_beside_the_baselines(path: Path) -> None:
    """Multiplications by torch's counter; activations as in the dry run."""
    names = (path, path.with_name(path.stem.split("_")[0] + "_baseline.toml"))
    own, base = (loading.load(each, ["train.batch_size=8"]) for each in names)
    (said,) = re.findall(r"([\d.]+) GMACs per image forward \(baseline: ([\d.]+)\), and (.+?) activations", _head(path))
    assert said[:2] == (_gmacs(own), _gmacs(base))
    kept = [memory.estimate(config, 1, 1, FP32).activations for config in (own, base)]
    share = {"as many": 1, "three quarters of the": 0.75, "a quarter of the": 0.25, "a fifth of the": 0.2}[said[2]]
    assert kept[0] / kept[1] == pytest.approx(share, abs=0.04)


def _gmacs(config: schema.RunConfig) -> str:
    (cost,) = costs_of(config)
    return f"{cost.macs[config.data.image_size] / 1e9:.2f}"


def _head(path: Path) -> str:
    return path.read_text().split("\n\n")[0].replace("\n# ", " ")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_extended_and_says_that_it_is_no_config(path: Path) -> None:
    assert path.read_text().startswith("# Recipe, not a complete config: ")
    with pytest.raises(UserError, match=r"recipe_\w+.toml: model(\.arch)?: missing"):
        loading.load(path)
    extended = [tomli.loads(other.read_text()).get("extends", []) for other in CONFIGS]
    assert any(path.name in ([names] if isinstance(names, str) else names) for names in extended)


@dataclass(frozen=True)
class Audit:
    """A table of doc/recipes.md: the values of each key, one for all configs or one per group of configs."""

    groups: list[list[str]]
    rows: dict[str, list[object]]

    @staticmethod
    def read(kind: str) -> list[Audit]:
        """All tables about "Configs" or about "Data"."""
        audits = []
        for section in re.split(r"^##+ ", (REPOSITORY / "doc/recipes.md").read_text(), flags=re.MULTILINE):
            named = re.search(rf"^{kind}: (.*)$", section, flags=re.MULTILINE)
            if named:
                groups = [re.findall(r"`(\w+)`", group) for group in named[1].split(";")]
                rows = re.findall(r"^\| `([\w.]+)` \|[^|]*\|([^|]*)\|[^|]*\|$", section, flags=re.MULTILINE)
                audits.append(Audit(groups, {key: Audit._values(cell) for key, cell in rows}))
        return audits

    @staticmethod
    def _values(cell: str) -> list[object]:
        found = re.findall(r"`([^`]*)`|(unset)", cell)
        return [None if unset else tomli.loads(f"value = {value}")["value"] for value, unset in found]

    def check(self, name: str, resolved: dict[str, Any], said: dict[str, Any]) -> None:
        """The values match the config, and every key that its files set has a row."""
        number = next(i for i, group in enumerate(self.groups) if name in group)
        for key, values in self.rows.items():
            assert len(values) in (1, len(self.groups)), key
            value: Any = resolved
            for part in key.split("."):
                value = value.get(part, {}) if isinstance(value, dict) else {}
            expected = values[0] if len(values) == 1 else values[number]
            assert (None if value == {} else value) == expected, f"{name}: {key}"
        missing = [key for key in said if key not in self.rows]
        assert not missing


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The table's values by their dotted keys."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return values


NAMED = ("name", "data.", "model.arch", "split.block")  # given by the name of the config, or by its data config


def test_every_config_matches_its_audit() -> None:
    audits = Audit.read("Configs")
    named = [name for audit in audits for group in audit.groups for name in group]
    assert sorted(named) == [path.stem for path in CONFIGS]
    for audit in audits:
        for name in (name for group in audit.groups for name in group):
            config = loading.load(REPOSITORY / f"config/train/{name}.toml")
            said = flat(config.model_dump(exclude_unset=True))
            audit.check(name, resolved(config), {key: v for key, v in said.items() if not key.startswith(NAMED)})


def test_every_data_config_matches_its_audit() -> None:
    audits = Audit.read("Data")
    assert sorted(name for audit in audits for group in audit.groups for name in group) == [path.stem for path in DATA]
    for audit in audits:
        for name in (name for group in audit.groups for name in group):
            said = tomli.loads((REPOSITORY / f"config/data/{name}.toml").read_text())
            assert said.pop("name") == name
            said.pop("root")
            config = schema.Data(name=name, root="anywhere", **said)
            audit.check(name, config.model_dump(mode="json", exclude_none=True), flat(said))


SMALL = ("model.width=0.125", "train.batch_size=12")
RESNET18 = ("model.arch=resnet18", *SMALL)
FAMILIES: dict[str, tuple[str, ...]] = {
    "resnet34_baseline": RESNET18,
    "resnet34_sub4": RESNET18,
    "resnet34_sub4_channels_coarse": RESNET18,
    "best_resnet34": (*RESNET18, "augment.progressive=none"),
    "resnet34_sub16_channels_fine": RESNET18,
    "resnet34_sub64_channels_coarse": RESNET18,
    "resnet34_21k_baseline": RESNET18,
    "resnet50_adam_a40": SMALL,
    "resnet50_one_cycle": (*RESNET18, "optim.lr=0.05"),
    "resnet50_bag_of_tricks": RESNET18,
    "resnet50d": SMALL,
    "resnet50d_distilled": (*RESNET18, "distillation.teacher=TEACHER"),
    "resnet50_rsb_a1": RESNET18,
    "resnet34_sub4_rsb": RESNET18,
    "alexnet_sub4": ("train.batch_size=12", "data.image_size=128", "data.resize_size=128", "split.only=[0]"),
    "vgg16_bn_sub4": ("train.batch_size=12", "optim.lr=0.001", "split.only=[0]"),
}
ARCHITECTURES = {
    "mobilenet_v2": SMALL,
    "mobilenet_v3_small": SMALL,
    "mobilenet_v3_large": SMALL,
    "resnet101": SMALL,
    "inception_v3": ("train.batch_size=12", "data.image_size=76", "data.resize_size=76", "split.block=1"),
    "vgg16": ("train.batch_size=12", "optim.lr=0.001"),
}
CASES = [
    *(pytest.param(f"{name}.toml", keys, id=name) for name, keys in FAMILIES.items()),
    pytest.param("resnet50_rsb_a3.toml", RESNET18, id="resnet50_rsb_a3", marks=pytest.mark.long),  # a1 has more
    *(
        pytest.param(
            "resnet34_sub4_channels_coarse.toml", (f"model.arch={arch}", *keys), id=arch, marks=pytest.mark.long
        )
        for arch, keys in ARCHITECTURES.items()
    ),
]


@pytest.fixture(scope="session")
def few_images(shared: Shared) -> Path:
    """Root of a data set of 90 and 20 images."""
    return shared.once("images/few", partial(demo.generate, seed=1, train_per_class=9, val_per_class=2))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "keys"), CASES)
def test_it_trains_on_real_files(
    name: str, keys: tuple[str, ...], few_images: Path, finished: Callable[..., Path], tmp_path: Path
) -> None:
    """Seven steps: losses are finite and every parameter has moved."""
    if "rsb" in name:
        pytest.importorskip("timm")
    data = DATA_TOML.replace("image_size = 32\nresize_size = 40", "image_size = 64\nresize_size = 64")
    (tmp_path / "data.toml").write_text(data.format(root=few_images))
    few = ("train.epochs=1", "train.log_every=1", "schedule.warmup_epochs=0", "validation.batch_size=25", *keys)
    sets = [argument for key in few for argument in ("--set", key.replace("TEACHER", str(finished(1))))]
    arguments = (REPOSITORY / "config/train" / name, "--data", tmp_path / "data.toml", "--run-dir", tmp_path / "run")
    done = run("train.py", *arguments, *sets)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["event"] == "train"]
    assert len(trained) == 7
    assert all(math.isfinite(loss) for line in trained for loss in line["branch_loss"])
    config = loading.load(tmp_path / "run/config.toml")
    for k, branch in enumerate(Ensemble.of(config).branches):
        after = checkpoint.read(tmp_path / "run/checkpoints/last", checkpoint.branch_file(k))["network"]
        stayed = [name for name, p in branch.named_parameters() if torch.equal(p.detach(), after[name])]
        assert not stayed
