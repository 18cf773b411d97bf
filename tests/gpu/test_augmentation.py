"""Augmentations on the GPU against those on the CPU, which tests/data/test_augmentation.py tests.

CPU and GPU decoders differ, so both backends get the same pixels here; random numbers are drawn on the CPU for both.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from nvidia.dali import fn, pipeline_def
from nvidia.dali.auto_aug import augmentations as operations
from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite
from PIL import Image

from bandsplit.config import loading, schema
from bandsplit.data import augmentation, pipeline
from bandsplit.data.images import ImageFiles, open_here
from bandsplit.data.loader import TrainingLoader
from bandsplit.data.order import repeated_indices
from bandsplit.data.pipeline import Shard

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

Array = npt.NDArray[Any]

RAND = ["augment.auto.type=rand_augment", "augment.auto.m=7", "augment.auto.std=0.5"]
COLOR = [
    f"augment.color.{key}" for key in ("brightness=[0.6, 1.4]", "contrast=[0.6, 1.4]", "saturation=[0, 2]", "hue=144")
]
PCA, ERASING = ["augment.pca_noise=0.1"], ["augment.erasing.probability=0.5"]
REST = [*COLOR, *PCA, *ERASING, "augment.repeats=3"]
AUTO = {"rand_augment": RAND} | {name: [f"augment.auto.type={name}"] for name in ("auto_augment", "trivial_augment")}
ALL = {f"all, {name}": [*keys, *REST] for name, keys in AUTO.items()}
EVERY = {"color": COLOR, "pca_noise": PCA, "erasing": ERASING, **AUTO, **ALL}


class Tolerance(NamedTuple):
    """Per image, on the scale 0 .. 255: mean absolute difference, and fraction of values that are off by `far`."""

    mean: float
    far: int
    share: float


EXACT = Tolerance(0, 0, 0)
# Summation order and the last bits of sub-pixel positions differ, so a value near a half may round to the next integer,
# at worst every second value.  A shift of half a pixel would give a mean of 3 here.
ONE = Tolerance(0.5, 2, 0.001)
# Further operations amplify this: those that stretch (auto_contrast, equalize, color) by a small factor everywhere,
# those with a threshold (posterize, solarize) by up to 255, at the few values next to it.  Tried on a CPU: changing one
# value in ten by one after each operation gives 0.9 and 0.034; half a pixel after each gives 5 and 0.2.
CHAIN = Tolerance(2, 8, 0.05)
TOLERANCES = {"erasing": EXACT, "color": ONE, "pca_noise": ONE, "trivial_augment": ONE}  # the others: CHAIN


@pytest.fixture(scope="module", autouse=True)
def operator() -> None:
    """Loads the plugin before any pipeline exists, as in tests/data/test_augmentation.py."""
    pipeline.has_operator("gpu")


@pytest.fixture
def jpegs(config_file: Path) -> ImageFiles:
    """23 files: a pass is not a whole number of batches."""
    train = open_here(loading.load(config_file).data)["train"]
    return train.taken(np.arange(0, len(train), 7))


@pytest.fixture
def flat(tmp_path: Path) -> ImageFiles:
    """13 files of one color each, whose label is their own number: the same pixels from any decoder and any crop."""
    files = [str(tmp_path / f"{n}.png") for n in range(13)]
    for file, color in zip(files, np.random.default_rng(1).integers(40, 216, (13, 3)).tolist(), strict=True):
        Image.new("RGB", (48, 40), tuple(color)).save(file)
    return ImageFiles(files, list(range(13)), ["all"])


def smooth() -> Array:
    """64 images of 64 x 64 pixels, each with a different range of values."""
    rng = np.random.default_rng(0)
    ranges = zip(rng.integers(0, 100, 64), rng.integers(150, 256, 64), strict=True)
    coarse = [Image.fromarray(rng.integers(*ends, (8, 8, 3), dtype=np.uint8)) for ends in ranges]
    return np.stack([np.array(image.resize((64, 64))) for image in coarse])


def share(device: str, batch_size: int = 6, half: bool = False) -> Shard:
    return Shard(0, 1, batch_size, threads=1, device_id=0 if device == "gpu" else None, half=half)


def run(graph: Callable[[], Any], config: schema.RunConfig, place: Shard, batches: int = 1) -> list[Array]:
    """All samples of all batches, for every output of a graph."""
    definition = pipeline_def(graph, enable_conditionals=augmentation.needs_conditionals(config.augment))
    pipe = definition(batch_size=place.batch_size, num_threads=1, device_id=place.device_id, seed=0)
    pipe.build()
    each = [[[np.array(sample) for sample in output.as_cpu()] for output in pipe.run()] for _ in range(batches)]
    return [np.concatenate(output) for output in zip(*each, strict=True)]


def augmented(device: str, config_file: Path, keys: list[str], stream: int = 0) -> Array:
    """The smooth images, augmented on "cpu" or "gpu"."""
    config = loading.load(config_file, [*keys, "data.image_size=64", "data.resize_size=64"])
    batch = list(smooth())

    def graph() -> Any:
        images = fn.external_source(lambda: batch, layout="HWC")
        return augmentation.augmented(images.gpu() if device == "gpu" else images, config, stream)

    return run(graph, config, share(device, len(batch)))[0]


def assert_same(expected: Array, got: Array, tolerance: Tolerance) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype == np.uint8
    difference = np.abs(got.astype(int) - expected).reshape(len(expected), -1)
    mean, far = difference.mean(1), (difference > tolerance.far).mean(1)
    assert mean.max() <= tolerance.mean, f"image {mean.argmax()}"
    assert far.max() <= tolerance.share, f"image {far.argmax()}"


@pytest.mark.parametrize("name", EVERY)
def test_the_same_images_as_on_the_cpu(config_file: Path, name: str) -> None:
    keys, tolerance = EVERY[name], TOLERANCES.get(name, CHAIN)
    gpu = augmented("gpu", config_file, keys)
    assert_same(augmented("cpu", config_file, keys), gpu, tolerance)
    with pytest.raises(AssertionError):  # the tolerance detects different random draws
        assert_same(augmented("cpu", config_file, keys, stream=1), gpu, tolerance)


@pytest.mark.parametrize(
    "operation",
    [*get_rand_augment_suite(use_shape=True), operations.invert, operations.solarize_add],
    ids=lambda operation: operation.name,
)
def test_each_operation_alone(config_file: Path, monkeypatch: pytest.MonkeyPatch, operation: Any) -> None:
    """With magnitudes 0 .. 10 and both signs; the last two are from AutoAugment."""
    monkeypatch.setattr(augmentation, "get_rand_augment_suite", lambda use_shape: [operation])
    keys = [*RAND, "augment.auto.n=1", "augment.auto.m=6", "augment.auto.std=4"]
    gpu = augmented("gpu", config_file, keys)
    assert_same(augmented("cpu", config_file, keys), gpu, ONE)
    changed = (gpu != smooth()).any(axis=(1, 2, 3)).mean()
    assert changed == 0 if operation is operations.identity else changed > 0.5


OFF = ["color.hue=0", "pca_noise=0", "erasing.probability=0", "repeats=1"]


@pytest.mark.parametrize("keys", [[], *([f"augment.{key}"] for key in OFF)], ids=["nothing", *OFF])
def test_what_is_switched_off_leaves_images_as_they_are(config_file: Path, keys: list[str]) -> None:
    assert np.array_equal(augmented("gpu", config_file, keys), smooth())


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_repeats_are_the_same_images_as_on_the_cpu(config_file: Path, flat: ImageFiles, repeats: int) -> None:
    """From files, over more than two passes; each repeat has its own random draws."""
    config = loading.load(config_file, [*REST, f"augment.repeats={repeats}"])

    def before_split(place: Shard) -> list[Array]:
        return run(lambda: pipeline.augmented(place, config, flat), config, place, batches=6)

    (cpu, _, labels), (gpu, _, same) = before_split(share("cpu")), before_split(share("gpu"))
    assert np.array_equal(labels, same)
    assert_same(cpu, gpu, CHAIN)
    slots = np.array(repeated_indices(6, repeats))
    for numbers, images in zip(labels.reshape(-1, 6), gpu.reshape(-1, 6, 32, 32, 3), strict=True):
        for slot in set(slots.tolist()):
            first, *others = np.flatnonzero(slots == slot)
            assert all(numbers[other] == numbers[first] for other in others)
            assert all((images[other] != images[first]).any() for other in others)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("keys", ALL.values(), ids=ALL.keys())
def test_bands_of_training_are_finite(config_file: Path, jpegs: ImageFiles, keys: list[str], half: bool) -> None:
    batches = iter(TrainingLoader(loading.load(config_file, keys), jpegs, [share("gpu", half=half)]))
    for _ in range(8):
        batch = next(batches)
        assert [tuple(x.shape) for x in batch.inputs] == [(6, 3, 16, 16)] * 4
        assert all(x.is_cuda and x.dtype == (torch.float16 if half else torch.float32) for x in batch.inputs)
        assert all(x.isfinite().all() and x.float().std() > 0 for x in batch.inputs)
        slots = torch.tensor(repeated_indices(6, 3))
        assert all(len(batch.labels.cpu()[slots == slot].unique()) == 1 for slot in slots.unique())


@pytest.mark.parametrize("keys", [[], *EVERY.values()], ids=["nothing", *EVERY])
def test_a_stream_with_augmentations_goes_on_exactly(config_file: Path, jpegs: ImageFiles, keys: list[str]) -> None:
    """Also without augmentations: if that fails, they are not the cause."""

    def copied(batches: Any) -> list[torch.Tensor]:  # DALI may reuse the memory
        batch = next(batches)
        return [tensor.clone() for tensor in (*batch.inputs, batch.labels)]

    config = loading.load(config_file, keys)
    loader = TrainingLoader(config, jpegs, [share("gpu")])
    for _ in range(5):
        copied(iter(loader))
    states = loader.states()
    rest = [copied(iter(loader)) for _ in range(5)]
    again = iter(TrainingLoader(config, jpegs, [share("gpu")], states))
    for expected in rest:
        assert all(torch.equal(a, b) for a, b in zip(copied(again), expected, strict=True))
