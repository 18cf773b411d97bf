"""Augmentations of training images: their effect, what they must not change, and exact resuming of a stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from nvidia.dali.auto_aug import augmentations as operations
from nvidia.dali.auto_aug.core import Policy
from PIL import Image

from bandsplit.config import loading, schema
from bandsplit.data import augmentation, pipeline
from bandsplit.data.images import ImageFiles
from bandsplit.data.loader import TrainingLoader, ValidationLoader
from bandsplit.data.pipeline import Shard
from bandsplit.errors import UserError

Array = npt.NDArray[Any]

RAND, AUTO, TRIVIAL = (f"augment.auto.type={name}" for name in ("rand_augment", "auto_augment", "trivial_augment"))
COLOR = ["augment.color.brightness=[0.6, 1.4]", "augment.color.saturation=[0.6, 1.4]", "augment.color.hue=144"]
PCA = ["augment.pca_noise=0.1"]
ERASING = ["augment.erasing.probability=0.5"]
EVERY = {
    "color": COLOR,
    "pca_noise": PCA,
    "erasing": ERASING,
    "rand_augment": [RAND, "augment.auto.m=7", "augment.auto.std=0.5"],
    "auto_augment": [AUTO],
    "trivial_augment": [TRIVIAL],
    "all": [RAND, *COLOR, *PCA, *ERASING],
}
SLOW = ("rand_augment", "auto_augment", "all")  # dozens of operations
each = pytest.mark.parametrize(
    "keys", [pytest.param(keys, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, keys in EVERY.items()]
)


def share(batch_size: int = 6) -> Shard:
    return Shard(0, 1, batch_size, threads=1, device_id=None)


@pytest.fixture(scope="module", autouse=True)
def operator() -> None:
    """Loads the plugin before any pipeline exists: DALI has crashed when pipelines were freed while it loaded one."""
    pipeline.has_operator("cpu")


@pytest.fixture
def numbered(tmp_path: Path) -> ImageFiles:
    """23 images whose label is their own number."""
    files = []
    for n in range(23):
        path = tmp_path / f"{n:02d}.jpg"
        noise = np.random.default_rng(n).integers(0, 256, (5, 4, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((80, 100)).save(path, quality=90)
        files.append(str(path))
    return ImageFiles(files, list(range(23)), ["all"])


@pytest.fixture
def flat(config_file: Path, tmp_path: Path) -> Callable[..., Array]:
    """Augments images of one color: (images, height, width, channels)."""

    def make(color: tuple[int, int, int], keys: list[str], batches: int = 4, size: int = 8) -> Array:
        path = tmp_path / "flat.png"
        Image.new("RGB", (32, 32), color).save(path)
        sizes = [f"data.image_size={size}", f"data.resize_size={size}"]
        config = loading.load(config_file, [*sizes, *keys])
        pipe = pipeline.training(config, ImageFiles([str(path)] * 256, [0] * 256, ["all"]), share(256))
        return np.concatenate([outputs(pipe)[0] for _ in range(batches)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "has_operator", lambda device: False)  # outputs are the images before the split
        yield make


def outputs(pipe: Any) -> list[Array]:
    return [np.stack([np.array(sample) for sample in output]) for output in pipe.run()]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training pipelines output images, mirror, labels, and the images before augmentation."""
    crops: list[Any] = []
    augmented = augmentation.augmented

    def remembering(images: Any, config: schema.RunConfig, stream: int) -> Any:
        crops.append(images)
        return augmented(images, config, stream)

    def graph(share: Shard, config: schema.RunConfig, images: ImageFiles, _: object) -> Any:
        return *pipeline.augmented(share, config, images), crops[-1]

    monkeypatch.setattr(augmentation, "augmented", remembering)
    monkeypatch.setattr(pipeline, "_training_graph", graph)


@each
@pytest.mark.usefixtures("watched")
def test_order_crops_and_flips_do_not_depend_on_augmentations(
    config_file: Path, numbered: ImageFiles, keys: list[str]
) -> None:
    plain = pipeline.training(loading.load(config_file), numbered, share())
    other = pipeline.training(loading.load(config_file, keys), numbered, share())
    changed = []
    for _ in range(8):  # two passes
        (images, *rest), (augmented, *same) = outputs(plain), outputs(other)
        assert all(np.array_equal(a, b) for a, b in zip(rest, same, strict=True))
        assert np.array_equal(images, rest[-1])
        assert augmented.shape == (6, 32, 32, 3)
        assert augmented.dtype == np.uint8
        changed += (images != augmented).any(axis=(1, 2, 3)).tolist()
    assert np.mean(changed) > 0.25


@each
def test_a_stream_with_augmentations_goes_on_exactly(config_file: Path, numbered: ImageFiles, keys: list[str]) -> None:
    config = loading.load(config_file, keys)
    loader = TrainingLoader(config, numbered, [share()])
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    states = loader.states()
    rest = [next(batches) for _ in range(5)]
    again = iter(TrainingLoader(config, numbered, [share()], states))
    for expected in rest:
        batch = next(again)
        assert torch.equal(batch.labels, expected.labels)
        assert [tuple(x.shape) for x in batch.inputs] == [(6, 3, 16, 16)] * 4
        assert all(torch.equal(a, b) for a, b in zip(batch.inputs, expected.inputs, strict=True))


@pytest.mark.parametrize("keys", [EVERY["all"], [AUTO], [TRIVIAL]], ids=["all", "auto_augment", "trivial_augment"])
def test_augmentations_are_a_function_of_the_seed(config_file: Path, numbered: ImageFiles, keys: list[str]) -> None:
    def stream(seed: int) -> list[torch.Tensor]:
        batches = iter(TrainingLoader(loading.load(config_file, [*keys, f"seed={seed}"]), numbered, [share()]))
        return [next(batches).inputs[0] for _ in range(3)]

    first, again, other = stream(0), stream(0), stream(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("keys", [EVERY["all"], [AUTO], [TRIVIAL]], ids=["all", "auto_augment", "trivial_augment"])
def test_validation_is_never_augmented(config_file: Path, numbered: ImageFiles, keys: list[str]) -> None:
    plain, other = (ValidationLoader(loading.load(config_file, k), numbered, share()) for k in ([], keys))
    for a, b in zip(plain, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.inputs, b.inputs, strict=True))


@pytest.mark.parametrize(
    ("key", "factor"),
    [
        ("brightness", lambda out: out[:, 0] / np.array(160)),
        ("contrast", lambda out: (out[:, 0] - 128) / (160 - 128)),  # around 128, not around the image's mean
        ("saturation", lambda out: (out[:, 0] - out[:, 1]) / (160 - 100)),
    ],
)
def test_factors_on_colors_fill_their_range(
    flat: Callable[..., Array], key: str, factor: Callable[[Array], Array]
) -> None:
    out = flat((160, 100, 80), [f"augment.color.{key}=[0.6, 1.3]"])
    assert (out == out[:, :1, :1]).all()  # one factor an image
    found = factor(out[:, 0, 0].astype(float))
    assert 0.58 < found.min() < 0.63
    assert 1.27 < found.max() < 1.33
    assert found.mean() == pytest.approx(0.95, abs=0.04)  # 6 σ of the mean of 1024 uniform numbers


YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])


def test_hues_turn_both_ways_up_to_their_angle(flat: Callable[..., Array]) -> None:
    color = (160, 100, 80)
    out = flat(color, ["augment.color.hue=40"])[:, 0, 0]
    _, *before = YIQ @ color
    luma, *after = YIQ @ out.T
    angles = np.rad2deg(np.angle((after[0] + 1j * after[1]) / complex(*before)))
    assert -43 < angles.min() < -36
    assert 36 < angles.max() < 43
    assert abs(angles.mean()) < 5
    assert np.abs(luma - YIQ[0] @ color).max() < 1.5
    assert np.abs(np.abs(after[0] + 1j * after[1]) / abs(complex(*before)) - 1).max() < 0.06


def test_lighting_noise_has_the_spread_of_imagenets_colors(flat: Callable[..., Array]) -> None:
    out = flat((128, 128, 128), ["augment.pca_noise=0.1"], batches=16)
    assert (out == out[:, :1, :1]).all()  # one triple an image
    noise = out[:, 0, 0].astype(float) - 128
    components = 0.1 * np.array(augmentation.EIGENVECTORS) * augmentation.EIGENVALUES
    expected = components @ components.T + np.eye(3) / 12  # values are rounded
    deviation = np.sqrt(np.diag(expected))
    assert (np.abs(noise.mean(0)) < 5 * deviation / np.sqrt(len(noise))).all()
    assert (
        np.abs(np.cov(noise.T) / np.outer(deviation, deviation) - expected / np.outer(deviation, deviation)).max() < 0.1
    )
    assert np.linalg.eigvalsh(np.cov(noise.T) - np.eye(3) / 12)[-1] == pytest.approx(5.546**2, rel=0.1)


@pytest.mark.parametrize("value", [0, 255])
def test_lighting_noise_is_clamped(flat: Callable[..., Array], value: int) -> None:
    out = flat((value,) * 3, ["augment.pca_noise=0.1"])
    assert np.abs(out.astype(int) - value).max() < 25
    assert 0.3 < (out[:, 0, 0, 0] == value).mean() < 0.7


FILL = (124, 116, 104)


def test_erased_rectangles_have_the_shares_that_the_config_allows(flat: Callable[..., Array]) -> None:
    keys = ["probability=0.3", "scale=[0.1, 0.4]", "ratio=[0.5, 3.0]"]
    out = flat((10, 200, 30), [f"augment.erasing.{key}" for key in keys], batches=6, size=100)
    gone = (out != (10, 200, 30)).any(-1)
    assert (out[gone] == FILL).all()
    hit = gone.any(axis=(1, 2))
    assert hit.mean() == pytest.approx(0.3, abs=5 * np.sqrt(0.3 * 0.7 / len(hit)))
    area = gone[hit].mean(axis=(1, 2))
    assert 0.09 < area.min() < 0.13
    assert 0.37 < area.max() < 0.41
    assert area.mean() == pytest.approx(0.25, abs=0.03)
    height, width = gone[hit].any(2).sum(1), gone[hit].any(1).sum(1)
    assert (height * width == gone[hit].sum(axis=(1, 2))).all()  # rectangles
    assert 0.48 < (height / width).min() < 0.6
    assert 2.3 < (height / width).max() < 3.1
    assert (gone[hit].mean(0) > 0).mean() > 0.99  # anywhere but in some corner
    for edge in (gone[:, 0], gone[:, -1], gone[:, :, 0], gone[:, :, -1]):
        assert 0.005 < edge[hit].any(1).mean() < 0.1  # 1 of so many places


def test_where_a_rectangle_falls_does_not_depend_on_other_augmentations(flat: Callable[..., Array]) -> None:
    alone, other = (flat((0, 255, 0), [*ERASING, *keys], batches=1) for keys in ([], PCA))
    assert not np.array_equal(alone, other)
    assert 0.3 < (alone == FILL).all(-1).any(axis=(1, 2)).mean() < 0.7
    assert np.array_equal((alone == FILL).all(-1), (other == FILL).all(-1))


BRIGHTNESS = operations.brightness.augmentation((0, 0.9), True, operations.shift_enhance_range)


def test_strengths_of_rand_augment_are_normal(flat: Callable[..., Array], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augmentation, "get_rand_augment_suite", lambda use_shape: [BRIGHTNESS])
    keys = [RAND, "augment.auto.n=1", "augment.auto.m=7"]
    for std in (0.0, 0.5, 3.0):
        change = flat((128,) * 3, [*keys, f"augment.auto.std={std}"])[:, 0, 0, 0] / 128 - 1
        strength = np.abs(change[change < 0]) / 0.09  # brightening is clamped to white
        assert len(strength) / len(change) == pytest.approx(0.5, abs=0.1)
        assert strength.max() < 10.1
        if std < 1:
            assert strength.mean() == pytest.approx(7, abs=0.15)
            assert strength.std() == pytest.approx(std, abs=0.1)
        else:
            assert 0.05 < (strength > 9.95).mean() < 0.3  # 16 % are clamped


def test_rand_augment_applies_n_operations(flat: Callable[..., Array], monkeypatch: pytest.MonkeyPatch) -> None:
    half = operations.brightness.augmentation((0, 0.5), False, lambda magnitude: 1 - magnitude)
    monkeypatch.setattr(augmentation, "get_rand_augment_suite", lambda use_shape: [half, operations.identity])
    out = flat((160,) * 3, [RAND, "augment.auto.n=2", "augment.auto.m=10"])[:, 0, 0, 0]
    shares = [(out == value).mean() for value in (160, 80, 40)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.08)


def test_operations_are_left_out_by_chance(flat: Callable[..., Array], monkeypatch: pytest.MonkeyPatch) -> None:
    half = operations.brightness.augmentation((0, 0.5), False, lambda magnitude: 1 - magnitude)
    monkeypatch.setattr(augmentation, "get_rand_augment_suite", lambda use_shape: [half])
    out = flat((160,) * 3, [RAND, "augment.auto.n=2", "augment.auto.m=10", "augment.auto.probability=0.3"])[:, 0, 0, 0]
    shares = [(out == value).mean() for value in (160, 80, 40)]
    assert shares == pytest.approx([0.49, 0.42, 0.09], abs=0.06)


TIMMS = {  # timm's names, each with the allowed mean difference of an image, of 255
    "AutoContrast": 1, "Equalize": 2, "Invert": 0, "Rotate": 2, "PosterizeIncreasing": 0, "SolarizeIncreasing": 0,
    "SolarizeAdd": 0, "ColorIncreasing": 2, "ContrastIncreasing": 1, "BrightnessIncreasing": 1,
    "SharpnessIncreasing": 0.7, "ShearX": 2, "ShearY": 2, "TranslateXRel": 1, "TranslateYRel": 1,
}  # fmt: skip


@pytest.mark.parametrize(("n", "name"), list(enumerate(TIMMS)), ids=TIMMS)
@pytest.mark.parametrize("strength", [7, *(pytest.param(m, marks=pytest.mark.long) for m in (3, 9))])
def test_timms_operations_match_timm(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int, name: str, strength: int
) -> None:
    """The same image with DALI and with timm's own code and Pillow, with both signs if the operation has a sign."""
    timms = pytest.importorskip("timm.data.auto_augment")
    assert list(TIMMS) == timms._RAND_INCREASING_TRANSFORMS
    noise = np.random.default_rng(0).integers(40, 220, (20, 20, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC)
    image.save(tmp_path / "image.png")
    whole = ["data.image_size=64", "data.resize_size=64", "data.scale=[1,1]", "data.ratio=[1,1]"]
    keys = [*whole, "data.hflip=0", RAND, "augment.auto.operations=timm", "augment.auto.n=1"]
    config = loading.load(config_file, [*keys, f"augment.auto.m={strength}"])
    operation = augmentation._timms_suite()[n]
    monkeypatch.setattr(augmentation, "_timms_suite", lambda: [operation])
    monkeypatch.setattr(pipeline, "has_operator", lambda device: False)
    pipe = pipeline.training(config, ImageFiles([str(tmp_path / "image.png")] * 16, [0] * 16, ["all"]), share(16))
    ours = np.unique(outputs(pipe)[0], axis=0).astype(float)
    theirs = []
    for sign in (0.9, 0.1):
        monkeypatch.setattr(timms.random, "random", lambda sign=sign: sign)
        hparams = {"img_mean": (128,) * 3, "interpolation": Image.Resampling.BILINEAR}
        theirs.append(
            np.array(timms.AugmentOp(name, prob=1.0, magnitude=strength, hparams=hparams)(image), dtype=float)
        )
    theirs = np.unique(theirs, axis=0)
    assert len(ours) == len(theirs)
    off = np.abs(ours[:, None] - theirs[None]).mean(axis=(2, 3, 4))
    assert (off.min(axis=0) <= TIMMS[name]).all()
    assert (off.min(axis=1) <= TIMMS[name]).all()


def test_trivial_augment_draws_every_strength(flat: Callable[..., Array], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augmentation, "get_trivial_augment_wide_suite", lambda: [BRIGHTNESS])
    out = flat((100,) * 3, [TRIVIAL])[:, 0, 0, 0]
    expected = {round(100 * (1 + sign * 0.03 * level)) for level in range(31) for sign in (1, -1)}
    assert set(out.tolist()) == expected


def test_auto_augment_applies_pairs_in_their_order(flat: Callable[..., Array], monkeypatch: pytest.MonkeyPatch) -> None:
    brightness = operations.brightness.augmentation((0, 2), False, None)  # of 11 levels level 5 is no change
    pairs = [
        [(brightness, 0.5, 10)],
        [(operations.invert, 1.0, None), (brightness, 1.0, 4)],
        [(brightness, 1.0, 1), (operations.invert, 1.0, None)],
    ]
    monkeypatch.setattr(augmentation, "get_image_net_policy", lambda **_: Policy("three", 11, pairs))
    out = flat((100,) * 3, [AUTO])[:, 0, 0, 0]
    shares = [(out == value).mean() for value in (100, 200, 124, 235)]
    assert shares == pytest.approx([1 / 6, 1 / 6, 1 / 3, 1 / 3], abs=0.08)
    assert sum(shares) == 1


def test_the_operations_are_drawn_evenly_from_dalis_suites(
    flat: Callable[..., Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    """14 operations of which one is replaced by one that paints the image black."""
    black = operations.brightness.augmentation((0, 0), False, None)
    for suite, key in (("get_rand_augment_suite", RAND), ("get_trivial_augment_wide_suite", TRIVIAL)):
        theirs = getattr(augmentation, suite)
        monkeypatch.setattr(augmentation, suite, lambda *args, s=theirs, **kw: [*s(*args, **kw)[:-1], black])
        out = flat((90, 100, 110), [key, *(["augment.auto.n=1"] if key == RAND else [])])
        assert (out == 0).all(axis=(1, 2, 3)).mean() == pytest.approx(1 / 14, abs=0.04)


def test_a_config_with_augmentations_survives_being_written(config_file: Path) -> None:
    for keys in EVERY.values():
        config = loading.load(config_file, keys)
        assert config.augment != schema.Augment()
        assert schema.RunConfig.model_validate(config.model_dump(mode="json", exclude_none=True)) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("augment.color.brightness=[1.2, 0.3]", r"brightness: \[1.2, 0.3\] given; allowed: 0 <= smallest <= largest"),
        ("augment.color.contrast=[-1, 1]", r"contrast: \[-1.0, 1.0\] given; allowed: 0 <= smallest <= largest"),
        ("augment.color.saturation=[0, inf]", r"saturation: \[0, inf\] given; inf should be a finite number"),
        ("augment.color.brightness=[1]", r"brightness: \[1\] given; expected 2 numbers"),
        ("augment.color.hue=200", "augment.color.hue: 200 given; it should be less than or equal to 180"),
        ("augment.pca_noise=-0.1", "augment.pca_noise: -0.1 given; it should be greater than or equal to 0"),
        ("augment.erasing.scale=[0, 0.5]", r"scale: \[0.0, 0.5\] given; allowed: 0 < smallest <= largest <= 1"),
        ("augment.erasing.ratio=[2, 1]", r"ratio: \[2.0, 1.0\] given; allowed: 0 < smallest <= largest"),
        ("augment.erasing.ratio=[3, 4]", r"ratio: \[3.0, 4.0\] given; allowed: one that fits into the image"),
        ("augment.erasing.probability=2", "probability: 2 given; it should be less than or equal to 1"),
        (
            "augment.auto.m=3",
            "augment.auto.type: None given; allowed: 'rand_augment', 'auto_augment', 'trivial_augment'",
        ),
        ("augment.auto.type=rand", "augment.auto.type: 'rand' given; allowed: 'rand_augment'"),
        ("augment.auto={type='rand_augment', m=11}", "augment.auto.m: 11 given; it should be less than or equal to 10"),
        ("augment.auto={type='auto_augment', m=3}", "augment.auto.m: unknown key"),
        ("augment.colour.hue=3", "augment.colour: unknown key; did you mean augment.color?"),
    ],
)
def test_mistakes_are_refused_with_one_message(config_file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        loading.load(config_file, [override])
    assert "\n" not in str(caught.value)
