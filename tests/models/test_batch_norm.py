"""Batch norm over one value per channel is an error before a run starts; everything else is accepted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bandsplit.config import loading
from bandsplit.errors import UserError
from bandsplit.models import batch_norm
from bandsplit.models.ensemble import Ensemble
from tests.conftest import Done, run

ONE = (
    "norm over one image; with inputs of 16 x 16 the input of layer3.0.bn1 in branch 0 is 1 x 1, "
    "and one value per channel has no variance"
)
REFUSED = {  # keys, ranks -> message and suggestions
    ("train.batch_size=1", 1): ("train.batch_size: 1 given: batch", "a larger train.batch_size, a larger data.image"),
    ("train.batch_size=6 train.grad_accum_steps=6", 1): (
        "train.batch_size: 6 given with train.grad_accum_steps = 6: batch",
        "a larger train.batch_size, a smaller train.grad_accum_steps, a larger data.image_size",
    ),
    ("train.batch_size=4 parallel.branch_groups=1", 4): (
        "train.batch_size: 4 given with 4 ranks: batch",
        "fewer ranks, model.bn_batch_size = 'all', a larger parallel.branch_groups, a larger data.image_size",
    ),
    ("train.batch_size=12 model.bn_batch_size=1", 1): (
        "model.bn_batch_size: 1 given: batch",
        "a larger model.bn_batch_size, 'rank' or 'all', a larger data.image_size, a smaller split.block",
    ),
    ("train.batch_size=1 model.bn_batch_size=all", 1): ("train.batch_size: 1 given: batch", "a larger train.batch"),
}
ALLOWED = [
    ("train.batch_size=1 model.stem=small", 1),  # a map of 2 x 2
    ("train.batch_size=1 data.image_size=66 data.resize_size=66", 1),
    ("train.batch_size=4", 4),  # branch groups: 4 images at once
    ("train.batch_size=4 parallel.branch_groups=1 model.bn_batch_size=2", 4),
    ("train.batch_size=4 parallel.branch_groups=1 model.bn_batch_size=all", 4),
    (
        "train.batch_size=1 model.arch=vgg16 model.width=1 data.image_size=64 data.resize_size=64",
        1,
    ),  # has no batch norm
]


def sets(keys: str) -> list[str]:
    return [argument for key in keys.split() for argument in ("--set", key)]


@pytest.mark.slow
@pytest.mark.parametrize("keys", REFUSED, ids=lambda keys: keys[0])
def test_one_value_per_channel_is_refused(
    config_file: Path, tmp_path: Path, run_here: Callable[..., Done], keys: tuple[str, int]
) -> None:
    """With one message and nothing written: for planned ranks, for real ranks, and in the LR finder."""
    before = set(tmp_path.rglob("*"))
    arguments = (config_file, *sets(keys[0]))
    commands = [run_here("train.py", *arguments, "--dry-run", "--world-size", keys[1])]
    commands += [run("train.py", *arguments, "--run-dir", tmp_path / "run", ranks=keys[1])]
    commands += [run("find_lr.py", *arguments, "--output", tmp_path / "found", ranks=keys[1])]
    message, offered = REFUSED[keys]
    for done in commands:
        assert done.returncode == 2
        assert f"error: {message} {ONE}" in done.stderr
        assert offered in done.stderr
        assert done.stderr.count("error: ") == 1
        assert "Traceback" not in done.stderr
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("keys", "ranks"), ALLOWED)
def test_larger_maps_and_more_images_are_not(
    config_file: Path, run_here: Callable[..., Done], keys: str, ranks: int
) -> None:
    done = run_here("train.py", config_file, *sets(keys), "--dry-run", "--world-size", ranks)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "vgg16_bn", "alexnet"])
@pytest.mark.parametrize("stem", ["standard", "small"])
@pytest.mark.parametrize("size", [64, *(pytest.param(size, marks=pytest.mark.slow) for size in (32, 63, 66, 128))])
def test_what_is_refused_is_what_torch_refuses(config_file: Path, arch: str, stem: str, size: int) -> None:
    """Compares with a forward pass of one image in training mode."""
    keys = [
        f"model.arch={arch}",
        f"data.image_size={size}",
        "data.resize_size=128",
        "split.block=1",
        "train.batch_size=1",
        "model.width=1",
    ]
    config = loading.load(config_file, [*keys, *([f"model.stem={stem}"] if arch.startswith("resnet") else [])])
    try:
        with torch.device("meta"):
            (branch,) = Ensemble.of(config).branches
    except UserError:
        return  # the architecture needs larger inputs
    takes_one = True
    try:
        branch(torch.empty(1, 3, size, size, device="meta"))
    except ValueError:
        takes_one = False
    assert batch_norm.bn_batch_size(config, at_once=2, replicas=1) == 2
    if takes_one:
        assert batch_norm.bn_batch_size(config, at_once=1, replicas=1) == 1
    else:
        with pytest.raises(UserError, match=re.escape("is 1 x 1, and one value per channel has no variance")):
            batch_norm.bn_batch_size(config, at_once=1, replicas=1)


def test_the_smallest_images_of_a_run_count(config_file: Path) -> None:
    keys = [
        "train.batch_size=1",
        "split.block=1",
        "data.image_size=96",
        "data.resize_size=96",
        "model.stem=standard",
        "train.epochs=3",
    ]
    config = loading.load(config_file, keys)
    assert batch_norm.bn_batch_size(config, at_once=1, replicas=1) == 1
    progressive = ["augment.progressive.min_size=32", "augment.progressive.ramp_end=2"]
    config = loading.load(config_file, [*keys, *progressive])
    with pytest.raises(UserError, match=r"inputs of 32 x 32.*a larger augment.progressive.min_size"):
        batch_norm.bn_batch_size(config, at_once=1, replicas=1)


def test_norms_of_timms_networks_count_too(config_file: Path) -> None:
    """Also for norms after global pooling, for which no image is large enough."""
    pytest.importorskip("timm")
    keys = [
        "model.source=timm",
        "model.arch=resnest14d",
        "model.width=1",
        "split.block=1",
        "data.image_size=128",
        "data.resize_size=128",
    ]
    config = loading.load(config_file, keys)
    with pytest.raises(UserError, match=r"inputs of 128 x 128 the input of \S+ in branch 0 is 1 x 1"):
        batch_norm.bn_batch_size(config, at_once=1, replicas=1)


def test_a_batch_of_one_with_larger_maps_trains(config_file: Path, tmp_path: Path) -> None:
    keys = "train.batch_size=2 model.stem=small train.epochs=1 schedule.warmup_epochs=0 split.only=[1]"
    done = run("train.py", config_file, "--run-dir", tmp_path / "run", *sets(keys), ranks=2)
    assert done.returncode == 0, done.stderr
    assert "batch norm over 1 image" in done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_over_ranks_takes_16_bits_as_torchs_norm_does(dtype: torch.dtype) -> None:
    """Under autocast the input has 16 bits, and the statistics 32."""
    x, weights = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5).to(dtype)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = []
        for norm in (batch_norm.HostSyncBatchNorm2d(dist.group.WORLD, 3), torch.nn.BatchNorm2d(3)):
            given = (3 + 2 * x).to(dtype).requires_grad_()
            y = norm(given)
            y.backward(weights)
            assert (y.dtype, norm.running_mean.dtype) == (dtype, torch.float32)
            found.append([y, given.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var])
    finally:
        dist.destroy_process_group()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
