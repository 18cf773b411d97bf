"""Training as a user starts it: on one and two processes, killed and resumed, and with user mistakes."""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from loguru import logger

from bandsplit.cli import train
from bandsplit.config import loading, schema
from bandsplit.distributed.mesh import Mesh
from bandsplit.distributed.ranks import Ranks
from bandsplit.errors import UserError
from bandsplit.models import batch_norm, networks
from bandsplit.models.precision import Precision
from bandsplit.runs import checkpoint, directory
from bandsplit.training import state
from bandsplit.training.learner import Learner
from tests.compare import assert_equal, assert_same_run, metrics, wait_for
from tests.conftest import VAL_PER_CLASS, Done, Launch, Shared, on_ranks, run

ALONE = Mesh(Ranks(0, 1, 0, 1, torch.device("cpu")), 1)


def test_another_batch_of_batch_norm_is_told_when_a_run_resumes(config_file: Path, tmp_path: Path) -> None:
    """On 2 of 8 ranks, each reading four streams one after the other."""
    config, told = loading.load(config_file, ["model.bn_batch_size=128"]), []
    sink = logger.add(told.append, format="{message}", level="WARNING")
    run, streams = directory.RunDirectory(tmp_path), SimpleNamespace(count=8)
    run.environment.write_text('[{"bn_batch_size": 256}]')
    plan = SimpleNamespace(bn_batch_size=lambda _: 64, ranks=Ranks(0, 2, 0, 2, torch.device("cpu")))
    assert state._bn_batch_size(plan, streams, run) == 64
    logger.remove(sink)
    assert told == ["batch norm over 64 images from now on; it was over 256\n"]
    plan.bn_batch_size = lambda _: batch_norm.bn_batch_size(
        config.with_values({"model": {"bn_batch_size": 128}}), 32, 2
    )
    with pytest.raises(UserError, match="128 given, .* 'all'; the run began on 8 ranks, and can resume on as many"):
        state._bn_batch_size(plan, streams, run)


def test_a_run_writes_everything_it_promises(finished: Callable[..., Path]) -> None:
    run_dir = finished(1)
    config = loading.load(run_dir / "config.toml")
    assert (config.name, config.train.epochs) == ("tiny", 2)
    assert checkpoint.read(run_dir / "checkpoints/last", "run.pt")["config"] == directory.resolved(config)
    assert json.loads((run_dir / "environment.json").read_text())[0]["world_size"] == 1
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps_per_epoch = 160 // 12
    assert [(line["event"], line["step"]) for line in lines] == [
        ("train", 4), ("train", 8), ("train", 12), ("train", 13), ("validation", 13),
        ("train", 16), ("train", 20), ("train", 24), ("train", 26), ("validation", 26), ("end", 26),
    ]  # fmt: skip
    for line in lines:
        assert line["epoch"] == line["step"] / steps_per_epoch
        assert line["images"] == line["step"] * 12
        if line["event"] == "train":
            assert 0 <= line["data_wait"] <= 1
            assert len(line["branch_loss"]) == 4
            assert line["loss"] == pytest.approx(sum(line["branch_loss"]) / 4)
        if line["event"] == "validation":
            assert line["val_images"] == 10 * VAL_PER_CLASS
            assert len(line["branch_top1"]) == len(line["branch_top5"]) == 4
    assert "top-1" in (run_dir / "logs/rank0.log").read_text()


def imports_of_a_training(config: Path, run_dir: Path) -> set[str]:
    train.main([str(config), "--run-dir", str(run_dir)])
    return set(sys.modules)


def test_training_does_not_import_the_compiler(config_file: Path, tmp_path: Path) -> None:
    """It takes a second or more; only `train.compile` needs it."""
    (imported,) = on_ranks(1, imports_of_a_training, config_file, tmp_path / "run")
    assert "bandsplit.training.loop" in imported
    assert "torch._inductor.compile_fx" not in imported


@pytest.fixture(scope="module")
def parts(finished: Callable[..., Path], shared: Shared) -> list[Path]:
    """The same training as two runs: branches 0 and 2, and branches 3 and 1."""
    config = finished(1).parent / "tiny.toml"

    def train(run_dir: Path) -> None:
        done = run("train.py", config, "--branches", run_dir.name, "--run-dir", run_dir)
        assert done.returncode == 0, done.stderr

    return [shared.once(f"parts/{branches}", train) for branches in ("0,2", "3,1")]


def test_branches_trained_alone_are_those_trained_together(
    finished: Callable[..., Path], parts: list[Path], run_here: Callable[..., Done], tmp_path: Path
) -> None:
    """Bit-equal, since branches share nothing; joined, they are the same ensemble."""
    together = finished(1) / "checkpoints/last"
    for run_dir, numbers in zip(parts, ((0, 2), (3, 1)), strict=True):
        alone = run_dir / "checkpoints/last"
        assert checkpoint.read(alone, "run.pt")["branches"] == list(numbers)
        for k in numbers:
            assert_equal(*(checkpoint.read(folder, f"branch_{k:02d}.pt") for folder in (alone, together)))
    done = run_here("evaluate.py", *parts, "--checkpoint", "last", "--output", tmp_path / "joined.json")
    assert done.returncode == 0, done.stderr
    joined = json.loads((tmp_path / "joined.json").read_text())
    whole = checkpoint.read(together, "run.pt")["progress"]["validation"]
    assert joined["step"] == [26, 26]
    assert (joined["top1"], joined["top5"]) == pytest.approx((whole["top1"], whole["top5"]))
    assert joined["loss"] == pytest.approx(whole["loss"], abs=1e-5)
    assert [joined["branch_top1"][i] for i in (0, 3, 1, 2)] == whole["branch_top1"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('transform = "dct2d"', 'transform = "identity"', "split.transform: 'identity', but"),
        ("resize_size = 40", "resize_size = 44", "data.resize_size: 44, but"),
        ('interpolation = "bilinear"', 'interpolation = "bicubic"', "data.interpolation: 'bicubic', but"),
        ("classes = 10", "classes = 11", "data.classes: 11, but"),
    ],
)
def test_runs_that_saw_other_data_are_not_joined(
    parts: list[Path], run_here: Callable[..., Done], tmp_path: Path, old: str, new: str, message: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(parts[1], other, symlinks=True)
    text = (other / "config.toml").read_text()
    assert old in text
    (other / "config.toml").write_text(text.replace(old, new))
    if "classes" in new:  # a checkpoint of that config
        for k in (3, 1):
            path = other / f"checkpoints/last/branch_{k:02d}.pt"
            state = torch.load(path)
            for name, tensor in state["network"].items():
                if "fc." in name:
                    state["network"][name] = torch.zeros(11, *tensor.shape[1:])
            torch.save(state, path)
    done = run_here("evaluate.py", parts[0], other, "--checkpoint", "last")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


GROWING = "augment.progressive={min_size=16, ramp_end=1, multiple=2}"


@pytest.mark.parametrize(
    ("ranks", "keys"),
    [(1, []), (2, []), pytest.param(1, [GROWING], marks=pytest.mark.slow)],
    ids=["1", "2", "growing images"],
)
def test_killed_and_resumed_equals_undisturbed(
    finished: Callable[..., Path], config_file: Path, tmp_path: Path, ranks: int, keys: list[str]
) -> None:
    undisturbed, run_dir = finished(ranks, *keys), tmp_path / "killed"
    arguments = [config_file, "--run-dir", run_dir, "--resume", *(part for key in keys for part in ("--set", key))]
    launch = Launch("train.py", *arguments, ranks=ranks)
    wait_for(run_dir / "checkpoints/step_00000006", launch)  # 6 of 13 steps: in the middle of the first epoch
    launch.signal(signal.SIGKILL)
    launch.wait()
    assert metrics(run_dir)[-1]["event"] != "end"
    done = run("train.py", *arguments, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stderr
    assert_same_run(run_dir, undisturbed)
    sizes = [line["image_size"] for line in metrics(run_dir) if line["event"] == "train"]
    assert sizes == ([16] * 4 + [32] * 4 if keys else [32] * 8)


def contents(run_dir: Path) -> dict[Path, bytes]:
    """All files of a run except its lock."""
    files = (path for path in run_dir.rglob("*") if path.is_file() and not path.name.startswith(".lock"))
    return {path.relative_to(run_dir): path.read_bytes() for path in files}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_finished_run_says_so_and_writes_nothing(finished: Callable[..., Path], tmp_path: Path, ranks: int) -> None:
    copy = Path(shutil.copytree(finished(ranks), tmp_path / "copy", symlinks=True))
    done = run("train.py", "--run-dir", copy, "--resume", ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert f"{copy} is finished: 26 steps, best top-1 " in done.stderr
    assert contents(copy) == contents(finished(ranks))


def test_the_end_is_reported_if_a_run_was_killed_before_it(finished: Callable[..., Path], tmp_path: Path) -> None:
    """All steps are done; only the last line is missing."""
    copy = Path(shutil.copytree(finished(1), tmp_path / "copy", symlinks=True))
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:-1]))
    done = run("train.py", "--run-dir", copy, "--resume")
    assert done.returncode == 0, done.stderr
    assert "is finished" not in done.stderr
    assert_same_run(copy, finished(1))


@pytest.mark.slow
def test_an_extended_run_is_the_longer_run(config_file: Path, tmp_path: Path) -> None:
    """Bit-equal with a schedule that does not depend on the epochs."""
    keys = ("split.block=1", "schedule.type=constant", "schedule.warmup_epochs=0")
    runs, sets = [tmp_path / "extended", tmp_path / "longer"], [x for key in keys for x in ("--set", key)]
    for run_dir, epochs in zip(runs, (1, 2), strict=True):
        done = run("train.py", config_file, "--run-dir", run_dir, *sets, "--set", f"train.epochs={epochs}")
        assert done.returncode == 0, done.stderr
    done = run("train.py", "--resume", "--run-dir", runs[0], "--set", "train.epochs=2")
    assert done.returncode == 0, done.stderr
    assert "(constant) does not depend on their number: lr was 0.05 in the last step and is 0.05 now" in done.stderr
    assert_same_run(*runs)
    assert loading.load(runs[0] / "config.toml").train.epochs == 2


def test_an_extended_run_says_how_far_its_lr_jumps(finished: Callable[..., Path], tmp_path: Path) -> None:
    """The cosine of 2 epochs has ended; that of 3 epochs, after 6 of 39 steps of warm-up, is in its 20th step of 33."""
    copy = Path(shutil.copytree(finished(1), tmp_path / "copy", symlinks=True))
    done = run("train.py", "--resume", "--run-dir", copy, "--set", "train.epochs=3")
    assert done.returncode == 0, done.stderr
    last, following = (0.025 * (1 + math.cos(math.pi * at)) for at in (19 / 20, 20 / 33))
    told = f"(cosine) is that of 3 epochs from now on: lr jumps up from {last:.3g} to {following:.3g}"
    assert f"extended from 2 to 3 epochs; the schedule {told}" in done.stderr
    ends = [(line["event"], line["step"]) for line in metrics(copy) if line["event"] != "train"]
    assert ends == [("validation", 13), ("validation", 26), ("validation", 39), ("end", 39)]
    assert metrics(copy)[: len(metrics(finished(1))) - 1] == metrics(finished(1))[:-1]


def test_a_run_is_fine_tuned_and_its_source_is_read_once(config_file: Path, tmp_path: Path) -> None:
    """Frozen parts are those of the file to the end, also after resuming without it."""
    source, run_dir = tmp_path / "source.pth", tmp_path / "run"
    theirs = networks.build(schema.Model(arch="resnet18", width=0.125), 3, 7, 32).state_dict()
    torch.save(theirs, source)
    keys = ["split.branches=all", "model.stem=no_stride", f"model.init_from={source}", "optim.layer_decay=0.8"]
    sets = [x for key in [*keys, "train.freeze=bn1,layer1", "train.epochs=1"] for x in ("--set", key)]
    done = run("train.py", config_file, "--run-dir", run_dir, *sets)
    assert done.returncode == 0, done.stderr
    becomes = "7 x 7 over pixels with a stride of 2 pixels, becomes 7 x 7 over 4 of 4 bands of 2 x 2 blocks"
    told = f"begins with {source}; its first convolution, {becomes} with a stride of 2 pixels; new head, for 10 classes"
    assert told in done.stderr
    assert "frozen: bn1, layer1; 98." in done.stderr
    assert f"lr of layers: {0.8**9:.3g} of the schedule's in the first that is trained, 1 in the last" in done.stderr
    source.unlink()
    done = run("train.py", "--resume", "--run-dir", run_dir, "--set", "train.epochs=2")
    assert done.returncode == 0, done.stderr
    assert "begins with" not in done.stderr
    state = checkpoint.read(run_dir / "checkpoints/last", "branch_00.pt")["network"]
    for key, value in state.items():
        assert not key.startswith(("bn1", "layer1.")) or torch.equal(value, theirs[key])
    assert not torch.equal(state["layer2.0.conv1.weight"], theirs["layer2.0.conv1.weight"])
    done = run("train.py", config_file, "--run-dir", tmp_path / "other", *sets)
    assert done.returncode == 2
    assert f"model.init_from: '{source}' given, but there is no such file" in done.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_run_resumes_with_its_own_config(
    finished: Callable[..., Path], config_file: Path, tmp_path: Path, run_here: Callable[..., Done]
) -> None:
    run_dir = tmp_path / "run"
    launch = Launch("train.py", config_file, "--run-dir", run_dir, "--set", "train.log_every=1")
    wait_for(run_dir / "checkpoints/step_00000003", launch)
    launch.signal(signal.SIGTERM)
    launch.wait()
    for option, message in (
        (("--set", "optim.lr=0.01"), "optim.lr was 0.05, now 0.01"),
        (("--data", Path(__file__).parents[2] / "config/data/demo.toml"), "data.image_size was 32, now 64"),
        (("--set", "optim.lrr=1"), "did you mean optim.lr?"),
    ):
        done = run_here("train.py", "--resume", "--run-dir", run_dir, *option)
        assert done.returncode == 2
        assert message in done.stderr
    done = run_here("train.py", "--resume", "--run-dir", run_dir, "--dry-run")
    assert done.stdout.startswith("tiny: 4 x resnet18, data at 32 pixels\n"), done
    done = run_here("train.py", "--resume", "--run-dir", run_dir, "--print-run-dir")
    assert done.stdout == f"{run_dir}\n"
    done = run("train.py", "--resume", "--run-dir", run_dir, "--set", "train.log_every=4")
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stderr
    assert loading.load(run_dir / "config.toml").train.log_every == 4
    for name in ("last", "best"):
        mine, theirs = (checkpoint.find(each / "checkpoints", name) for each in (run_dir, finished(1)))
        for k in range(4):
            assert_equal(*(checkpoint.read(folder, f"branch_{k:02d}.pt") for folder in (mine, theirs)))


def test_resume_without_a_run_needs_a_config(tmp_path: Path, run_here: Callable[..., Done]) -> None:
    for folder in (tmp_path / "none", tmp_path):
        done = run_here("train.py", "--resume", "--run-dir", folder)
        assert done.returncode == 2
        message = "no run found there, and no CONFIG given to start one"
        assert done.stderr == f"error: --resume --run-dir {folder}: {message}\n"
    done = run_here("train.py", "--resume", "--print-run-dir")
    assert (done.returncode, done.stdout) == (0, "runs/demo-seed0\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_classes_are_compared_by_name(
    finished: Callable[..., Path], config_file: Path, image_root: Path, tmp_path: Path, run_here: Callable[..., Done]
) -> None:
    """A renamed class folder, at a different place in the alphabet, is a different class in every command."""
    root = Path(shutil.copytree(image_root, tmp_path / "renamed"))
    first = sorted(path.name for path in (root / "train").iterdir())[0]
    for part in ("train", "val"):
        (root / part / first).rename(root / part / "zulu")
    moved = ("--set", f"data.root={root}")
    copy = Path(shutil.copytree(finished(1), tmp_path / "copy", symlinks=True))
    other = tmp_path / "other"
    assert run("train.py", config_file, "--run-dir", other, *moved, "--set", "train.epochs=1").returncode == 0
    assert checkpoint.read_run(checkpoint.find(other / "checkpoints", "last"))["classes"][-1] == "zulu"
    before = contents(copy)
    teacher = f"distillation.teacher={copy}"
    for command, told in (
        (("evaluate.py", copy, *moved), f"{root}: the classes are not those that {copy} was trained on"),
        (
            ("train.py", "--resume", "--run-dir", copy, *moved),
            f"{root}: the classes are not those that {copy} was trained on",
        ),
        (
            ("train.py", config_file, "--run-dir", tmp_path / "new", *moved, "--set", teacher),
            f"those that {copy} was trained on",
        ),
        (("evaluate.py", copy, other), f"{copy}: the classes are not those that {other} was trained on"),
    ):
        done = run_here(*command)
        assert done.returncode == 2
        assert told in done.stderr
        assert f"missing {'zulu' if command[-1] == other else first};" in done.stderr
        assert "Traceback" not in done.stderr
    assert contents(copy) == before
    (copy / "classes.json").unlink()  # the checkpoint knows them as well
    assert run_here("train.py", "--resume", "--run-dir", copy, *moved).returncode == 2


def test_an_impossible_evaluation_is_refused_before_it_starts(
    finished: Callable[..., Path], run_here: Callable[..., Done], tmp_path: Path
) -> None:
    for arguments, message in (
        (("--checkpoint", "7"), "no checkpoint of step 7; there are those of steps 13, 24, 26"),
        (("--checkpoint", "newest"), "'newest' given; allowed: best, last or a step"),
        (("--set", "model.width=0.5"), "--set model.width: 0.5 given, but the networks of"),
        (("--output", tmp_path / "no/folder.json"), f"there is no folder {tmp_path}/no"),
        (("--save", tmp_path), f"--save {tmp_path}: this is a folder; name a file"),
    ):
        done = run_here("evaluate.py", finished(1), *arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not done.stdout


def test_any_number_of_processes_validates_like_one(finished: Callable[..., Path], tmp_path: Path) -> None:
    figures = []
    for ranks in (1, 2, 5):  # 5 does not divide the training batch
        output = tmp_path / f"{ranks}.json"
        done = run("evaluate.py", finished(2), "--checkpoint", "last", "--output", output, ranks=ranks)
        assert done.returncode == 0, done.stderr
        figures.append(json.loads(output.read_text()))
    alone, *together = figures
    assert [figure["val_images"] for figure in figures] == [10 * VAL_PER_CLASS] * 3
    for figure in together:
        for key in ("loss", "top1", "top5", "branch_top1", "branch_top5"):
            assert figure[key] == pytest.approx(alone[key], abs=1e-6)
    last = [line for line in metrics(finished(2)) if line["event"] == "validation"][-1]
    assert last["top1"] == pytest.approx(alone["top1"], abs=1e-6)


def test_accumulation_gives_the_gradients_of_the_whole_batch(config_file: Path) -> None:
    """Without batch norm, whose statistics are those of one accumulation step."""
    config = loading.load(config_file)
    x, y = torch.randn(12, 5), torch.randint(0, 3, (12,))
    weights = []
    for parts in (1, 3):
        torch.manual_seed(0)
        network = torch.nn.Linear(5, 3)
        learner = Learner(network, config, Precision("fp32", ALONE.ranks.device), ALONE)
        losses = [learner.step(x.chunk(parts), y.chunk(parts), lr=0.1).loss for _ in range(3)]
        weights.append((network.weight.detach().clone(), torch.stack(losses)))
        assert network.weight.grad is None  # this branch leaves nothing behind
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("policy", ["skip", "lower_lr"])
def test_a_step_with_gradients_that_are_not_finite_is_left_out(config_file: Path, policy: str) -> None:
    """Weights, momentum and running statistics equal those of a run without that batch."""
    config = loading.load(config_file, [f"train.on_nonfinite={policy}"])
    good, bad = torch.randn(4, 3, 8, 8), torch.full((4, 3, 8, 8), float("inf"))
    labels, networks = torch.zeros(4, dtype=torch.int64), []
    for batches in ([good, bad, good], [good, good]):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Flatten(), torch.nn.Linear(192, 2))
        learner = Learner(network, config, Precision("fp32", ALONE.ranks.device), ALONE)
        factor = 0.5 if policy == "lower_lr" else 1.0
        for n, x in enumerate(batches):
            lr = 0.1 if len(batches) == 3 or n == 0 else 0.1 * factor
            outcome = learner.step([x], [labels], lr)
            assert bool(outcome.taken) == (not outcome.failed) == (x is good)
            assert network[2].weight.grad is None
        networks.append((network.state_dict(), learner.optimizer.state_dict()["state"]))
        if len(batches) == 3:
            assert learner.lr_factor == factor
            again = Learner(network, config, Precision("fp32", ALONE.ranks.device), ALONE)
            again.load_state_dict(learner.state_dict())
            assert again.lr_factor == factor
    assert_equal(*networks)


def test_a_step_is_torchs_sgd(config_file: Path) -> None:
    config = loading.load(config_file, ["optim.weight_decay=0.01"])
    network = torch.nn.Linear(5, 3)
    weight, bias = (p.detach().clone().requires_grad_() for p in network.parameters())
    reference = torch.optim.SGD([weight, bias], lr=1, momentum=0.9, weight_decay=0.01, fused=False)
    learner = Learner(network, config, Precision("fp32", ALONE.ranks.device), ALONE)
    for lr in (0.1, 0.2, 0.05):
        x, y = torch.randn(4, 5), torch.randint(0, 3, (4,))
        learner.step([x], [y], lr)
        reference.param_groups[0]["lr"] = lr
        reference.zero_grad()
        torch.nn.functional.cross_entropy(x @ weight.T + bias, y).backward()
        reference.step()
        torch.testing.assert_close(network.weight, weight)


def mistakes(config_file: Path, tmp_path: Path) -> dict[str, tuple[list[object], str]]:
    run_dir = ["--run-dir", tmp_path / "run"]
    empty = tmp_path / "empty"
    for part in ("train", "val"):
        (empty / part / "class").mkdir(parents=True)
    return {
        "unknown key": ([config_file, "--set", "optim.lrr=1"], "did you mean optim.lr?"),
        "wrong type": ([config_file, "--set", "optim.lr=fast"], "optim.lr: 'fast' given"),
        "missing folder": ([config_file, "--set", f"data.root={tmp_path}/no", *run_dir], "/no: no such folder"),
        "empty class": ([config_file, "--set", f"data.root={empty}", *run_dir], "train/class: no images"),
        "block": ([config_file, "--set", "split.block=3"], "split.block: 3 given; allowed: a divisor"),
        "no config": (["nowhere.toml"], "nowhere.toml: no such config file"),
        "too large a batch": ([config_file, "--set", "train.batch_size=1000", *run_dir], "the data has 160 images"),
    }


NAMES = ["unknown key", "wrong type", "missing folder", "empty class", "block", "no config", "too large a batch"]


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_ends_with_one_message_and_writes_nothing(
    config_file: Path, tmp_path: Path, run_here: Callable[..., Done], name: str
) -> None:
    arguments, message = mistakes(config_file, tmp_path)[name]
    before = set(tmp_path.rglob("*"))
    done = run_here("train.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert set(tmp_path.rglob("*")) == before


def test_a_run_directory_in_use_is_left_alone(
    finished: Callable[..., Path], config_file: Path, tmp_path: Path, run_here: Callable[..., Done]
) -> None:
    copy = Path(shutil.copytree(finished(1), tmp_path / "copy", symlinks=True))
    before = contents(copy)
    for extra, message in (
        ([], "already holds a run; --resume continues it"),
        (["--resume", "--set", "optim.lr=0.01"], "optim.lr was 0.05, now 0.01"),
    ):
        done = run_here("train.py", config_file, "--run-dir", copy, *extra)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert contents(copy) == before


def test_another_number_of_ranks_has_to_divide(
    finished: Callable[..., Path], config_file: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(finished(2), tmp_path / "copy", symlinks=True))
    (copy / "metrics.jsonl").unlink()  # not known to be finished
    done = run("train.py", config_file, "--run-dir", copy, "--resume", ranks=3)
    assert done.returncode == 2
    assert "this run started on 2 ranks; it can be resumed on 2 or 1, not on 3" in done.stderr
    assert done.stderr.count("error: ") == 1


def test_an_image_that_cannot_be_decoded_is_named(config_file: Path, image_root: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(image_root, tmp_path / "copy"))
    bad = sorted((root / "train").rglob("*.jpg"))[40]
    bad.write_bytes(bad.read_bytes()[:400])
    keys = (f"data.root={root}", "data.check=off", "data.on_bad=error")
    sets = [word for key in keys for word in ("--set", key)]
    done = run("train.py", config_file, *sets, "--run-dir", tmp_path / "run")
    assert done.returncode == 2
    assert f"error: {bad}: this image cannot be read or decoded" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_dry_run_writes_nothing_and_counts(
    config_file: Path, tmp_path: Path, run_here: Callable[..., Done]
) -> None:
    before = set(tmp_path.rglob("*"))
    done = run_here("train.py", config_file, "--dry-run", "--world-size", 3, "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "2 epochs x 13 = 26" in done.stdout
    assert "12 images = 3 ranks x 1 x 4" in done.stdout
    assert set(tmp_path.rglob("*")) == before
    done = run_here("train.py", config_file, "--dry-run", "--world-size", 5)
    assert done.returncode == 2
    assert "5 ranks" in done.stderr
