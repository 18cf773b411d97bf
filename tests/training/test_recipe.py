"""Optimizers, schedules, losses and mixing against torch's, timm's or the formula; each trick shows when it is off."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from bandsplit.config import loading, schema
from bandsplit.data import mixing
from bandsplit.distributed.mesh import Mesh
from bandsplit.distributed.ranks import Ranks
from bandsplit.models.precision import Precision
from bandsplit.spectral import transforms
from bandsplit.training import losses, optimizers, schedules
from bandsplit.training.learner import Learner

STEPS = 7  # an epoch
ALONE = Mesh(Ranks(0, 1, 0, 1, torch.device("cpu")), 1)
FP32 = Precision("fp32", ALONE.ranks.device)


# ----------------------------------------------------------------------------------------------------- schedules


def torchs(make: Callable[[torch.optim.Optimizer], Any], steps: int, lr: float) -> tuple[list[float], list[float]]:
    """Learning rates and momenta of torch's own scheduler."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr, momentum=0.9)
    schedule = make(optimizer)
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(steps):
        for values, key in zip(found, ("lr", "momentum"), strict=True):
            values.append(optimizer.param_groups[0][key])
        optimizer.step()
        schedule.step()
    return found


SCHEDULES: dict[str, tuple[list[str], Callable[[torch.optim.Optimizer], Any]]] = {
    "cosine": (
        ["schedule.lr_min=0.001"],
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6 * STEPS, eta_min=0.001),
    ),
    "cosine that bounces": (
        ["schedule.lr_min=0.001", "schedule.period_epochs=2"],
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=2 * STEPS, eta_min=0.001),
    ),
    "cosine that restarts": (
        ["schedule.lr_min=0.001", "schedule.period_epochs=2", "schedule.after=restart"],
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2 * STEPS, eta_min=0.001),
    ),
    "cosine after a warm-up": (
        ["schedule.warmup_epochs=2", "schedule.lr_min=0.001"],
        lambda o: lr_scheduler.SequentialLR(
            o,
            [
                lr_scheduler.LinearLR(o, start_factor=1 / 14, total_iters=13),
                lr_scheduler.CosineAnnealingLR(o, T_max=28, eta_min=0.001),
            ],
            milestones=[14],
        ),
    ),
    "step": (
        ["schedule.type=step", "schedule.every_epochs=2", "schedule.gamma=0.3"],
        lambda o: lr_scheduler.StepLR(o, step_size=2 * STEPS, gamma=0.3),
    ),
    "milestones": (
        ["schedule.type=step", "schedule.milestones=[1, 4]"],
        lambda o: lr_scheduler.MultiStepLR(o, milestones=[STEPS, 4 * STEPS]),
    ),
    "linear": (
        ["schedule.type=linear", "schedule.lr_min=0.03"],
        lambda o: lr_scheduler.LinearLR(o, start_factor=1, end_factor=0.1, total_iters=6 * STEPS),
    ),
    "constant": (["schedule.type=constant"], lambda o: lr_scheduler.ConstantLR(o, factor=1)),
    "one cycle": (
        ["schedule.type=one_cycle", "schedule.peak_at=0.4"],
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=6 * STEPS, pct_start=0.4),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_torchs(config_file: Path, name: str) -> None:
    keys, make = SCHEDULES[name]
    config = loading.load(config_file, ["train.epochs=6", "optim.lr=0.3", "schedule.warmup_epochs=0", *keys])
    total = 6 * STEPS - 1  # torch's one-cycle steps no further
    lrs, momenta = torchs(make, total, 0.3)
    assert [schedules.lr_at(step, STEPS, config) for step in range(total)] == pytest.approx(lrs, rel=1e-6, abs=1e-12)
    if name == "one cycle":
        ours = [schedules.momentum_at(step, STEPS, config) for step in range(total)]
        assert ours == pytest.approx(momenta, rel=1e-6)
    else:
        assert schedules.momentum_at(3, STEPS, config) is None


def test_warm_up_starts_low_and_its_absence_at_the_peak(config_file: Path) -> None:
    without, with_it = (loading.load(config_file, [f"schedule.warmup_epochs={n}", "optim.lr=0.3"]) for n in (0, 1))
    assert schedules.lr_at(0, 10, without) == 0.3
    assert schedules.lr_at(0, 10, with_it) == pytest.approx(0.03)
    assert schedules.lr_at(9, 10, with_it) == pytest.approx(0.3)


def test_lr_follows_the_batch_where_a_base_is_stated(config_file: Path) -> None:
    keys = ["optim.lr=0.1", "train.batch_size=1024", "schedule.warmup_epochs=0"]
    for more, lr in (
        ([], 0.1),
        (["optim.base_batch=256"], 0.4),
        (["optim.base_batch=256", "optim.scaling=sqrt"], 0.2),
    ):
        assert schedules.lr_at(0, 10, loading.load(config_file, [*keys, *more])) == pytest.approx(lr)


# ---------------------------------------------------------------------------------------------------- optimizers


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
    )


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randint(0, 5, (8,), generator=generator)


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
    """With a loss that does not depend on them, decay alone moves parameters."""
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
    """The scale begins so high that this is the rule in fp16."""
    ours = network()
    optimizer = optimizers.optimizer(ours, loading.load(config_file))
    scaler = torch.amp.GradScaler("cpu")
    before = [p.detach().clone() for p in ours.parameters()]
    for p in ours.parameters():
        p.grad = torch.full_like(p, float("inf"))
    scaler.scale(torch.zeros(()))  # it wants to have been used
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), before, strict=True))
    assert all(not optimizer.state[p]["momentum_buffer"].any() for p in ours.parameters())


def test_gradients_are_clipped_to_their_norm(config_file: Path) -> None:
    norms = []
    for keys in ([], ["train.clip_norm=0.01"]):
        ours = network()
        config = loading.load(config_file, ["optim.momentum=0", "optim.weight_decay=0", *keys])
        before = [p.detach().clone() for p in ours.parameters()]
        Learner(ours, config, FP32, ALONE).step([batch()[0]], [batch()[1]], lr=1.0)
        moved = [a.detach() - b for a, b in zip(ours.parameters(), before, strict=True)]
        norms.append(float(torch.cat([m.flatten() for m in moved]).norm()))
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


def test_the_running_mean_of_weights_is_the_formulas(config_file: Path) -> None:
    config = loading.load(config_file, ["train.ema_decay=0.8"])
    ours = network()
    learner = Learner(ours, config, FP32, ALONE, optimizers.running_mean(ours, config))
    expected: list[Tensor] = []
    for n in range(5):
        learner.step([batch(n)[0]], [batch(n)[1]], lr=0.1)
        now = [t.detach().clone() for t in (*ours.parameters(), ours[1].running_mean, ours[1].running_var)]
        expected = now if not expected else [0.8 * e + 0.2 * t for e, t in zip(expected, now, strict=True)]
    mean = learner.validated
    for a, b in zip((*mean.parameters(), mean[1].running_mean, mean[1].running_var), expected, strict=True):
        torch.testing.assert_close(a, b)
    again = Learner(network(), config, FP32, ALONE, optimizers.running_mean(network(), config))
    again.load_state_dict(learner.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.validated.parameters(), mean.parameters(), strict=True))
    assert Learner(ours, loading.load(config_file), FP32, ALONE).validated is ours


# -------------------------------------------------------------------------------------------------------- losses


def test_smoothing_takes_from_the_label_and_gives_to_all() -> None:
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    shares = torch.full((6, 4), 0.2 / 4)
    shares[range(6), labels] += 0.8
    for config in (schema.CrossEntropy(smoothing=0.2), schema.BinaryCrossEntropy(smoothing=0.2)):
        log_p = logits.log_softmax(-1) if config.type == "cross_entropy" else None
        wanted = (
            -(shares * log_p).sum(-1).mean()
            if log_p is not None
            else -(shares * logits.sigmoid().log() + (1 - shares) * (-logits).sigmoid().log()).mean()
        )
        torch.testing.assert_close(losses.loss(logits, labels, config), wanted)
        assert not torch.isclose(losses.loss(logits, labels, type(config)()), wanted)


def test_what_a_teacher_adds_to_the_loss() -> None:
    """Hinton's formula by hand; its gradient is T² times that of the cross-entropy that He et al. write down."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=generator).requires_grad_()
    teacher_logits, labels = torch.randn(5, 7, generator=generator), torch.tensor([0, 1, 2, 3, 4])
    config = schema.Distillation(teacher="anywhere", temperature=3.0, weight=0.6, label_weight=0.4)
    label_loss = losses.loss(logits, labels, schema.CrossEntropy())
    p, q = (np.exp(x.detach().double().numpy() / 3) for x in (teacher_logits, logits))
    p, q = (x / x.sum(1, keepdims=True) for x in (p, q))
    wanted = 0.4 * label_loss.item() + 0.6 * 9 * (p * np.log(p / q)).sum(1).mean()
    loss = losses.distilled(logits, teacher_logits, label_loss, config)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    soft = nn.functional.cross_entropy(logits / 3, (teacher_logits / 3).softmax(1))
    (of_both,) = torch.autograd.grad(0.4 * label_loss + 0.6 * 9 * soft, logits)
    torch.testing.assert_close(gradient, of_both)


def test_the_threshold_of_binary_targets() -> None:
    """A mixed image belongs to all its classes above the threshold."""
    logits, shares = torch.randn(2, 3), torch.tensor([[0.3, 0.7, 0.0], [0.1, 0.0, 0.9]])
    config = schema.BinaryCrossEntropy(target_threshold=0.2)
    wanted = nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor([[1.0, 1, 0], [0, 0, 1]]))
    torch.testing.assert_close(losses.loss(logits, shares, config), wanted)
    assert not torch.isclose(losses.loss(logits, shares, schema.BinaryCrossEntropy()), wanted)


# -------------------------------------------------------------------------------------------------------- mixing


def groups(images: Tensor, matrix: np.ndarray, block: int, branches: list[list[int]]) -> list[Tensor]:
    bands = transforms.split(images, torch.from_numpy(matrix).float(), block)
    return [torch.cat([bands[k] for k in branch], dim=1) for branch in branches]


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_bands_is_mixing_images(config_file: Path, kind: str) -> None:
    """Of branches with any bands, and of whole images beside them, with CutMix's boxes in whole blocks."""
    config = loading.load(config_file, [f"mix.{kind}=1.0"])
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 32, 32, generator=generator)
    labels = torch.tensor([0, 1, 2, 3, 4, 5])
    matrix, branches = transforms.transform_matrix("dct2d", 4), [[0], [1, 5, 7], [15]]
    mixed_something = 0
    for step in range(20):
        bands = groups(images, matrix, 4, branches)
        inputs, targets = mixing.mix([*bands, images], labels, config, step, 0)
        share = targets[range(6), labels]
        assert torch.allclose(targets.sum(-1), torch.ones(6))
        assert torch.equal(targets, targets[range(6), labels][:, None] * nn.functional.one_hot(labels, 10) + (
            1 - share
        )[:, None] * nn.functional.one_hot(labels.roll(1), 10))  # fmt: skip
        if kind == "mixup":
            whole = share[0] * images + (1 - share[0]) * images.roll(1, 0)
        else:  # where the box is follows from the first band
            inside = (inputs[0] != bands[0]).any(dim=1, keepdim=True).any(dim=0, keepdim=True)
            area = float(inside.float().mean())
            assert area == pytest.approx(1 - float(share[0]), abs=1e-6)
            mask = inside.repeat_interleave(4, 2).repeat_interleave(4, 3)
            whole = torch.where(mask, images.roll(1, 0), images)
        for x, wanted in zip(inputs, [*groups(whole, matrix, 4, branches), whole], strict=True):
            torch.testing.assert_close(x, wanted, atol=1e-5, rtol=1e-5)
            assert x.is_contiguous(memory_format=torch.channels_last)
        mixed_something += bool(share[0] < 0.99)
    assert mixed_something > 10


def test_how_often_and_how_batches_are_mixed(config_file: Path) -> None:
    x, labels = torch.randn(4, 3, 8, 8), torch.arange(4)

    def shares(*keys: str, steps: int = 400) -> list[Tensor]:
        config = loading.load(config_file, list(keys))
        return [mixing.mix([x], labels, config, step, 0)[1] for step in range(steps)]

    assert all(target is labels for target in shares(steps=5))
    half = sum(bool((target < 1).all()) for target in shares("mix.mixup=1.0", "mix.probability=0.5"))
    assert abs(half - 200) < 4 * math.sqrt(100)
    config = loading.load(config_file, ["mix.mixup=1.0", "mix.cutmix=1.0"])
    kept = [bool((mixing.mix([x], labels, config, step, 0)[0][0] == x).any()) for step in range(400)]
    assert abs(sum(kept) - 200) < 60  # CutMix leaves pixels as they are, Mixup none

    places = ((3, 0), (3, 0), (4, 0), (3, 1))
    one, same, other_batch, other_stream = (mixing.mix([x], labels, config, *place)[1] for place in places)
    assert torch.equal(one, same)
    assert not torch.equal(one, other_batch)
    assert not torch.equal(one, other_stream)


def test_mixing_leaves_torchs_random_state_alone(config_file: Path) -> None:
    config = loading.load(config_file, ["mix.mixup=1.0"])
    before = torch.get_rng_state()
    mixing.mix([torch.randn(4, 3, 8, 8, generator=torch.Generator())], torch.arange(4), config, 0, 0)
    assert torch.equal(before, torch.get_rng_state())


# ----------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("name", "device", "dtype", "half"),
    [
        ("auto", "cpu", torch.float32, False),
        ("auto", "cuda", torch.bfloat16, True),
        ("fp32", "cuda", torch.float32, False),
        ("tf32", "cuda", torch.float32, False),
        ("fp16", "cuda", torch.float16, True),
        ("bf16", "cpu", torch.bfloat16, False),
    ],
)
def test_precision_by_device(name: str, device: str, dtype: torch.dtype, half: bool) -> None:
    precision = Precision(name, torch.device(device))
    assert (precision.dtype, precision.half_bands) == (dtype, half)


def test_autocast_computes_in_the_chosen_type() -> None:
    layer, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with Precision(name, torch.device("cpu")).autocast():
            assert layer(x).dtype == dtype


def test_tf32_is_used_only_where_asked() -> None:
    for name, allowed in (("fp32", False), ("tf32", True)):
        Precision(name, torch.device("cpu")).apply()
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == allowed
