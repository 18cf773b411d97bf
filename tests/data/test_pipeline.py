"""From JPEG files to batches: order, shards, flips, crops, and equal results with and without the operator."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import fn as dali_fn
from PIL import Image
from torchvision.transforms import v2

from bandsplit.config import loading, schema
from bandsplit.data import loader, pipeline
from bandsplit.data.crops import CENTER, FLIP, TEN, Crop
from bandsplit.data.folders import SUFFIXES
from bandsplit.data.images import ImageFiles
from bandsplit.data.loader import TrainingLoader, ValidationLoader
from bandsplit.data.pipeline import Shard
from bandsplit.data.recovery import UndecodableImage
from bandsplit.distributed.ranks import Ranks
from bandsplit.spectral import transforms
from tests.conftest import REPOSITORY, image_files


def share(rank: int = 0, world_size: int = 1, batch_size: int = 6) -> Shard:
    return Shard(rank, world_size, batch_size, threads=1, device_id=None)


@pytest.fixture
def config(config_file: Path) -> schema.RunConfig:
    return loading.load(config_file)


@pytest.fixture
def numbered(tmp_path: Path) -> ImageFiles:
    """23 images whose label is their own number."""
    files = []
    for n in range(23):
        path = tmp_path / f"{n:02d}.jpg"
        noise = np.random.default_rng(n).integers(0, 256, (50, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((80, 100)).save(path, quality=90)
        files.append(str(path))
    return ImageFiles(files, list(range(23)), ["all"])


def labels(batches: TrainingLoader, count: int) -> list[int]:
    return torch.cat([next(batches).labels for _ in range(count)]).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_pass_sees_each_image_once_in_a_new_order(
    config: schema.RunConfig, numbered: ImageFiles, world_size: int
) -> None:
    shares = [share(rank, world_size, batch_size=1) for rank in range(world_size)]
    streams = [labels(TrainingLoader(config, numbered, [each]), 46) for each in shares]
    seen = [label for step in zip(*streams, strict=True) for label in step]
    passes = seen[:23], seen[23:46]
    assert [sorted(p) for p in passes] == [list(range(23))] * 2
    assert passes[0] != passes[1]
    assert passes[0] != sorted(passes[0])


def test_the_stream_is_a_function_of_the_seed(config_file: Path, numbered: ImageFiles) -> None:
    def stream(seed: int) -> list[torch.Tensor]:
        batches = TrainingLoader(loading.load(config_file, [f"seed={seed}"]), numbered, [share()])
        return [next(batches).inputs[0] for _ in range(5)]

    first, again, other = stream(0), stream(0), stream(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_stream_goes_on_exactly_from_its_state(config: schema.RunConfig, numbered: ImageFiles) -> None:
    batches = TrainingLoader(config, numbered, [share()])
    for _ in range(7):  # into the second pass
        next(batches)
    states = batches.states()
    rest = [next(batches) for _ in range(6)]
    again = TrainingLoader(config, numbered, [share()], states)
    for expected in rest:
        batch = next(again)
        assert torch.equal(batch.labels, expected.labels)
        assert all(torch.equal(a, b) for a, b in zip(batch.inputs, expected.inputs, strict=True))


def test_repeated_augmentation_shows_an_image_several_times_and_keeps_the_epoch(
    config_file: Path, numbered: ImageFiles
) -> None:
    """In batches of six, two images three times each, cropped anew, and a pass has as many steps as without."""
    plain, repeated = (loading.load(config_file, [f"augment.repeats={n}"]) for n in (1, 3))
    usual, batches = (TrainingLoader(config, numbered, [share()]) for config in (plain, repeated))
    for _ in range(8):
        read, seen = next(usual).labels.tolist(), next(batches)
        assert seen.labels.tolist() == [read[0], read[1]] * 3
        for first in (0, 1):
            crops = seen.inputs[0][first::2]
            assert not torch.equal(crops[0], crops[1])
            assert not torch.equal(crops[1], crops[2])


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
@pytest.mark.parametrize(("batch_size", "repeats"), [(6, 2), (6, 3), (8, 2), (8, 3), (7, 3), (9, 4), (10, 3), (13, 3)])
def test_no_image_is_mixed_with_its_own_copy(
    config_file: Path, numbered: ImageFiles, mix: str, batch_size: int, repeats: int
) -> None:
    """Also where `repeats` does not divide the batch, and across the end of it."""
    keys = ["data.classes=23", f"augment.repeats={repeats}", f"mix.{mix}=1.0"]
    batches = TrainingLoader(loading.load(config_file, keys), numbered, [share(batch_size=batch_size)])
    for _ in range(6):
        of_itself = next(batches).labels.max(dim=1).values  # 1 where both images of a pair have the same class
        assert (of_itself < 1).sum() in (0, batch_size)  # 0: a box of no size, the same for the whole batch


def test_validation_at_another_size(config_file: Path, numbered: ImageFiles) -> None:
    config = loading.load(config_file, ["data.val_image_size=40", "data.resize_size=48"])
    assert next(iter(ValidationLoader(config, numbered, share()))).inputs[0].shape == (6, 3, 20, 20)
    assert next(TrainingLoader(config, numbered, [share()])).inputs[0].shape == (6, 3, 16, 16)


def test_images_of_another_size_are_the_same_images(config_file: Path, numbered: ImageFiles) -> None:
    """Resizing between batches keeps order, crops and flips; the first size, restored, gives its own batches again."""
    config = loading.load(config_file, ["split.block=1"])
    steady, resized = (TrainingLoader(config, numbered, [share()]) for _ in range(2))
    for size in (32, 32, 16, 16, 16, 8, 32, 32):
        resized.resize(size)
        large, small = next(steady), next(resized)
        assert small.inputs[0].shape == (6, 3, size, size)
        assert torch.equal(small.labels, large.labels)
        averaged = torch.nn.functional.adaptive_avg_pool2d(large.inputs[0], size)
        same, mirrored = ((small.inputs[0] - other).abs().mean((1, 2, 3)) for other in (averaged, averaged.flip(3)))
        assert (same < mirrored / 2).all()  # DALI's own filter is not quite the mean
    assert torch.equal(small.inputs[0], large.inputs[0])


def test_one_rank_with_two_streams_sees_what_two_ranks_see(config: schema.RunConfig, numbered: ImageFiles) -> None:
    shares = [share(rank, 2, 4) for rank in range(2)]
    apart = [TrainingLoader(config, numbered, [each]) for each in shares]
    together = TrainingLoader(config, numbered, shares)
    for _ in range(7):
        for expected in map(next, apart):
            batch = next(together)
            assert torch.equal(batch.labels, expected.labels)
            assert all(torch.equal(a, b) for a, b in zip(batch.inputs, expected.inputs, strict=True))
    assert together.states() == [state for each in apart for state in each.states()]


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 6), (1, 23), (2, 5), (3, 8), (5, 2), (25, 4)])
def test_validation_sees_each_image_once_every_time(
    config: schema.RunConfig, numbered: ImageFiles, world_size: int, batch_size: int
) -> None:
    ranks = [ValidationLoader(config, numbered, share(rank, world_size, batch_size)) for rank in range(world_size)]
    for _ in range(2):
        seen = Counter(label for batches in ranks for batch in batches for label in batch.labels.tolist())
        del seen[-1]  # what fills batches up
        assert seen == Counter(range(23))
    assert len({len(list(batches)) for batches in ranks}) == 1
    assert all(len(batch) == batch_size for batches in ranks for batch in batches)


def test_inputs_are_channels_last_of_the_right_shape(config_file: Path, image_root: Path) -> None:
    config = loading.load(config_file, ["split.branches=[[0], [0, 1], [1, 2, 3]]"])
    batch = next(TrainingLoader(config, image_files(image_root / "train"), [share()]))
    assert [tuple(x.shape) for x in batch.inputs] == [(6, 3 * n, 16, 16) for n in (1, 2, 3)]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in batch.inputs)
    assert batch.labels.dtype == torch.int64


@pytest.mark.parametrize("branches", ['"each"', '"all"', "[[0], [2, 3]]"])
@pytest.mark.parametrize("transform", ["dct2d", "dct1d", "hadamard", "identity"])
def test_operator_and_plain_torch_give_the_same_batches(
    config_file: Path, numbered: ImageFiles, monkeypatch: pytest.MonkeyPatch, branches: str, transform: str
) -> None:
    config = loading.load(config_file, [f"split.branches={branches}", f"split.transform={transform}"])
    with_operator = TrainingLoader(config, numbered, [share()])
    expected = [next(with_operator) for _ in range(3)]
    monkeypatch.setattr(pipeline, "has_operator", lambda device: False)
    in_torch = TrainingLoader(config, numbered, [share()])
    for batch in expected:
        other = next(in_torch)
        assert torch.equal(batch.labels, other.labels)
        for a, b in zip(batch.inputs, other.inputs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("operator", [True, False])
@pytest.mark.parametrize(
    "mixing", [[], ["mix.mixup=0.5", "mix.cutmix=1.0", "data.classes=100"]], ids=["plain", "mixed"]
)
def test_branches_of_the_same_bands_share_their_input(
    config_file: Path, numbered: ImageFiles, monkeypatch: pytest.MonkeyPatch, operator: bool, mixing: list[str]
) -> None:
    if not operator:
        monkeypatch.setattr(pipeline, "has_operator", lambda device: False)
    repeated, once = (
        TrainingLoader(loading.load(config_file, [f"split.branches={branches}", *mixing]), numbered, [share()])
        for branches in ("[[0, 3], [1], [0, 3], [3, 0], [1]]", "[[0, 3], [1], [3, 0]]")
    )
    for _ in range(3):
        batch, expected = next(repeated), next(once)
        for x, k in zip(batch.inputs, (0, 1, 0, 2, 1), strict=True):
            assert torch.equal(x, expected.inputs[k])
        for inputs in (batch.inputs, batch.copied().inputs):
            assert [[x is y for y in inputs].index(True) for x in inputs] == [0, 1, 0, 3, 1]


_FILTERS = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC}


@pytest.mark.parametrize("interpolation", _FILTERS)
def test_validation_images_are_torchvisions(config_file: Path, numbered: ImageFiles, interpolation: str) -> None:
    """For sides that need no rounding: otherwise torchvision truncates and DALI rounds, a shift of half a pixel."""
    config = loading.load(config_file, ["split.block=1", f"data.interpolation={interpolation}"])
    ours = torch.cat([batch.inputs[0] for batch in ValidationLoader(config, numbered, share())])[: len(numbered)]
    transform = v2.Compose([v2.Resize(40, _FILTERS[interpolation]), v2.CenterCrop(32), v2.PILToTensor()])
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.data.mean, config.data.std))
    theirs = torch.stack([(transform(Image.open(file)).float() - mean) / std for file in numbered.paths])
    difference = (ours - theirs).abs() * std  # in pixel values; decoders and resamplers round differently
    assert difference.mean() < 0.3
    assert difference.max() < 4


@pytest.mark.parametrize("crop_only", [True, False])
@pytest.mark.parametrize(("interpolation", "other"), [("bilinear", "bicubic"), ("bicubic", "bilinear")])
def test_training_images_are_resized_like_pillows(
    config_file: Path, numbered: ImageFiles, interpolation: str, other: str, crop_only: bool
) -> None:
    """Crops of the whole image, which is 80 x 100 pixels, in pixel values; the two filters differ by 5 on average."""
    whole = ["data.scale=[1, 1]", "data.ratio=[0.8, 0.8]", "data.hflip=0", "split.block=1"]
    keys = [*whole, f"data.interpolation={interpolation}", f"data.decoder.crop_only={crop_only}".lower()]
    config = loading.load(config_file, keys)
    batch = next(TrainingLoader(config, numbered, [share()]))
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.data.mean, config.data.std))

    def distance(name: str) -> float:
        resize = v2.Compose([v2.Resize((32, 32), _FILTERS[name]), v2.PILToTensor()])
        pillows = [resize(Image.open(numbered.paths[label])) for label in batch.labels.tolist()]
        return (batch.inputs[0] * std + mean - torch.stack(pillows)).abs().mean().item()

    assert distance(interpolation) < 0.5
    assert distance(other) > 3


@pytest.mark.parametrize("crop_only", [True, False])
def test_bilinear_is_what_dali_does_by_default(
    config_file: Path, numbered: ImageFiles, monkeypatch: pytest.MonkeyPatch, crop_only: bool
) -> None:
    """Bit-equal to runs from before the key `data.interpolation`."""
    config = loading.load(config_file, [f"data.decoder.crop_only={crop_only}".lower()])

    def images() -> list[torch.Tensor]:
        batches = [next(TrainingLoader(config, numbered, [share()])), *ValidationLoader(config, numbered, share())]
        return [x for batch in batches for x in batch.inputs]

    ours = images()

    class Defaults:
        def __getattr__(self, name: str) -> Any:
            operator = getattr(dali_fn, name)
            if name not in ("resize", "random_resized_crop"):
                return operator
            return lambda *inputs, interp_type, **options: operator(*inputs, **options)

    monkeypatch.setattr(pipeline, "fn", Defaults())
    assert all(torch.equal(a, b) for a, b in zip(ours, images(), strict=True))


@pytest.mark.parametrize("crop_only", [True, False])
def test_crops_have_the_areas_that_the_config_allows(config_file: Path, tmp_path: Path, crop_only: bool) -> None:
    """Whether a crop is decoded alone or cut from the whole image: red rises with x and green with y."""
    shade = np.linspace(0, 255, 128, dtype=np.uint8)
    x, y = np.meshgrid(shade, shade)
    path = tmp_path / "ramps.jpg"
    Image.fromarray(np.stack([x, y, x // 2 + y // 2], axis=-1)).save(path, quality=95)
    found = ImageFiles([str(path)] * 64, [0] * 64, ["ramps"])
    area = "data.scale=[0.2, 0.4]"
    keys = [f"data.decoder.crop_only={crop_only}".lower(), area, "data.hflip=0", "split.block=1"]
    batch = next(TrainingLoader(loading.load(config_file, keys), found, [share(batch_size=64)])).inputs[0]
    red, green = (batch[:, c] * std for c, std in enumerate(schema.Data(name="d", root="r", classes=2).std[:2]))
    areas = (red[:, :, -1] - red[:, :, 0]).mean(1) / 255 * (green[:, -1] - green[:, 0]).mean(1) / 255
    # the outermost pixels of a crop have their centers half a pixel inside
    assert 0.17 < areas.min() < 0.24
    assert 0.33 < areas.max() < 0.41


def test_flips_and_crops_follow_the_config(config_file: Path, tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (64, 1))
    path = tmp_path / "ramp.png"
    Image.fromarray(np.stack([ramp] * 3, axis=-1)).save(path)
    found = ImageFiles([str(path)] * 8, [0] * 8, ["ramp"])
    slopes, spans = {}, {}
    for mirror in (0.0, 0.5, 1.0):
        keys = [f"data.hflip={mirror}", "split.block=1", "data.scale=[1.0, 1.0]", "data.ratio=[1, 1]"]
        batches = TrainingLoader(loading.load(config_file, keys), found, [share(batch_size=64)])
        x = next(batches).inputs[0][:, 0]
        slopes[mirror] = (x[:, :, -1] > x[:, :, 0]).all(dim=1).float().mean().item()
        spans[mirror] = (x.amax(dim=(1, 2)) - x.amin(dim=(1, 2))).min().item() * config_std
    assert slopes[0.0] == 1
    assert slopes[1.0] == 0
    assert 0.25 < slopes[0.5] < 0.75
    assert min(spans.values()) > 230  # the whole image: nothing cropped away


config_std = schema.Data(name="d", root="r", classes=2).std[0]


def test_bands_are_those_of_the_image(config_file: Path, numbered: ImageFiles) -> None:
    whole = next(iter(ValidationLoader(loading.load(config_file, ["split.block=1"]), numbered, share())))
    split = next(iter(ValidationLoader(loading.load(config_file, ["split.block=4"]), numbered, share())))
    matrix = transforms.transform_matrix("dct2d", 4)
    expected = transforms.split(whole.inputs[0], matrix, 4)
    torch.testing.assert_close(torch.stack(split.inputs), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        transforms.merge(torch.stack(split.inputs), matrix, 4), whole.inputs[0], atol=1e-5, rtol=1e-5
    )


def test_grayscale_cmyk_and_mixed_files_work_in_one_batch(config: schema.RunConfig, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 11), dtype=np.uint8)
    gray = Image.fromarray(noise).resize((70, 90))
    for n, (mode, options) in enumerate([("L", {}), ("CMYK", {}), ("RGB", {"progressive": True}), ("RGB", {})]):
        gray.convert(mode).save(tmp_path / f"{n}.jpg", quality=95, **options)
    found = ImageFiles(sorted(map(str, tmp_path.glob("*.jpg"))), [0, 1, 2, 3], ["all"])
    batches = list(ValidationLoader(config, found, share(batch_size=3)))
    assert [batch.labels.tolist() for batch in batches] == [[0, 1, 2], [3, -1, -1]]
    low = torch.cat([batch.inputs[0] for batch in batches])
    assert low.isfinite().all()
    torch.testing.assert_close(low[0], low[3], atol=0.1, rtol=0)  # the same image, once gray and once in color


NAMES = ["a b", "line\nbreak", " blank", "tab\t", "quote'\"", "back\\slash", "#", "gr\udcfcn", "grün", "5 7"]


def test_any_name_is_read(config: schema.RunConfig, tmp_path: Path) -> None:
    """Blanks, quotes, line breaks, bytes that are not UTF-8: in training and in validation, each with its label."""
    paths = [str(tmp_path / f"{name}.jpg") for name in NAMES]
    for n, path in enumerate(paths):
        with Path(path).open("wb") as file:
            Image.new("RGB", (48, 48), (25 * n, 25 * n, 25 * n)).save(file, "JPEG")
    found = ImageFiles(paths, list(range(len(paths))), ["all"])
    validated = torch.cat([batch.inputs[0] for batch in ValidationLoader(config, found, share(batch_size=3))])
    brightness = validated[: len(paths)].mean(dim=(1, 2, 3))  # the last batch is padded
    assert (brightness.diff() > 0).all()
    batches = TrainingLoader(config, found, [share(batch_size=3)])
    for batch in (next(batches) for _ in range(6)):
        torch.testing.assert_close(batch.inputs[0].mean(dim=(1, 2, 3)), brightness[batch.labels], atol=0.02, rtol=0)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_is_decoded(config: schema.RunConfig, tmp_path: Path, suffix: str) -> None:
    ramp = np.tile(np.arange(0, 240, 5, dtype=np.uint8)[:, None, None], (1, 48, 3))
    path = tmp_path / f"x{suffix.upper()}"
    image = Image.fromarray(ramp)
    (image.convert("1") if suffix == ".pbm" else image.convert("L") if suffix == ".pgm" else image).save(path)
    (batch,) = ValidationLoader(config, ImageFiles([str(path)], [0], ["all"]), share(batch_size=1))
    if suffix != ".pbm":  # black and white
        image.save(tmp_path / "x.bmp")
        (expected,) = ValidationLoader(config, ImageFiles([str(tmp_path / "x.bmp")], [0], ["all"]), share(batch_size=1))
        torch.testing.assert_close(batch.inputs[0], expected.inputs[0], atol=0.1, rtol=0)


@pytest.mark.parametrize("content", [b"", b"not an image", None], ids=["empty", "text", "truncated"])
def test_an_image_that_cannot_be_decoded_is_named(
    config_file: Path, numbered: ImageFiles, tmp_path: Path, content: bytes | None
) -> None:
    config = loading.load(config_file, ["data.on_bad=error"])
    bad = tmp_path / "07.jpg"
    bad.write_bytes(bad.read_bytes()[:300] if content is None else content)
    with pytest.raises(UndecodableImage, match=f"{bad}: this image cannot be read or decoded"):
        list(ValidationLoader(config, numbered, share()))
    batches = TrainingLoader(config, numbered, [share()])
    with pytest.raises(UndecodableImage, match=f"{bad}: this image cannot be read or decoded"):
        labels(batches, 10)


def test_real_photographs_and_their_awkward_relatives(config: schema.RunConfig, tmp_path: Path) -> None:
    folder = REPOSITORY.parent / "shared/data/awkward"
    if not folder.is_dir():
        pytest.skip("no folder of awkward JPEG files beside the repository")
    kinds = ("cmyk", "grayscale", "progressive", "exif", "odd", "misnamed", "mixed", "plain", "tiny")
    files = sorted(str(path) for path in folder.iterdir() if path.name.startswith(kinds))
    copies = [shutil.copy(file, tmp_path) for file in files]
    found = ImageFiles([str(copy) for copy in copies], list(range(len(copies))), ["all"])
    batches = list(ValidationLoader(config, found, share(batch_size=7)))
    assert torch.cat([batch.labels for batch in batches]).tolist()[: len(files)] == list(range(len(files)))
    assert all(x.isfinite().all() for batch in batches for x in batch.inputs)


def test_threads_are_shared_among_the_ranks_of_a_machine(
    config: schema.RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "available_cpus", lambda: 16)
    ranks = Ranks(5, 8, 1, 4, torch.device("cpu"))
    assert loader.shard_of(config, ranks, 2, False).threads == 1  # the config says so
    free = config.model_copy(update={"data": config.data.model_copy(update={"threads": None})})
    assert loader.shard_of(free, ranks, 2, False) == Shard(5, 8, 2, 4, None, False)


@pytest.mark.parametrize("crops", [CENTER, FLIP, TEN], ids=len)
def test_crops_are_torchvisions(config_file: Path, tmp_path: Path, crops: tuple[Crop, ...]) -> None:
    """Two batches of images that need no resizing, so that every pixel is compared.

    Margins are even: torchvision rounds half a pixel to even, DALI up.
    """
    rng, paths = np.random.default_rng(0), []
    for i, size in enumerate([(40, 56), (60, 40), (40, 40), (40, 48), (50, 40)]):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(paths[-1])
    config = loading.load(config_file, ["split.block=1"])
    loader = ValidationLoader(config, ImageFiles(paths, list(range(5)), ["all"]), share(batch_size=3), crops)
    batches = list(loader)
    assert len(batches) == 2 * len(crops)
    mean, std = (torch.tensor(each)[:, None, None] for each in (config.data.mean, config.data.std))
    for n, batch in enumerate(batches):
        first = n // len(crops) * 3
        assert batch.labels.tolist() == [i if i < 5 else -1 for i in range(first, first + 3)]
        for place, path in enumerate(paths[first : first + 3]):
            image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
            ten = v2.functional.ten_crop(image, [32, 32])
            expected = {CENTER: ten[4:5], FLIP: (ten[4], ten[9]), TEN: ten}[crops][n % len(crops)]
            assert torch.allclose(batch.inputs[0][place], (expected - mean) / std, atol=1e-5)
