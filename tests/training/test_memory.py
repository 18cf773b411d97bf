"""Memory by kind: what a step takes, beside torch's profiler; the estimate without data, beside what a step takes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bandsplit.config import loading
from bandsplit.config.schema import RunConfig
from bandsplit.distributed.mesh import Mesh
from bandsplit.models.ema import EMA
from bandsplit.models.ensemble import Ensemble
from bandsplit.models.precision import Precision
from bandsplit.runs.directory import resolved
from bandsplit.spectral.view import View
from bandsplit.training import dry_run, memory
from bandsplit.training.learner import learners_of
from bandsplit.training.memory import MIB, Memory, StepMemory
from tests.training.tiny import ALONE, FP32

# The kernels of some CPUs take up to four times the largest weight while they work, which the allocator counts too.
LARGER = ["data.image_size=64", "data.resize_size=64", "train.batch_size=96"]
CASES = {
    "sub4": [],
    "recomputed": ["split.block=1", "model.width=0.25", "train.activation_checkpointing=true"],
    "accumulated": ["split.block=1", "train.grad_accum_steps=3"],
    "adam": ["optim.type=adamw", "train.ema_decay=0.9", 'split.branches="all"', "model.stem=no_stride"],
    "rmsprop": ["optim.type=rmsprop", "split.branches=[[0, 1], [2]]", "train.clip_norm=1.0", "train.on_nonfinite=skip"],
    "repeated": ["split.branches=[[0, 1], [2], [0, 1], [0, 1]]"],
    "ghost": ["model.bn_batch_size=8", "model.drop_path=0.2", "split.only=[1, 2]"],
    "vgg": ["model.arch=vgg16_bn", "model.width=1", "split.only=[0]", "train.batch_size=4"],
}


def of_a_step(config: RunConfig) -> tuple[Memory, int]:
    """What a step of all branches takes, and the most that torch's allocator gave for it."""
    at_once, size = config.rank_batch_size(1), config.data.image_size // config.split.block
    ensemble, learners = learners_of(config, at_once, FP32, Mesh(ALONE.ranks, len(config.split.groups)))
    emas = [learner.ema for learner in learners if isinstance(learner.ema, EMA)]
    parts = config.train.grad_accum_steps
    view = View.of(config)
    inputs = view.of_branches(
        [[torch.randn(at_once, 3 * len(bands), size, size) for _ in range(parts)] for bands in view.inputs]
    )
    labels = [torch.randint(0, 10, (at_once,)) for _ in range(parts)]
    for learner, x in zip(learners, inputs, strict=True):
        learner.step(x, labels, lr=0.01)
    watched = StepMemory(nn.ModuleList([ensemble, *emas]), learners, reduced=False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, watched:
        for learner, x in zip(learners, inputs, strict=True):
            learner.step(x, labels, lr=0.01)
    most = peak(profiler)
    bands = memory.bytes_of_bands([each[0] for each in inputs], parts, config, FP32.device, 1)
    return watched.memory(bands), most


def peak(profiler: profile) -> int:
    """The most bytes at once that torch's allocator gave; torch frees the events with the profiler."""
    changes = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(size for _, size in sorted(changes, key=lambda change: change[0])))


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_what_a_step_takes(config_file: Path, case: str) -> None:
    config = loading.load(config_file, [*LARGER, *CASES[case]])
    expected, allocated = of_a_step(config)
    estimated = memory.estimate(config, 1, 1, FP32)
    for kind in ("weights", "optimizer", "gradients", "bands", "activations", "step", "total"):
        assert getattr(estimated, kind) == pytest.approx(getattr(expected, kind), rel=0.15), kind
    assert allocated == pytest.approx(expected.step, rel=0.15)


def test_a_teacher_takes_what_its_forward_pass_takes(config_file: Path, tmp_path: Path) -> None:
    """A teacher on the whole image makes more in its forward pass than a thin student in a step, and it has bands."""
    teacher = loading.load(config_file, [*LARGER, "split.block=1", "model.width=0.5"]).with_classes(10)
    ensemble = Ensemble.of(teacher).eval()
    image = torch.randn(96, 3, 64, 64).to(memory_format=torch.channels_last)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, torch.no_grad():
        ensemble([image])
    found = memory.of_teacher(teacher, 96, 64, 2, FP32)
    assert found.activations == found.step == pytest.approx(peak(profiler), rel=0.15)
    assert found.weights == sum(x.nbytes for x in ensemble.state_dict().values())
    assert found.bands == 3 * image.nbytes

    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").write_text(tomli_w.dumps(resolved(teacher)))
    keys = [*LARGER, "data.classes=10", "model.width=0.25", "split.only=[0]", "data.prefetch=2"]
    plain, distilled = (
        memory.estimate(loading.load(config_file, [*keys, *more]), 1, 1, FP32)
        for more in ([], [f"distillation.teacher={tmp_path / 'run'}"])
    )
    assert distilled.weights == plain.weights + found.weights
    assert distilled.bands == plain.bands + found.bands
    assert distilled.step == found.step > plain.step


def test_recomputation_halves_the_activations(config_file: Path) -> None:
    keys = [*LARGER, "split.block=1", "model.arch=resnet34"]
    plain, recomputed = (
        memory.estimate(loading.load(config_file, [*keys, *more]), 1, 1, FP32)
        for more in ([], ["train.activation_checkpointing=true"])
    )
    assert recomputed.activations < 0.5 * plain.activations
    assert recomputed.weights == plain.weights


def test_the_ranks_of_a_run(config_file: Path) -> None:
    """Two replicas keep the gradients of all branches; with two groups each has half of the branches."""
    config = loading.load(config_file, LARGER)
    alone, replicas, groups = (memory.estimate(config, *ranks, FP32) for ranks in ((1, 1), (2, 1), (2, 2)))
    assert (replicas.weights, replicas.gradients) == (alone.weights, pytest.approx(4 * alone.gradients, rel=0.01))
    assert groups.weights == pytest.approx(alone.weights / 2, rel=0.01)
    assert groups.gradients == alone.gradients
    assert groups.activations == alone.activations  # all images through half of the branches
    assert replicas.activations == pytest.approx(alone.activations / 2, rel=0.15)


def test_frozen_weights_have_no_gradients_in_the_estimate(config_file: Path) -> None:
    precision = Precision("fp32", torch.device("cpu"))
    whole, frozen = (
        memory.estimate(loading.load(config_file, ["data.classes=10", *keys]), 1, 1, precision)
        for keys in ([], ["train.freeze=conv1,bn1,layer1,layer2,layer3,layer4"])
    )
    assert frozen.weights == whole.weights
    assert frozen.gradients < whole.gradients / 50
    assert frozen.optimizer < whole.optimizer / 50


@pytest.mark.parametrize("distilled", [False, True])
def test_a_run_tells_its_memory_once_and_the_dry_run_before(
    finished: Callable[..., Path], distilled: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [f"distillation.teacher={finished(1)}", "distillation.checkpoint=last", "train.epochs=1"]
    run_dir = finished(1, *(keys if distilled else ()))
    pattern = (
        r"([\d,]+) MiB \(at most: weights (\d+), optimizer (\d+), gradients (\d+), activations (\d+), bands (\d+)\)"
    )
    told = re.findall(f"memory of a step: {pattern}", (run_dir / "logs/rank0.log").read_text())
    dry_run.show(loading.load(run_dir / "config.toml"))
    estimated = re.findall(f"memory    per rank, estimated: {pattern}", capsys.readouterr().out)
    assert len(told) == len(estimated) == 1
    assert told == estimated
    assert int(told[0][0]) < 100 * MIB
