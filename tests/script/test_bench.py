"""The other benchmarks in bench/: mistakes are told in one line, and what is measured is what the training does."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bandsplit.cli import entry
from bandsplit.config import loading
from bandsplit.distributed.ranks import Ranks
from bandsplit.errors import UserError
from bandsplit.models.precision import Precision
from bandsplit.training.memory import MIB, Memory
from tests.conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "bench"))

import checkpoint
import common
import communication
import ffcv_peer
import memory
import startup
import step

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, 1, CPU)
NAMES = (
    "checkpoint", "communication", "memory", "network", "pipeline", "scan", "spectral_split", "startup", "step", "store"
)  # fmt: skip
WHOLE = "expected a positive integer"


def started(bench: ModuleType, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"{bench.__name__}.py", *options])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which some benchmarks set
    entry.run(bench.main)


def refusal(
    bench: ModuleType, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """The last line of a benchmark that refuses its options."""
    with pytest.raises(SystemExit) as ended:
        started(bench, options, monkeypatch)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("communication", "--processes 1", "1 given; at least 2 processes exchange something"),
        ("communication", "--processes two", f"'two' given, {WHOLE}"),
        ("communication", "--steps 0", f"'0' given, {WHOLE}"),
        ("communication", "missing.toml", "error: missing.toml: no such config file"),
        ("checkpoint", "--rounds 0", f"'0' given, {WHOLE}"),
        ("checkpoint", "missing.toml", "error: missing.toml: no such config file"),
        ("memory", "--gib 0", "'0' given, expected a positive number"),
        ("memory", "--gib inf", "'inf' given, expected a positive number"),
        ("memory", "--gib 1e-6", "error: --gib: resnet34_baseline does not fit with two images"),
        ("memory", "resnet34_sub4 resnet34_sub4", "error: CONFIG: 2 configs are named 'resnet34_sub4'"),
        ("startup", "--classes 0", f"'0' given, {WHOLE}"),
        ("startup", "--images 3 --classes 4", "error: --images: 3 given, expected at least --classes = 4"),
        ("startup", "--folder tests", "error: --folder: tests given, which already exists"),
        ("scan", "--threads 0", f"'0' given, {WHOLE}"),
        ("scan", "--images tests/script", "error: tests/script: no JPEG files found"),
        ("scan", "--output tests", "'tests' given, expected a file, but this is a folder"),
        ("pipeline", "--gpu", "error: --gpu: given, but torch finds no GPU here"),
        ("pipeline", "--files 63", "error: --files: 63 given, expected at least --batch = 64"),
        ("pipeline", "--ffcv-python missing", "'missing' given, expected a program that can be run"),
        ("spectral_split", "--gpu", "error: --gpu: given, but torch finds no GPU here"),
        ("spectral_split", "--batch 0", f"'0' given, {WHOLE}"),
        ("store", "--files 63", "error: --files: 63 given, expected at least --batch = 512"),
        ("step", "--steps 0", f"'0' given, {WHOLE}"),
        ("step", "--set train.grad_accum_steps=2", "error: train.grad_accum_steps: 2 given by resnet34_baseline"),
        ("step", "resnet34_sub4 resnet34_sub4", "error: CONFIG: 2 configs are named 'resnet34_sub4'"),
    ],
)
def test_mistakes_are_told_in_one_line(
    name: str, options: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(importlib.import_module(name), options.split(), monkeypatch, capsys)


@pytest.mark.parametrize("name", NAMES)
def test_results_go_where_git_ignores_them(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        started(importlib.import_module(name), ["--help"], monkeypatch)
    assert f"(default: bench/results/{name}.json)" in capsys.readouterr().out


def test_results_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        common.write(tmp_path / "file/results.json", {}, {})


# ---------------------------------------------------------------------------------------------------- communication


@pytest.mark.parametrize("keys", [[], ["optim.nesterov=true"], ["optim.type=adamw", "optim.eps=1e-6"]])
def test_ranks_of_communication_see_no_gpu_and_take_any_optimizer(
    keys: list[str], config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def measure(config: Any, processes: int, steps: int) -> float:
        seen.append((os.environ["CUDA_VISIBLE_DEVICES"], config.optim.type, config.optim.momentum))
        return 1.0

    monkeypatch.setattr(communication, "_measure", measure)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    output = ["--output", str(tmp_path / "found.json")]
    options = [str(config_file), *(part for key in keys for part in ("--set", key)), "--processes", "2", *output]
    monkeypatch.setattr(sys, "argv", ["communication.py", *options])
    communication.main()
    assert seen == [("", "sgd", 0), ("", "sgd", 0)]  # for 1 and 2 branch groups
    assert len(json.loads((tmp_path / "found.json").read_text())["results"]["computed"]) == 3  # on 8 ranks


@pytest.mark.long
def test_a_mistake_that_ranks_find_is_told_once(config_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "bench/communication.py", str(config_file), "--processes", "2", "--images", "3"]
    done = subprocess.run([*command, "--output", str(tmp_path / "x")], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("train.batch_size: 3 given, but 2 ranks") == 1
    assert "Traceback" not in done.stderr


def test_gray_images_are_where_the_config_looks_for_them(config_file: Path, tmp_path: Path) -> None:
    common.gray_images(tmp_path, loading.load(config_file, ["data.train=first", "data.val=second"]), 12)
    assert {folder.name: len([*folder.rglob("*.jpg")]) for folder in tmp_path.glob("*/")} == {"first": 20, "second": 20}
    config = loading.load(config_file)
    with pytest.raises(UserError, match=r"data\.classes"):
        common.gray_images(tmp_path / "first", config.with_values({"data": {"classes": None}}), 12)


# ---------------------------------------------------------------------------------------------------- memory


def test_measured_memory_is_that_of_the_run(config_file: Path) -> None:
    """Branches of equal bands share them, and the EMA counts."""
    keys = ["split.branches=[[0, 1], [2], [0, 1]]", "train.ema_decay=0.9", "train.batch_size=96"]
    config = loading.load(config_file, keys)
    found, expected = memory.measure(config, ALONE), memory.estimate(config, CPU)
    assert found["bands"] == expected.bands
    assert found["weights"] == pytest.approx(expected.weights, rel=0.01)
    assert found["total"] == pytest.approx(expected.total, rel=0.15)


def test_memory_is_estimated_in_the_precision_of_each_config(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.toml"
    other.write_text(f'extends = "{config_file}"\ntrain.precision = "bf16"\n')
    seen = set()

    def estimate(config: Any, world_size: int, groups: int, precision: Precision) -> Memory:
        seen.add((config.name, precision.name))
        return Memory(0, 0, 0, 0, 0, step=config.train.batch_size * MIB)

    monkeypatch.setattr(memory.memory, "estimate", estimate)
    started(memory, [str(config_file), str(other), "--output", str(tmp_path / "found.json")], monkeypatch)
    assert seen == {(config_file.stem, "auto"), ("other", "bf16")}
    assert "float32 and bfloat16" in capsys.readouterr().out


def test_random_images_pass_no_teacher(config_file: Path) -> None:
    config = loading.load(config_file, ["distillation.teacher=runs/teacher"])
    with pytest.raises(UserError, match="random images pass no teacher"):
        common.random_batch(config, 2, Precision("fp32", CPU), CPU)


# ---------------------------------------------------------------------------------------------------- step


@pytest.mark.filterwarnings("ignore:The default weight initialization of inception_v3")
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], None),
        (["model.arch=resnet50"], None),
        (["model.width=0.5"], "model.width: 0.5 given, allowed: 1.0; --no-peers"),
        (["model.stem=small"], "model.stem: 'small' given"),
        (["model.tweaks=[]"], r"model.tweaks: \(\) given"),
        (['train.freeze=["conv1"]'], r"train.freeze: \('conv1',\) given"),
        (["optim.type=adamw"], "optim.type: 'adamw' given, allowed: 'sgd'"),
        (["model.arch=alexnet"], "model.arch: 'alexnet' given, which timm does not have"),
        (["model.arch=inception_v3"], "model.arch: 'inception_v3' at 224 pixels is another network than torchvision's"),
        (["model.arch=vgg16", "data.image_size=64"], "model.arch: 'vgg16' at 64 pixels is another network"),
        (['branch=[{bands = [0]}, {bands = [0], arch = "resnet18"}]'], r"one network, that of \[model\]"),
        (["split.branches=[[0], [0]]"], r"one network, that of \[model\]"),
        (["split.block=2"], "split.block: 2 given, allowed: 1"),
        (["loss.type=bce"], "loss.type: 'bce' given"),
    ],
)
def test_peers_have_the_network_and_the_step_of_the_config(keys: list[str], message: str | None) -> None:
    config = loading.load("resnet34_baseline", ["train.batch_size=2", *keys])
    if message is None:
        step.require_plain(config, synthetic=True)
    else:
        with pytest.raises(UserError, match=message):
            step.require_plain(config, synthetic=True)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("data.layout=list", "data.layout: 'list' given, allowed: 'folders'; --no-peers"),
        ("mix.mixup=0.2", r"^\[mix\]: given, allowed: none of its keys"),
        ("augment.pca_noise=0.1", r"^\[augment\]: given"),
    ],
)
def test_torchvision_reads_folders_and_crops_and_flips(key: str, message: str) -> None:
    config = loading.load("resnet34_baseline", ["train.batch_size=2", key])
    step.require_plain(config, synthetic=True)
    with pytest.raises(UserError, match=message):
        step.require_plain(config, synthetic=False)


def test_a_subject_has_the_precision_of_its_config(config_file: Path) -> None:
    subject = step.of_config(loading.load(config_file, ["train.precision=bf16"]), ALONE, synthetic=True)
    assert subject.precision.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------- the others


def test_a_checkpoint_has_the_ema(config_file: Path) -> None:
    learners = checkpoint.trained(loading.load(config_file, ["train.ema_decay=0.9"]), CPU)
    assert all("ema" in learner.state_dict() for learner in learners)


def fails(*_: object) -> None:
    raise UserError("no")


def test_nothing_is_left_when_checkpoints_cannot_be_written(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint.checkpoint, "on_host", fails)
    options = [str(config_file), "--folder", str(tmp_path / "here")]
    assert refusal(checkpoint, options, monkeypatch, capsys) == "error: no"
    assert not [*(tmp_path / "here").iterdir()]


@pytest.mark.parametrize("keep", [False, True])
def test_nothing_is_left_when_images_cannot_be_opened(
    keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "many"
    monkeypatch.setattr(startup, "OPEN", "raise OSError('no')")
    options = ["--images", "4", "--classes", "2", "--folder", str(folder), *["--keep"] * keep]
    assert refusal(startup, options, monkeypatch, capsys).endswith("OSError: no")
    assert folder.exists() == keep


def test_ffcv_that_fails(tmp_path: Path) -> None:
    job = {"files": ["a.jpg"], "container": str(tmp_path / "a.beton")}
    with pytest.raises(UserError, match="--ffcv-python: FFCV has failed"):
        ffcv_peer.Peer(Path(sys.executable), job)
