"""The demo images: complete or absent, deterministic, and with their textures in the detail bands only."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin

from bandsplit.data import demo
from bandsplit.data.demo import CLASSES, PERIOD, SHAPES, SIDE, draw, generate
from bandsplit.errors import UserError
from tests.conftest import Done


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "below" / "data"
    generate(root, train_per_class=5, val_per_class=2, workers=1)
    return root


# ------------------------------------------------------------------------------------------------------------ data set


def test_every_class_has_its_images(data: Path) -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 10
    assert list(CLASSES) == sorted(CLASSES)  # labels are the folders' alphabetical order for every reader
    for split, count in (("train", 5), ("val", 2)):
        assert sorted(folder.name for folder in (data / split).iterdir()) == list(CLASSES)
        for folder in (data / split).iterdir():
            assert sorted(file.name for file in folder.iterdir()) == [f"{i:05d}.jpg" for i in range(count)]


def test_files_are_jpeg_of_many_kinds(data: Path) -> None:
    sizes, samplings, quantizations = set(), set(), set()
    for path in data.rglob("*.jpg"):
        with Image.open(path) as image:
            image.load()
            assert image.format == "JPEG"
            assert image.mode in ("RGB", "L")
            short, long = sorted(image.size)
            assert SIDE <= short <= 2 * SIDE
            assert long / short < 4 / 3 + 0.01
            sizes.add(image.size)
            samplings.add(JpegImagePlugin.get_sampling(image) if image.mode == "RGB" else "gray")
            quantizations.add(tuple(image.quantization[0]))
    assert len(sizes) > 50  # of 70 images
    assert {0, 1, 2} <= samplings  # 4:4:4, 4:2:2, 4:2:0
    assert len(quantizations) > 10


def test_some_images_are_grayscale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "GRAY", 0.5)
    generate(tmp_path / "data", train_per_class=2, val_per_class=0, workers=1)
    modes = [Image.open(path).mode for path in (tmp_path / "data").rglob("*.jpg")]
    assert 2 < modes.count("L") < 18


def test_workers_do_not_change_a_byte(data: Path, tmp_path: Path) -> None:
    generate(tmp_path / "data", train_per_class=5, val_per_class=2, workers=2)
    assert contents(tmp_path / "data") == contents(data)


def test_a_larger_data_set_contains_the_smaller(data: Path, tmp_path: Path) -> None:
    generate(tmp_path / "data", train_per_class=2, val_per_class=3, workers=1)
    large, small = contents(data), contents(tmp_path / "data")
    assert all(large[name] == small[name] for name in large.keys() & small.keys())


def test_no_image_occurs_twice_in_any_split_or_seed(data: Path, tmp_path: Path) -> None:
    generate(tmp_path / "data", seed=1, train_per_class=5, val_per_class=2, workers=1)
    files = [*contents(data).values(), *contents(tmp_path / "data").values()]
    assert len(set(files)) == len(files) == 140


def test_an_existing_folder_is_refused_and_left_alone(data: Path) -> None:
    before = contents(data)
    with pytest.raises(UserError, match=str(data)):
        generate(data, seed=1, train_per_class=1, val_per_class=1, workers=1)
    assert contents(data) == before


def test_a_folder_that_appears_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "data"

    def write_and_be_overtaken(unfinished: Path, image: demo.ImageSpec) -> None:
        root.mkdir(exist_ok=True)
        (root / "theirs").touch()

    monkeypatch.setattr(demo, "_write", write_and_be_overtaken)
    with pytest.raises(UserError, match=str(root)):
        generate(root, train_per_class=1, val_per_class=1, workers=1)
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "theirs"]


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = demo._write

    def write_until_interrupted(root: Path, image: demo.ImageSpec) -> None:
        if image.label == 3:
            raise KeyboardInterrupt
        write(root, image)

    monkeypatch.setattr(demo, "_write", write_until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "data", train_per_class=1, val_per_class=1, workers=1)
    assert not list(tmp_path.iterdir())


def test_images_are_written_after_a_killed_run(tmp_path: Path) -> None:
    call = f"import pathlib; from bandsplit.data.demo import generate; generate(pathlib.Path({str(tmp_path)!r}, 'data')"
    process = subprocess.Popen([sys.executable, "-c", f"{call}, workers=1)"])
    patience = time.monotonic() + 60
    while not list(tmp_path.rglob("*.jpg")) and time.monotonic() < patience:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert list(tmp_path.rglob("*.jpg")), "it was killed in the midst of its work"
    assert not (tmp_path / "data").exists()

    generate(tmp_path / "data", train_per_class=1, val_per_class=1, workers=1)
    assert len(list((tmp_path / "data").rglob("*.jpg"))) == 20


def test_errors_of_workers_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SPLITS", ("nowhere", "val"))  # worker processes still look for "train"
    with pytest.raises(UserError, match=f"{tmp_path}/data: cannot be written: .*No such file .*/train/"):
        generate(tmp_path / "data", train_per_class=1, val_per_class=1, workers=2)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Simulates a full disk: files of more than 2,000 bytes cannot be written, also by child processes."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python would leave truncated modules in the cache
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_fills_is_one_message_and_leaves_nothing(tmp_path: Path, full_disk: None, workers: int) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}/data: cannot be written: "):
        generate(tmp_path / "data", train_per_class=2, val_per_class=1, workers=workers)
    assert not list(tmp_path.iterdir())


def test_a_training_whose_images_cannot_be_written_ends_with_one_message(
    tmp_path: Path, config_file: Path, run_here: Callable[..., Done], full_disk: None
) -> None:
    generate = "--set", "data.generate={train_per_class=2,val_per_class=1}"
    root = tmp_path / "made" / "data"
    done = run_here("train.py", config_file, *generate, "--set", f"data.root={root}", "--run-dir", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {root}: cannot be written: ")
    assert "Traceback" not in done.stderr
    assert {path.name for path in root.parent.iterdir()} <= {".data.lock"}
    assert not (tmp_path / "run").exists()

    below_a_file = config_file / "data"
    done = run_here(
        "train.py", config_file, *generate, "--set", f"data.root={below_a_file}", "--run-dir", tmp_path / "run"
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {below_a_file}: cannot be written: ")


def _killed(root: Path, image: demo.ImageSpec) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_write", _killed)
    with pytest.raises(UserError, match="data: one of the 2 processes that draw these images was killed"):
        generate(tmp_path / "data", train_per_class=1, val_per_class=1, workers=2)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ images


def bands(image: NDArray[np.uint8], side: int) -> NDArray[np.float64]:
    """Shorter side resized as validation does, then the 2x2 DCT by its definition: (4, height/2, width/2, 3).

    Bands: block mean, change along x, change along y, change along both.
    """
    height, width = (round(side * n / min(image.shape[:2])) // 2 * 2 for n in image.shape[:2])
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    blocks = np.asarray(resized, float).reshape(height // 2, 2, width // 2, 2, 3)
    signs = np.array([[[1, 1], [1, 1]], [[1, -1], [1, -1]], [[1, 1], [-1, -1]], [[1, -1], [-1, 1]]]) / 2
    coefficients: NDArray[np.float64] = np.einsum("krc,yrxcn->kyxn", signs, blocks)
    return coefficients


@pytest.mark.parametrize("side", [SIDE, 2 * SIDE])
@pytest.mark.parametrize("shape", SHAPES)
def test_textures_differ_in_the_detail_bands_alone(shape: str, side: int) -> None:
    """Compares the energy of the difference between textures of the same scenes, by band."""
    energy = np.zeros(4)
    for seed in range(10):
        one, other = (bands(draw(np.random.default_rng(seed), shape, texture, side), side) for texture in PERIOD)
        energy += np.square(one - other).sum((1, 2, 3))
    low, _, along_y, both = energy / energy.sum()
    assert low < 0.1
    assert along_y > 0.5  # stripes
    assert both > 0.1  # checkers, which resizing weakens along both axes


def test_scenes_differ_in_the_low_band() -> None:
    """The opposite: two scenes of one class differ almost only in the band where two textures of a scene do not."""
    energy = np.zeros(4)
    rng = np.random.default_rng(0)
    for _ in range(10):
        one, other = (bands(draw(rng, "heart", "striped"), SIDE)[:, :36, :36] for _ in range(2))
        energy += np.square(one - other).sum((1, 2, 3))
    assert energy[0] / energy.sum() > 0.9


def test_a_shape_keeps_its_brightness_in_every_texture() -> None:
    """Textures have mean 0: otherwise the brightness of the low band would distinguish them."""
    for seed in range(10):
        one, other = (draw(np.random.default_rng(seed), "disc", texture).mean((0, 1)) for texture in PERIOD)
        np.testing.assert_allclose(one, other, atol=0.15)


def test_shapes_are_inside_the_image_and_darker() -> None:
    for name in CLASSES:
        shape, texture = name.split("_")
        images = [draw(np.random.default_rng(seed), shape, texture).mean(2) for seed in range(20)]
        border = np.mean([np.concatenate([p[0], p[-1], p[:, 0], p[:, -1]]).mean() for p in images])
        darkest = np.mean([np.percentile(p, 5) for p in images])
        assert darkest < border - 20
