"""Evaluation on images that a run was not validated on: by name and number, with few classes, with several labels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bandsplit.config import loading
from bandsplit.data.images import ImageFiles
from bandsplit.distributed.ranks import Ranks
from bandsplit.errors import UserError
from bandsplit.evaluation.joined import Joined
from tests.conftest import DATA_TOML, TRAIN_TOML, Done, run

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Trained:
    """A run, and what its network says of its own validation images."""

    run_dir: Path
    classes: list[str]
    names: list[str]
    """As `class/file`."""
    labels: NDArray[np.int32]
    logits: NDArray[np.float32]
    """(branches, images, classes)."""

    @property
    def fused(self) -> NDArray[np.float32]:
        return np.asarray(self.logits.mean(0))


@pytest.fixture(scope="module")
def trained(finished: Callable[..., Path]) -> Trained:
    runs = Joined.of([finished(1)], "best", [], ALONE)
    files = runs.validation_files()
    runs.ensemble.eval()
    with torch.no_grad():
        seen = [(runs.ensemble(batch.inputs)[:, batch.labels >= 0]) for batch in runs.loader(files)]
    names = [files.name(i) for i in range(len(files))]
    return Trained(finished(1), files.classes, names, np.asarray(files.labels), torch.cat(seen, 1).numpy())


def evaluated(
    evaluate: Callable[..., Done], run_dir: Path, config: Path, *options: object
) -> tuple[dict[str, Any], Done]:
    output = config.with_suffix(".json")
    done = evaluate("evaluate.py", run_dir, "--data", config, "--output", output, *options)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text()), done


def percent(right: Sequence[bool] | NDArray[np.bool_]) -> float:
    return pytest.approx(100 * float(np.mean(right)))


def files_of(classes: list[str]) -> ImageFiles:
    """One image of each class."""
    return ImageFiles([f"{name}.jpg" for name in classes], np.arange(len(classes), dtype=np.int32), classes)


def test_numbers_are_not_taken_in_the_order_of_strings() -> None:
    names, numbers = sorted(f"n{i:02d}" for i in range(12)), sorted(map(str, range(12)))
    assert numbers[2] == "10"
    found = files_of(numbers).renumbered(names, "run", "data", numbers=True)
    assert np.asarray(found.labels).tolist() == list(map(int, numbers))
    with pytest.raises(UserError, match='data: the labels are numbers, such as 0, .* data.labels = "numbers"'):
        files_of(numbers).renumbered(names, "run", "data")
    with pytest.raises(UserError, match="not those that run was trained on: new 12"):
        files_of([*numbers, "12"]).renumbered(names, "run", "data", numbers=True)

    # a run whose classes have numbers as names: these are names, whatever their order
    for order in (numbers, list(map(str, range(12)))):
        for said in (False, True):
            found = files_of(["3", "10", "2"]).renumbered(order, "run", "data", numbers=said)
            assert [order[label] for label in np.asarray(found.labels)] == ["3", "10", "2"]


def test_several_labels_none_and_one() -> None:
    files = files_of(["a;c", "b", ";", "", "c;c"]).renumbered(["a", "b", "c", "d"], "run", "data")
    assert files.paths == ["a;c.jpg", "b.jpg", "c;c.jpg"]
    assert files.answers is not None
    right = files.answers[np.asarray(files.labels)]
    assert [np.flatnonzero(row).tolist() for row in right] == [[0, 2], [1], [2]]
    whole = files_of(["a;b", "a"]).renumbered(["a", "b", "a;b"], "run", "data")  # the name of a class
    assert (whole.answers, np.asarray(whole.labels).tolist()) == (None, [2, 0])


def test_images_are_prepared_as_those_of_the_run(finished: Callable[..., Path], tmp_path: Path) -> None:
    """What a data config says of sizes and normalization does not count, but --set does."""
    (tmp_path / "x.toml").write_text(
        'root = "/there"\nlayout = "list"\nval = "x.csv"\nresize_size = 99\nstd = [9, 9, 9]\n'
    )
    own = loading.load(finished(1) / "config.toml")
    other = loading.load(finished(1) / "config.toml", ["data.resize_size=50"], images=tmp_path / "x.toml")
    assert (other.data.root, other.data.layout, other.data.val, other.data.name) == ("/there", "list", "x.csv", "x")
    assert (other.data.resize_size, other.data.std, other.data.image_size) == (50, own.data.std, 32)
    assert (other.data.classes, other.model, other.split) == (10, own.model, own.split)
    (tmp_path / "fused.toml").write_text(TRAIN_TOML + '[fusion]\nmethod = "learned"\n')
    (tmp_path / "data.toml").write_text(DATA_TOML + "holdout = 4\n")
    other = loading.load(tmp_path / "fused.toml", images=tmp_path / "x.toml")
    assert (other.data.root, other.data.holdout, other.data.resize_size) == ("/there", 4, 40)
    (tmp_path / "x.toml").write_text('root = "/there"\nlayuot = "list"\n')
    with pytest.raises(UserError, match=r"x\.toml: data\.layuot: unknown key; did you mean data\.layout"):
        loading.load(finished(1) / "config.toml", images=tmp_path / "x.toml")


def test_a_numbered_set_of_few_classes(
    trained: Trained, image_root: Path, tmp_path: Path, run_here: Callable[..., Done]
) -> None:
    """Folders as in ImageNet-V2, few classes as in ImageNet-A: all classes can be predicted, or those of the set."""
    some = [7, 2, 4]
    for k in some:
        shutil.copytree(image_root / "val" / trained.classes[k], tmp_path / "set/few" / str(k))
    config = tmp_path / "few.toml"
    config.write_text(f'root = "{tmp_path}/set"\nval = "few"\nlabels = "numbers"\nclasses = 10\n')
    table, done = evaluated(run_here, trained.run_dir, config)
    chosen = np.isin(trained.labels, some)
    labels, fused, logits = trained.labels[chosen], trained.fused[chosen], trained.logits[:, chosen]
    assert table["val_images"] == chosen.sum() == 15
    assert table["top1"] == percent(fused.argmax(-1) == labels)
    assert table["branch_top1"] == [percent(each.argmax(-1) == labels) for each in logits]
    among = np.where(np.isin(np.arange(10), some), 0, -np.inf)
    within = table["restricted"]
    assert (within["classes"], within["top5"]) == (3, 100)
    assert within["top1"] == percent((fused + among).argmax(-1) == labels)
    assert within["branch_top1"] == [percent((each + among).argmax(-1) == labels) for each in logits]
    assert within["top1"] >= table["top1"]
    assert "among the 3 classes of the images" in done.stdout
    crops, _ = evaluated(run_here, trained.run_dir, config, "--flip")
    assert crops["restricted"]["classes"] == 3

    config.write_text(config.read_text().replace("= 10", "= 1000"))
    done = run_here("evaluate.py", trained.run_dir, "--data", config)
    assert done.returncode == 2
    assert f"data.classes: {tmp_path}/set numbers 1000 classes, but {trained.run_dir} was trained on 10" in done.stderr
    done = run_here("evaluate.py", trained.run_dir, "--data", tmp_path / "nowhere.toml")
    assert (done.returncode, "nowhere.toml: no such config file" in done.stderr) == (2, True)


def test_images_with_several_labels_on_any_number_of_ranks(
    trained: Trained, image_root: Path, tmp_path: Path, run_here: Callable[..., Done]
) -> None:
    """As ReaL's: a prediction is right if it is one of the labels, and an image without a label does not count."""
    shutil.copytree(image_root / "val", tmp_path / "val")
    rng = np.random.default_rng(0)
    right = rng.random((50, 10)) < 0.25
    right[[3, 8]] = False
    rows = [
        f"val/{name},{';'.join(trained.classes[k] for k in np.flatnonzero(row))}"
        for name, row in zip(trained.names, right, strict=True)
    ]
    counted = right.any(1)
    config = tmp_path / "real.toml"
    config.write_text(f'root = "{tmp_path}"\nlayout = "list"\nval = "real.csv"\n')
    for chosen, ranks in ((50, 1), (50, 2), (2, 3)):
        (tmp_path / "real.csv").write_text("path,label\n" + "\n".join(rows[:chosen]) + "\n")
        where = counted[:chosen]
        best = trained.fused[:chosen][where].argsort(-1)[:, ::-1]
        hits = np.take_along_axis(right[:chosen][where], best, 1)

        def evaluate(*arguments: object, ranks: int = ranks) -> Done:
            return run(*map(str, arguments), ranks=ranks) if ranks > 1 else run_here(*arguments)

        table, done = evaluated(evaluate, trained.run_dir, config)
        assert table["val_images"] == where.sum()
        assert table["top1"] == percent(hits[:, 0])
        assert table["top5"] == percent(hits[:, :5].any(1))
        assert table["loss"] is None
        assert "no loss, since they have several labels" in done.stdout
        if "restricted" in table:
            assert table["restricted"]["classes"] == right[:chosen].any(0).sum()
    for option, value in (("--save", tmp_path / "x.npz"), ("--cascade", 2)):
        done = run_here("evaluate.py", trained.run_dir, "--data", config, option, value)
        assert (done.returncode, "not with several" in done.stderr) == (2, True)
    (tmp_path / "real.csv").write_text(f"{rows[0]}\nval/{trained.names[1]},zebra;quagga\n")
    done = run_here("evaluate.py", trained.run_dir, "--data", config)
    assert (done.returncode, "new quagga, zebra" in done.stderr) == (2, True)


def test_other_images_than_those_of_the_run_are_told(
    trained: Trained, image_root: Path, tmp_path: Path, run_here: Callable[..., Done]
) -> None:
    """By numbers, with an example of each; the same images elsewhere are not told."""
    shutil.copytree(image_root / "val", tmp_path / "val")
    sets = ("--set", f"data.root={tmp_path}")
    done = run_here("evaluate.py", trained.run_dir, *sets)
    assert (done.returncode, "differ from" in done.stderr) == (0, False)
    first, second, third = (tmp_path / "val" / name for name in trained.names[:3])
    second.write_bytes(third.read_bytes())
    shutil.copy(third, third.with_name("new.jpg"))
    first.unlink()
    done = run_here("evaluate.py", trained.run_dir, *sets)
    assert done.returncode == 0, done.stderr
    told = (
        f"data.root: {tmp_path}: images in val differ from those that {trained.run_dir} was validated on: 1 gone (such "
        f"as {trained.names[0]!r}), 1 changed (such as {trained.names[1]!r}), 1 new (such as "
    )
    assert told in done.stderr
    done = run_here("evaluate.py", trained.run_dir, *sets, "--data", tmp_path / "x.toml", "--fit-fusion")
    assert (done.returncode, "fusion is fitted on images of the run's own data" in done.stderr) == (2, True)


@pytest.mark.slow
def test_a_band_store_as_other_data(
    trained: Trained, image_root: Path, tmp_path: Path, run_here: Callable[..., Done]
) -> None:
    """It is the same evaluation but for the rounding of float16; it has no pixels to corrupt."""
    (tmp_path / "data.toml").write_text(DATA_TOML.format(root=image_root))
    (tmp_path / "tiny.toml").write_text(TRAIN_TOML)
    store, config = tmp_path / "store", tmp_path / "bands.toml"
    done = run_here("data.py", "pack", tmp_path / "tiny.toml", "--to", store, "--dtype", "float16", "--workers", 1)
    assert done.returncode == 0, done.stderr
    config.write_text(f'kind = "bands"\nroot = "{store}"\n')
    table, _ = evaluated(run_here, trained.run_dir, config)
    cross_entropy = torch.nn.functional.cross_entropy
    own = cross_entropy(torch.from_numpy(trained.fused), torch.tensor(trained.labels).long())
    assert (table["val_images"], table["loss"]) == (50, pytest.approx(float(own), rel=1e-2))
    for arguments, told in (
        (("--corrupt",), "--corrupt: a band store holds no pixels; evaluate with --set data.kind=images"),
        (("--set", "data.root=/nowhere"), "/nowhere"),
    ):
        done = run_here("evaluate.py", trained.run_dir, "--data", config, *arguments)
        assert (done.returncode, told in done.stderr) == (2, True)
