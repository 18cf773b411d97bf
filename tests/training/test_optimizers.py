"""Optimizers against torch's and timm's."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bandsplit.config import loading, schema
from bandsplit.errors import UserError
from bandsplit.models import networks
from bandsplit.models.ensemble import parameters_of_branches
from bandsplit.training import optimizers
from bandsplit.training.learner import Learner, learners_of
from tests.training.tiny import ALONE, FP32, batch, network

OPTIMIZERS: dict[str, tuple[list[str], Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": ([], lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1)),
    "nesterov": (
        ["optim.nesterov=true", "optim.momentum=0.8"],
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.1),
    ),
    "adam": (
        ["optim.type=adam", "optim.betas=[0.8, 0.9]"],
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.9), weight_decay=0.1),
    ),
    "adamw": (["optim.type=adamw"], lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1)),
    "rmsprop": (
        ["optim.type=rmsprop", "optim.centered=true"],
        lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.9, momentum=0.9, centered=True, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_are_torchs(config_file: Path, name: str) -> None:
    keys, make = OPTIMIZERS[name]
    config = loading.load(config_file, [*keys, "optim.lr=0.1", "optim.weight_decay=0.1"])
    ours, theirs = network(), network()
    learner, optimizer = Learner(ours, config, FP32, ALONE), make(theirs.parameters())
    for n in range(4):
        x, y = batch(n)
        learner.step([x], [y], lr=0.1)
        optimizer.zero_grad()
        nn.functional.cross_entropy(theirs(x), y).backward()
        optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_lamb_is_timms(config_file: Path) -> None:
    timm_optim = pytest.importorskip("timm.optim")
    config = loading.load(config_file, ["optim.type=lamb", "optim.lr=0.01", "optim.weight_decay=0.02"])
    optimizer = optimizers.optimizer(network(), config)
    assert isinstance(optimizer, timm_optim.Lamb)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.01, 0.02)


@pytest.mark.parametrize("decay", [True, False])
def test_norms_and_biases_are_decayed_only_where_asked(config_file: Path, decay: bool) -> None:
    """If the loss does not depend on parameters, only decay changes them."""
    keys = [f"optim.decay_norm_and_bias={str(decay).lower()}", "optim.weight_decay=0.5", "optim.momentum=0"]
    ours = network()
    optimizer = optimizers.optimizer(ours, loading.load(config_file, keys))
    with torch.no_grad():
        for p in ours.parameters():
            p.fill_(1.0).grad = torch.zeros_like(p)
    optimizer.step()
    for p in ours.parameters():
        moved = bool((p != 1).all())
        assert moved == (decay or p.ndim > 1)


def test_one_cycle_moves_the_momentum_of_every_optimizer(config_file: Path) -> None:
    for kind, read in (("sgd", lambda g: g["momentum"]), ("adam", lambda g: g["betas"][0])):
        config = loading.load(config_file, [f"optim.type={kind}"])
        learner = Learner(network(), config, FP32, ALONE)
        learner.step([batch()[0]], [batch()[1]], lr=0.1, momentum=0.7)
        assert [read(group) for group in learner.optimizer.param_groups] == [0.7]


def test_a_first_step_that_loss_scaling_skips_leaves_no_momentum(config_file: Path) -> None:
    """In fp16 the initial scale is so high that this usually happens."""
    ours = network()
    optimizer = optimizers.optimizer(ours, loading.load(config_file))
    scaler = torch.amp.GradScaler("cpu")
    before = [p.detach().clone() for p in ours.parameters()]
    for p in ours.parameters():
        p.grad = torch.full_like(p, float("inf"))
    scaler.scale(torch.zeros(()))  # it must have been used
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), before, strict=True))
    assert all(not optimizer.state[p]["momentum_buffer"].any() for p in ours.parameters())


# ---------------------------------------------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnet50d"])
def test_layers_of_resnets_are_timms(arch: str) -> None:
    timm = pytest.importorskip("timm")
    tweaks = ("b", "c", "d") if arch.endswith("d") else ("b",)
    with torch.device("meta"):
        ours = networks.build(schema.Model(arch=arch.removesuffix("d"), tweaks=tweaks), 12, 10, 64)
        theirs = timm.create_model(arch)
    assert networks.layers_of(ours) == networks.layers_of(theirs)


def test_layers_of_other_networks() -> None:
    with torch.device("meta"):
        vgg = networks.build(schema.Model(arch="vgg16_bn"), 3, 10, 224)
    layers = networks.layers_of(vgg)
    assert layers["features.0.weight"] == layers["features.1.weight"] == 0
    assert list(dict.fromkeys(layers.values())) == list(range(16))
    assert layers.keys() == dict(vgg.named_parameters()).keys()


@pytest.mark.parametrize(
    ("kind", "lr"), [("sgd", 0.01), ("sgd", torch.tensor(0.01)), ("adamw", torch.tensor(0.01)), ("rmsprop", 0.01)]
)
def test_layer_decay_is_timms(config_file: Path, kind: str, lr: float | torch.Tensor) -> None:
    """Weights after steps with one lr, against those of torch's optimizer with timm's parameter groups."""
    timm_optim, timm = pytest.importorskip("timm.optim"), pytest.importorskip("timm")
    keys = [f"optim.type={kind}", "optim.layer_decay=0.7", "optim.decay_norm_and_bias=false", "optim.weight_decay=0.1"]
    config = loading.load(config_file, [*keys, "optim.eps=1e-3"] if kind != "sgd" else keys)
    torch.manual_seed(0)
    ours = networks.build(schema.Model(arch="resnet18"), 3, 5, 32)
    theirs = timm.create_model("resnet18", num_classes=5)
    theirs.load_state_dict(ours.state_dict())
    learner = Learner(ours, config, FP32, ALONE)
    groups = timm_optim.param_groups_layer_decay(theirs, weight_decay=0.1, layer_decay=0.7)
    for group in groups:
        group["lr"] = 0.01 * group["lr_scale"]
    optimizers_of_torch: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: torch.optim.SGD(groups, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(groups, eps=1e-3),
        "rmsprop": lambda: torch.optim.RMSprop(groups, alpha=0.9, momentum=0.9, eps=1e-3),
    }
    reference = optimizers_of_torch[kind]()
    for _ in range(2):
        x, y = torch.randn(4, 3, 32, 32), torch.randint(0, 5, (4,))
        learner.step([x], [y], lr=lr)
        reference.zero_grad()
        nn.functional.cross_entropy(theirs(x), y).backward()
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    state = learner.state_dict()
    again = Learner(ours, config, FP32, ALONE)
    again.load_state_dict(state)
    scales = [group["lr_scale"] for group in again.optimizer.param_groups]
    assert scales[0] == pytest.approx(0.7**9)
    assert scales[-1] == 1


def test_frozen_parts_stay_as_they_are(config_file: Path) -> None:
    keys = ["train.freeze=conv1,bn1,layer1.0", "train.ema_decay=0.9", "split.branches=all", "optim.weight_decay=0.1"]
    config = loading.load(config_file, keys)
    ensemble, (learner,) = learners_of(config, 8, FP32, ALONE)
    branch = ensemble.branches[0]
    before = {key: value.clone() for key, value in branch.state_dict().items()}
    for _ in range(2):
        ensemble.train()  # as after a validation
        learner.step([torch.randn(8, 12, 16, 16)], [torch.randint(0, 10, (8,))], lr=0.1)
    for state in (branch.state_dict(), learner.validated.state_dict()):
        for key, value in state.items():
            if "num_batches" not in key:  # which the EMA does not count
                assert torch.equal(value, before[key]) == key.startswith(("conv1.", "bn1.", "layer1.0.")), key


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("layer1,layer5", "train.freeze: 'layer5' given; allowed: conv1, bn1, layer1, layer2, layer3, layer4, fc, or"),
        ("conv1,bn1,layer1,layer2,layer3,layer4,fc", "which leaves nothing to train"),
        ("conv,bn1", "train.freeze: 'conv' given; allowed: conv1"),
        ("conv1", "train.freeze: 'conv1' given; allowed: a list of names, such as"),
    ],
)
def test_what_cannot_be_frozen_is_one_message(config_file: Path, parts: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parameters_of_branches(loading.load(config_file, [f"train.freeze={parts}"]))
