"""Runs as teachers: their logits for any launch and any split of the student, and what cannot be distilled."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loguru import logger

from bandsplit.config import loading
from bandsplit.data import mixing
from bandsplit.data.loader import TrainingLoader
from bandsplit.data.pipeline import Shard
from bandsplit.data.store.manifest import FORMAT, MANIFEST, ImageManifest, ImagePart
from bandsplit.distributed.mesh import Mesh
from bandsplit.distributed.ranks import Ranks
from bandsplit.errors import UserError
from bandsplit.models.precision import Precision
from bandsplit.runs import checkpoint
from bandsplit.runs.initial import tell_what_has_seen_held_out
from bandsplit.runs.restored import Restored, Teacher
from bandsplit.training.learner import Learner, learners_of
from tests.compare import assert_equal, assert_same_run, metrics, wait_for
from tests.conftest import Done, Launch, image_files, run

ALONE = Mesh(Ranks(0, 1, 0, 1, torch.device("cpu")), 1)
FP32 = Precision("fp32", ALONE.ranks.device)


@pytest.mark.parametrize(
    ("block", "mix"),
    [
        *itertools.product([1, 4], ["mix.mixup=0", "mix.cutmix=1.0"]),
        (2, "mix.mixup=1.0"),
        *(
            pytest.param(block, mix, marks=pytest.mark.long)
            for block, mix in ((1, "mix.mixup=1.0"), (4, "mix.mixup=1.0"), (2, "mix.mixup=0"), (2, "mix.cutmix=1.0"))
        ),
    ],
)
def test_a_teacher_sees_the_images_of_the_batch(
    finished: Callable[..., Path], config_file: Path, block: int, mix: str
) -> None:
    """Same crops, flips and mixing with any split of the student, as if the teacher read its own config's data."""
    keys = [f"distillation.teacher={finished(1)}", f"split.block={block}", mix, "seed=5", "data.mean=[100, 100, 100]"]
    student = loading.load(config_file, keys)
    teachers = loading.load(finished(1) / "config.toml", ["seed=5"])
    images, share = image_files(Path(student.data.root) / "train"), Shard(0, 1, 6, threads=1, device_id=None)
    batches = TrainingLoader(student, images, [share], teacher=Teacher.of(student, images.classes, FP32))
    own, teacher = TrainingLoader(teachers, images, [share]), Restored.of(finished(1), "best").ensemble.eval()
    for n in range(4):
        batch, seen = next(batches), next(own)
        assert [x.shape[-1] for x in batch.inputs] == [32 // block] * block**2
        # boxes are whole blocks of both splits, and the teacher's has blocks of 2
        other = [torch.empty(6, 3, 32 // block, 32 // block)]
        (*mixed, _), labels = mixing.mix([*seen.inputs, *other], seen.labels, student, n, 0)
        with torch.no_grad():
            wanted = teacher(mixed).mean(dim=0)
        assert batch.teacher_logits is not None
        torch.testing.assert_close(batch.teacher_logits, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(batch.labels, labels)
    assert next(TrainingLoader(student, images, [share])).teacher_logits is None


def test_a_branch_comes_to_agree_with_its_teacher(config_file: Path) -> None:
    """Even if the labels disagree; without a teacher it learns the labels."""
    keys = ["distillation.teacher=anywhere", "distillation.label_weight=0", "distillation.temperature=2"]
    config = loading.load(config_file, [*keys, "optim.weight_decay=0"])
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(16, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator)
    teacher_logits = torch.randn(16, 4, generator=generator)
    agreement = []
    for teacher in ([teacher_logits], None):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4))
        learner = Learner(network, config, FP32, ALONE)
        for _ in range(300):
            learner.step([x], [labels], lr=0.05, teacher_logits=teacher)
        agreement.append(
            [(network(x).argmax(1) == other).float().mean().item() for other in (teacher_logits.argmax(1), labels)]
        )
    assert agreement[0][0] > 0.95 > 0.7 > agreement[0][1]
    assert agreement[1][1] > 0.95 > 0.7 > agreement[1][0]


def test_a_teacher_never_learns(finished: Callable[..., Path], config_file: Path) -> None:
    """Neither its weights nor its running statistics change while others learn from it."""
    config = loading.load(config_file, [f"distillation.teacher={finished(1)}"])
    trained = Restored.of(finished(1), "best")
    teacher, before = Teacher(trained, FP32), copy.deepcopy(trained.ensemble.state_dict())
    images, share = image_files(Path(config.data.root) / "train"), Shard(0, 1, 12, threads=1, device_id=None)
    batches = TrainingLoader(config, images, [share], teacher=teacher)
    ensemble, learners = learners_of(config, 12, FP32, Mesh(ALONE.ranks, 4))
    own = ensemble([torch.ones(8, 3, 16, 16)] * 4)
    for _ in range(3):
        batch = next(batches)
        for i, learner in enumerate(learners):
            learner.step([batch.inputs[i]], [batch.labels], 0.1, teacher_logits=[batch.teacher_logits])
    assert_equal(trained.ensemble.state_dict(), before)
    assert not torch.equal(ensemble([torch.ones(8, 3, 16, 16)] * 4), own)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2])
def test_a_distilled_run_does_not_depend_on_the_launch(
    finished: Callable[..., Path], run_here: Callable[..., Done], config_file: Path, tmp_path: Path, groups: int
) -> None:
    """Mixing and teacher_logits on two ranks, for any branches per rank; killed and resumed, it is the same run."""
    teacher = [f"distillation.teacher={finished(1)}", "distillation.checkpoint=last"]
    keys = [*teacher, "mix.mixup=0.4", "mix.cutmix=1.0", "mix.probability=0.7", "split.block=4"]
    keys += ["model.bn_batch_size=6", "split.branches=[[0],[1,2]]", "train.epochs=1"]
    keys += ["train.log_every=1", "optim.lr=0.002"]
    arguments = [part for key in (*keys, f"parallel.branch_groups={groups}") for part in ("--set", key)]
    launch = Launch("train.py", config_file, "--run-dir", tmp_path / "run", *arguments, ranks=2)
    wait_for(tmp_path / "run/checkpoints/step_00000006", launch)
    launch.signal(signal.SIGKILL)
    launch.wait()
    done = run("train.py", config_file, "--run-dir", tmp_path / "run", "--resume", *arguments, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "distills from tiny" in done.stderr
    assert_same_run(tmp_path / "run", finished(2, *keys, f"parallel.branch_groups={groups}"))
    longer = (
        "train.epochs=2",
        "distillation.checkpoint=13",
        "parallel.branch_groups=auto",
    )  # another step of the teacher
    done = run_here("train.py", "--run-dir", tmp_path / "run", "--resume", *(a for k in longer for a in ("--set", k)))
    assert done.returncode == 2
    assert "step 13" in done.stderr
    assert "has learned from, which were those of tiny, step 2" in done.stderr
    if groups == 2:
        losses = [
            [line["loss"] for line in metrics(finished(2, *keys, f"parallel.branch_groups={g}"))[:3]] for g in (1, 2)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # later, rounding errors have grown beyond that


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["distillation.teacher=/nowhere"],
            "distillation.teacher: /nowhere: not a run directory: it has no config.toml",
        ),
        (["distillation.checkpoint=9"], "no checkpoint of step 9; there are those of steps 13, 24, 26"),
        (
            ["data.image_size=27", "split.block=1"],
            "tiny splits into blocks of 2 pixels, which do not divide .* 27 x 27",
        ),
        (["augment.progressive={min_size=25,ramp_end=1,multiple=1}", "split.block=1"], "do not divide .* 25 x 25"),
    ],
)
def test_teachers_that_do_not_fit_are_refused_before_anything_is_written(
    finished: Callable[..., Path],
    run_here: Callable[..., Done],
    config_file: Path,
    tmp_path: Path,
    keys: list[str],
    message: str,
) -> None:
    sets = [part for key in (f"distillation.teacher={finished(1)}", *keys) for part in ("--set", key)]
    done = run_here("train.py", config_file, "--run-dir", tmp_path / "run", *sets)
    assert done.returncode == 2
    with pytest.raises(UserError, match=message):
        raise UserError(done.stderr)
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_classes_or_of_one_size_is_refused(finished: Callable[..., Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(finished(1), tmp_path / "other", symlinks=True))
    config = loading.load(other / "config.toml", [f"distillation.teacher={other}"])
    classes = Restored.of(other, "best").classes
    more = config.model_copy(update={"data": config.data.model_copy(update={"classes": 11})})
    with pytest.raises(UserError, match="tiny has 10 classes, but data.classes is 11"):
        Teacher.of(more, classes, FP32)
    renamed = sorted([*classes[1:], "zulu"])
    with pytest.raises(
        UserError, match=f"teacher: the data .* not those that {other} was trained on: missing {classes[0]}; .* zulu"
    ):
        Teacher.of(config, renamed, FP32)
    assert Teacher.of(config, classes, FP32) is not None
    assert Teacher.of(loading.load(other / "config.toml"), classes, FP32) is None


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.width=0.5", "--set model.width: 0.5 given, but the networks of .* were trained with 0.125"),
        ("split.transform=identity", "--set split.transform: 'identity' given, but .* were trained with 'dct2d'"),
        ("split.only=[0]", "--set split.only: .* given, but the networks"),
        ("data.std=[1, 1, 1]", "--set data.std: .* given, but the networks"),
    ],
)
def test_overrides_do_not_change_what_was_trained(finished: Callable[..., Path], key: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Restored.of(finished(1), "best", [key])
    sizes = ["data.image_size=48", "data.resize_size=56", "validation.batch_size=5", "data.root=/elsewhere"]
    assert Restored.of(finished(1), "best", sizes).config.data.image_size == 48


def test_the_dry_run_counts_the_teacher_and_names_the_sizes(
    finished: Callable[..., Path], run_here: Callable[..., Done], config_file: Path
) -> None:
    teacher = finished(1)
    keys = ["augment.progressive={min_size=16, ramp_end=1, multiple=2}", f"distillation.teacher={teacher}"]
    sets = [part for key in keys for part in ("--set", key)]
    done = run_here("train.py", config_file, "--dry-run", *sets)
    assert done.returncode == 0, done.stderr
    parameters = sum(p.numel() for p in Restored.of(teacher, "last").ensemble.parameters())
    assert "teacher   tiny, 4 x resnet18 with block 2: " in done.stdout
    assert f"per image forward, {parameters * 4 / 2**20:.2f} MiB" in done.stdout
    assert "sizes     16 from epoch 0, 32 from epoch 1; costs are of the largest" in done.stdout
    done = run_here("train.py", config_file, "--dry-run", "--set", "distillation.teacher=/nowhere")
    assert "teacher   unknown: /nowhere is not a run directory" in done.stdout


def packed_from(root: Path, digest: str) -> Path:
    """A folder with the manifest of packed images."""
    part = ImagePart(images=40, bytes=1, source_images=40, source_digest=digest, left_out=())
    manifest = ImageManifest(
        format=FORMAT, kind="images", code_version="0", data="tiny", side=32, quality=90, interpolation="bilinear",
        classes=("a",), parts={"train": part},
    )  # fmt: skip
    (root / MANIFEST).write_text(json.dumps(manifest.model_dump()))
    return root


def test_weights_and_targets_of_a_run_that_has_seen_held_out_images_are_told(
    finished: Callable[..., Path], config_file: Path, tmp_path: Path
) -> None:
    source, told = finished(1), list[str]()
    digest = checkpoint.read_run(checkpoint.find(source / "checkpoints", "best"))["data"]["train"]
    sink = logger.add(told.append, format="{message}", level="WARNING")
    try:
        for key in (f"model.init_from={source}", f"distillation.teacher={source}"):
            config = loading.load(config_file, [key, "data.holdout=4"])
            tell_what_has_seen_held_out(config, "other images")
            tell_what_has_seen_held_out(loading.load(config_file, [key]), digest)
            gone = key.replace("=", "=$NOT_SET_HERE/")  # of a run that is evaluated elsewhere
            tell_what_has_seen_held_out(loading.load(config_file, [gone, "data.holdout=4"]), digest)
            assert not told
            tell_what_has_seen_held_out(config, digest)
            assert key.replace("=", ": ") in told.pop()
            packed = loading.load(config_file, [key, "data.holdout=4", f"data.root={packed_from(tmp_path, digest)}"])
            tell_what_has_seen_held_out(packed, "of the store")
            assert key.replace("=", ": ") in told.pop()
    finally:
        logger.remove(sink)
