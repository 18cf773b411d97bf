"""The band store: what is packed, verified, and read back, beside the images and an independent transform."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from scipy.fft import dctn

from bandsplit.config import loading, schema
from bandsplit.data import deviations, holdout, source
from bandsplit.data.crops import CENTER, FLIP, TEN
from bandsplit.data.images import ImageFiles, open_here
from bandsplit.data.loader import TrainingLoader, ValidationLoader
from bandsplit.data.pipeline import Shard
from bandsplit.data.store import bands, memory, packing, quantization
from bandsplit.data.store import manifest as stored
from bandsplit.data.store.manifest import BandManifest, StoredImages
from bandsplit.data.store.packing import Folder
from bandsplit.data.store.reader import BandLoader, BandReader, BandValidationLoader
from bandsplit.errors import UserError
from bandsplit.evaluation.joined import Joined
from bandsplit.evaluation.joined import _sigma as joined_sigma
from bandsplit.paths import temporary
from bandsplit.spectral import transforms
from bandsplit.spectral.view import View
from tests.conftest import DATA_TOML, REPOSITORY, TRAIN_PER_CLASS, TRAIN_TOML, VAL_PER_CLASS, Done, Launch, Shared, run
from tests.training.tiny import ALONE

Packed = Callable[..., Path]

TRAIN, VAL = 10 * TRAIN_PER_CLASS, 10 * VAL_PER_CLASS


def pack(config: schema.RunConfig, to: Path, dtype: bands.Dtype = "float16", workers: int = 0) -> BandManifest:
    return bands.pack(config, open_here(config.data), Path(config.data.root), to, dtype, None, workers, chunk_images=64)


@pytest.fixture(scope="session")
def packed(image_root: Path, shared: Shared) -> Packed:
    """Stores of the demo's images at 40 x 40 and 32 x 32, of a type and a transform; not to be changed."""

    def make(dtype: bands.Dtype = "float16", *keys: str) -> Path:
        def write(to: Path) -> None:
            configs = to.with_name(f"{to.name}.configs")
            configs.mkdir()
            (configs / "data.toml").write_text(DATA_TOML.format(root=image_root))
            (configs / "tiny.toml").write_text(TRAIN_TOML)
            pack(loading.load(configs / "tiny.toml", keys), to, dtype)

        return shared.once("-".join(["stores/store", dtype, *keys]), write)

    return make


def from_store(config_file: Path, root: Path, *keys: str) -> schema.RunConfig:
    return loading.load(config_file, ["data.kind=bands", f"data.root={root}", *keys])


def parts_of(config: schema.RunConfig) -> tuple[StoredImages, StoredImages]:
    stored_parts = source.open_store(config, ("train", "val"))
    return stored_parts["train"], stored_parts["val"]


def files_in(config: schema.RunConfig, part: str) -> ImageFiles:
    return open_here(config.data)[part]


def share(rank: int = 0, world_size: int = 1, batch_size: int = 12) -> Shard:
    return Shard(rank, world_size, batch_size, threads=1, device_id=None)


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# What is packed -------------------------------------------------------------------------------------------------------


def test_stored_bands_are_scipys_transform_of_the_validated_images(config_file: Path, packed: Packed) -> None:
    root = packed()
    _, val = parts_of(from_store(config_file, root))
    whole = loading.load(config_file, ["split.block=1"])
    images = torch.cat([b.inputs[0][b.labels >= 0] for b in ValidationLoader(whole, files_in(whole, "val"), share())])
    blocks = rearrange(images.double().numpy(), "b c (h r) (w s) -> b h w c r s", r=2, s=2)
    expected = rearrange(dctn(blocks, axes=(-2, -1), norm="ortho"), "b h w c u v -> (u v) b h w c")
    for k in range(4):
        ours = np.concatenate([np.load(path) for path in val.shards(k)])
        assert ours.dtype == np.float16
        assert ours.shape == (VAL, 16, 16, 3)
        # half a unit in the last place of float16, and the rounding of the operator's float32
        np.testing.assert_allclose(ours.astype(np.float64), expected[k], rtol=2**-11 * 1.01, atol=2e-6)


def test_what_the_manifest_says(config_file: Path, packed: Packed, image_root: Path) -> None:
    root = packed()
    train, val = parts_of(from_store(config_file, root))
    files = open_here(loading.load(config_file).data).values()
    assert [len(train), len(val)] == [TRAIN, VAL]
    assert [train.about.side, val.about.side] == [40, 32]
    assert train.about.shards == (64, 64, 32)
    for part, images in zip((train, val), files, strict=True):
        assert part.labels.tolist() == list(images.labels)
        assert part.classes == images.classes
        names = json.loads((root / f"names/{part.part}.json").read_text())
        assert [str(image_root / part.part / name) for name in names] == list(images.paths)
        assert part.name(7) == images.name(7)
    assert str(image_root) not in (root / "manifest.json").read_text() + (root / "plan.json").read_text()


@pytest.mark.parametrize("keys", [(), ("split.transform=dct1d", "split.norm=none"), ("split.block=4",)])
def test_eight_bits_are_as_exact_as_the_manifest_says(config_file: Path, packed: Packed, keys: tuple[str, ...]) -> None:
    exact, coarse = (parts_of(from_store(config_file, packed(dtype, *keys), *keys)) for dtype in ("float16", "uint8"))
    manifest = coarse[0].manifest
    for k, about in manifest.bands.items():
        values, stored_values = (
            [np.concatenate([np.load(path).reshape(-1, 3) for path in part.shards(k)]) for part in parts]
            for parts in (exact, coarse)
        )
        expected = np.concatenate(values).astype(np.float64)
        error = np.concatenate(stored_values) * np.array(about.scale) + np.array(about.offset) - expected
        rmse = np.sqrt((error**2).mean(0))
        np.testing.assert_allclose(about.rmse, rmse, rtol=0.05)
        np.testing.assert_allclose(about.deviation, expected.std(0), rtol=1e-2)
        config = from_store(config_file, coarse[0].root, *keys)
        split, data = config.split, config.data
        matrix = transforms.transform_matrix(split.transform, split.block, split.norm)
        low, high = quantization.bounds(matrix, data.mean, data.std)
        assert (20 * np.log10((high[k] - low[k]) / rmse)).min() > 45
        assert about.psnr == pytest.approx((20 * np.log10((high[k] - low[k]) / rmse)).min(), abs=0.5)
        assert about.clipped < 1e-3


def test_the_bounds_of_a_band_are_reached_and_never_passed() -> None:
    matrix = transforms.transform_matrix("dct1d", 2)
    mean, std = (120.0, 110.0, 100.0), (50.0, 60.0, 70.0)
    low, high = quantization.bounds(matrix, mean, std)
    corners = np.array(np.meshgrid(*[[0.0, 255.0]] * 4)).reshape(4, -1)  # every block of black and white pixels
    for color in range(3):
        values = matrix @ ((corners - mean[color]) / std[color])
        np.testing.assert_allclose(values.min(1), low[:, color])
        np.testing.assert_allclose(values.max(1), high[:, color])


def test_the_range_of_eight_bits_has_the_least_error() -> None:
    values = np.random.default_rng(0).laplace(0, 0.1, 200_000).clip(-8, 8)
    counts = np.histogram(values, quantization.BINS, (-8, 8))[0]

    def error(low: float, high: float) -> float:
        quantizer = quantization.Quantizer.over(np.array([low] * 3), np.array([high] * 3))
        three = np.repeat(values[:, None], 3, axis=1).astype(np.float32)[:, None]
        return float(((quantizer.values(quantizer.stored(three)[0]) - three) ** 2).mean())

    chosen = quantization.best_range(counts, -8.0, 8.0)
    assert error(*chosen) <= min(error(-8, 8), error(values.min(), values.max())) * 1.001
    assert error(*chosen) < error(-8, 8) / 20


@pytest.mark.long  # also test_a_killed_pack_continues, on two processes
def test_two_packs_are_identical_also_on_several_processes(config_file: Path, packed: Packed, tmp_path: Path) -> None:
    pack(loading.load(config_file), tmp_path / "again", "uint8", workers=2)
    assert files_of(tmp_path / "again") == files_of(packed("uint8"))


def test_only_the_bands_of_a_config_are_packed(config_file: Path, tmp_path: Path) -> None:
    config = loading.load(config_file, ["split.branches=[[0], [0, 3]]"])
    assert sorted(pack(config, tmp_path / "some").bands) == [0, 3]
    assert sorted(path.name for path in (tmp_path / "some").glob("band_*")) == ["band_00", "band_03"]
    identity = loading.load(config_file, ["split.branches=[[0]]", "split.transform=identity"])
    assert sorted(pack(identity, tmp_path / "flips").bands) == [0, 1]  # flipped, pixel 0 comes from pixel 1


def test_an_interrupted_pack_continues(
    config_file: Path, packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it was interrupted within a chunk: what has no record is made again."""
    begun: list[str] = []
    pack_chunk = bands._pack_chunk

    def interrupted(*arguments: Any) -> Any:
        begun.append(arguments[-1].name)
        record = pack_chunk(*arguments)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return record

    monkeypatch.setattr(bands, "_pack_chunk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(loading.load(config_file), tmp_path / "store")
    with pytest.raises(UserError, match="an unfinished pack: run the same `pack` again"):
        stored.read_manifest(tmp_path / "store")
    temporary(tmp_path / "store/band_00/train/shard_00002.npy").write_bytes(b"half")
    begun.append("again")
    pack(loading.load(config_file), tmp_path / "store")
    assert begun == ["train_00000", "train_00001", "again", "train_00001", "train_00002", "val_00000"]
    assert files_of(tmp_path / "store") == files_of(packed())


KILLED = """
import sys
from pathlib import Path

from bandsplit.config import loading
from tests.data import test_store

if __name__ == "__main__":
    test_store.pack(loading.load(sys.argv[1]), Path(sys.argv[2]), "uint8", workers=2)
"""


@pytest.mark.slow
def test_a_killed_pack_continues(config_file: Path, packed: Packed, tmp_path: Path) -> None:
    """On two processes, which end with the one that started them."""
    to, script = tmp_path / "store", tmp_path / "pack.py"
    script.write_text(KILLED)
    env = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'src'}"}
    process = subprocess.Popen([sys.executable, script, config_file, to], env=env)
    deadline = time.monotonic() + 120
    while not list(to.glob(".packing/*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    time.sleep(1.5)
    before = files_of(to)
    time.sleep(1.0)
    assert files_of(to) == before, "a worker goes on"
    pack(loading.load(config_file), to, "uint8")
    assert files_of(to) == files_of(packed("uint8"))


def test_a_finished_pack_is_left_alone_and_another_one_refused(
    config_file: Path, packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(packed(), tmp_path / "store")
    monkeypatch.setattr(bands, "_pack_chunk", None)
    before = files_of(tmp_path / "store")
    assert pack(loading.load(config_file), tmp_path / "store") == stored.read_manifest(tmp_path / "store")
    with pytest.raises(UserError, match=r"something else was packed there: --dtype was 'float16', now 'uint8'"):
        pack(loading.load(config_file), tmp_path / "store", "uint8")
    with pytest.raises(UserError, match=r"split.transform was 'dct2d', now 'hadamard'"):
        pack(loading.load(config_file, ["split.transform=hadamard"]), tmp_path / "store")
    assert files_of(tmp_path / "store") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    (tmp_path / "mine/.lock").touch()
    with pytest.raises(UserError, match="this folder holds other files"):
        pack(loading.load(config_file), tmp_path / "mine")


def test_a_full_disk_is_told_first(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"about 0\.\d GB are needed, 0\.0 GB are free"):
        pack(loading.load(config_file), tmp_path / "store")


@pytest.mark.parametrize(("dtype", "check"), [("float16", "off"), ("uint8", "off"), ("uint8", "decode")])
def test_what_cannot_be_decoded_is_left_out_by_name(
    config_file: Path, image_root: Path, tmp_path: Path, dtype: bands.Dtype, check: str
) -> None:
    """Found by the index, or while packing where there was no check."""
    root = tmp_path / "images"
    shutil.copytree(image_root, root)
    config = loading.load(config_file, [f"data.root={root}", f"data.check={check}"])
    whole = files_in(config, "train")
    files, labels = list(whole.paths), list(whole.labels)
    lost = (3, 70, 71)
    files[70] = str(Path(files[70]).rename(files[70].replace(".jpg", os.fsdecode(b"\xe9.jpg"))))
    for n, content in zip(lost, (b"", b"no image", Path(files[71]).read_bytes()[:200]), strict=True):
        Path(files[n]).write_bytes(content)
    manifest = pack(config, tmp_path / "store", dtype)
    about = manifest.parts["train"]
    assert [root / each.name for each in about.left_out] == [Path(files[n]) for n in lost]
    assert all(each.reason for each in about.left_out)
    assert about.shards == ((63, 62, 32) if check == "off" else (64, 64, 29))
    train, _ = parts_of(from_store(config_file, tmp_path / "store"))
    kept = [n for n in range(TRAIN) if n not in lost]
    assert train.labels.tolist() == [labels[n] for n in kept]
    assert train.digest != replace(train, part="val").digest
    decodable = ImageFiles([files[n] for n in kept], [labels[n] for n in kept], train.classes)
    at_stored_side = config.model_copy(update={"data": config.data.model_copy(update={"val_image_size": 40})})
    images = torch.cat([b.inputs[0][b.labels >= 0] for b in ValidationLoader(at_stored_side, decodable, share())])
    read = BandReader(train, [View.of(config)], share()).read(np.arange(len(kept)), 20).inputs[0]
    assert (read - images).square().mean().sqrt() < 2 * max(manifest.bands[0].rmse)


def test_the_digest_is_of_all_that_the_manifest_tells(packed: Packed, config_file: Path) -> None:
    """As pydantic writes it, which knows no names that are not UTF-8."""
    train, _ = parts_of(from_store(config_file, packed()))
    digests = set()
    for name in ('é ☕ \t\x01\x7f"\\/', os.fsdecode(b"\xe9"), os.fsdecode(b"\xe8")):
        about = train.about.model_copy(update={"left_out": (stored.LeftOut(name=name, reason="damaged"),)})
        manifest = train.manifest.model_copy(update={"parts": {"train": about}})
        digests.add(replace(train, manifest=manifest).digest)
        if name.isprintable() or "☕" in name:
            told = hashlib.sha256(f"float16 {about.model_dump_json()}".encode()).hexdigest()
            assert digests == {told}
    assert len(digests) == 3


# verify ---------------------------------------------------------------------------------------------------------------


def test_verify_finds_a_flipped_byte_and_a_missing_file(
    packed: Packed, tmp_path: Path, run_here: Callable[..., Done]
) -> None:
    root = tmp_path / "store"
    shutil.copytree(packed("uint8"), root)
    done = run_here("data.py", "verify", root)
    assert done.returncode == 0, done.stderr
    assert "all as they were packed" in done.stdout
    shutil.rmtree(root / "band_02")
    assert "not here: bands 2" in run_here("data.py", "verify", root).stdout
    victim = root / "band_01/train/shard_00001.npy"
    content = bytearray(victim.read_bytes())
    content[-1000] ^= 4
    victim.write_bytes(content)
    (root / "labels/val.npy").unlink()
    done = run_here("data.py", "verify", root)
    assert done.returncode == 2
    assert f"{victim}: damaged" in done.stderr
    assert f"{root / 'labels/val.npy'}: missing" in done.stderr
    assert "2 of 16 files are wrong" in done.stderr


def test_checksums_are_those_of_sha256sum(packed: Packed, tmp_path: Path) -> None:
    for folder in (packed(), packed() / "band_03"):
        done = subprocess.run(["sha256sum", "--check", "--strict", "sha256.txt"], cwd=folder, capture_output=True)
        assert done.returncode == 0, done.stderr
    odd = {"a b": "0" * 64, "line\nbreak": "1" * 64, "back\\slash": "2" * 64, "\udcff": "3" * 64}
    packing.write_checksums(tmp_path, odd)
    assert packing.read_checksums(tmp_path / "sha256.txt") == odd


def test_a_damaged_manifest_is_told(config_file: Path, packed: Packed, tmp_path: Path) -> None:
    shutil.copytree(packed(), tmp_path / "store")
    path = tmp_path / "store/manifest.json"
    text = path.read_text()
    for content, told in (
        (text[: len(text) // 2], "damaged or of another version"),
        (text.replace('"format": 1', '"format": 7'), "format 7; this version reads format 1"),
        ("{}", "not the manifest of packed data"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=told):
            parts_of(from_store(config_file, tmp_path / "store"))
    with pytest.raises(UserError, match="holds no packed data"):
        parts_of(from_store(config_file, tmp_path))


# Reading --------------------------------------------------------------------------------------------------------------

SPLITS = [
    ("split.transform=dct2d", "split.block=4"),
    ("split.transform=hadamard", "split.block=4"),
    ("split.transform=identity", "split.block=2"),
    ("split.transform=dct1d", "split.block=2"),
    ("split.transform=dct1d", "split.block=4", "split.norm=none"),
]


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
@pytest.mark.parametrize("keys", SPLITS, ids=lambda keys: "-".join(keys))
def test_flips_and_crops_are_those_of_the_image(
    config_file: Path, packed: Packed, keys: tuple[str, ...], dtype: bands.Dtype
) -> None:
    """The image that the stored bands make up, cropped and flipped as pixels, has the bands that are read."""
    config = from_store(config_file, packed(dtype, *keys), *keys, 'split.branches="all"')
    train, _ = parts_of(config)
    block = config.split.block
    matrix = transforms.transform_matrix(config.split.transform, block, config.split.norm)
    whole = torch.stack(
        [
            torch.from_numpy(np.concatenate([np.load(path) for path in train.shards(k)]).astype(np.float64))
            * torch.tensor(train.manifest.bands[k].scale, dtype=torch.float64)
            + torch.tensor(train.manifest.bands[k].offset, dtype=torch.float64)
            for k in range(block**2)
        ]
    )
    pixels = transforms.merge(rearrange(whole, "k b h w c -> k b c h w"), matrix, block)
    draw = np.random.default_rng(0)
    indices = draw.permutation(TRAIN)[:97]
    side = 32 // block
    corners = draw.integers(0, 40 // block - side, (97, 2), endpoint=True)
    mirror = draw.random(97) < 0.5
    expected = []
    for index, (top, left), flip in zip(indices, corners * block, mirror, strict=True):
        image = pixels[index, :, top : top + 32, left : left + 32]
        expected.append(image.flip(-1) if flip else image)
    bands_of_them = transforms.split(torch.stack(expected), matrix, block)
    reader = BandReader(train, [View.of(config)], share(), hflip=0.5)
    read = reader.read(indices, side, corners, mirror)
    assert read.inputs[0].is_contiguous(memory_format=torch.channels_last)
    ours = rearrange(read.inputs[0], "b (k c) h w -> k b c h w", c=3)
    scale = bands_of_them.abs().max()  # up to 60 without normalization
    assert (ours - bands_of_them).abs().max() < 1e-4 * max(1.0, scale / 10)
    assert read.labels.tolist() == train.labels[indices].tolist()
    each = from_store(config_file, train.root, *keys)
    apart = BandReader(train, [View.of(each)], share(), hflip=0.5).read(indices, side, corners, mirror).inputs
    assert torch.equal(torch.cat(apart, dim=1), read.inputs[0])
    half = BandReader(train, [View.of(each)], Shard(0, 1, 12, 1, None, half=True), hflip=0.5)
    for a, b in zip(half.read(indices, side, corners, mirror).inputs, apart, strict=True):
        assert a.dtype == torch.float16
        torch.testing.assert_close(a.float(), b, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("keys", [(), ("split.transform=dct1d",)], ids=["dct2d", "dct1d"])
def test_the_deviations_divide_what_is_read_and_not_what_is_packed(
    config_file: Path, packed: Packed, tmp_path: Path, keys: tuple[str, ...]
) -> None:
    """Flipped bands of dct1d are sums of several, each in its own unit."""
    root, sigma = packed("uint8", *keys), (4.0, 0.5, 0.25, 2.0)
    train, scaled = parts_of(from_store(config_file, root, *keys))[0], ["split.scale=0.5", f"split.sigma={list(sigma)}"]
    indices, mirror = np.arange(20), np.arange(20) % 2 == 0
    plain, divided = (
        BandReader(train, [View.of(loading.load(config_file, [*keys, *more]))], share(), hflip=0.5).read(
            indices, 20, None, mirror
        )
        for more in ([], scaled)
    )
    for x, y, deviation in zip(plain.inputs, divided.inputs, sigma, strict=True):
        torch.testing.assert_close(y, x / deviation**0.5, rtol=1e-5, atol=1e-5)
    if not keys:
        pack(loading.load(config_file, scaled), tmp_path / "scaled", "uint8")
        assert files_of(tmp_path / "scaled") == files_of(root)
        measured = deviations.measured(from_store(config_file, root), train)
        np.testing.assert_allclose(
            measured,
            deviations.measured(
                loading.load(config_file, ["data.scale=1,1"]), files_in(loading.load(config_file), "train")
            ),
            rtol=0.1,
        )


@pytest.mark.parametrize(("kind", "block"), [("dct2d", 6), ("hadamard", 8), ("identity", 3), ("dct1d", 3)])
def test_the_flip_matrix_flips_bands(kind: transforms.Kind, block: int) -> None:
    matrix = transforms.transform_matrix(kind, block)
    flip = transforms.flip_matrix(matrix)
    images = torch.randn(2, 3, 4 * block, 5 * block, dtype=torch.float64)
    ours = torch.einsum("kj,jbchw->kbchw", torch.from_numpy(flip), transforms.split(images, matrix, block).flip(-1))
    torch.testing.assert_close(ours, transforms.split(images.flip(-1), matrix, block))
    if kind in ("dct2d", "hadamard"):
        assert np.allclose(flip, np.diag((-1.0) ** (np.arange(block**2) % block)))


def test_validation_sees_what_jpegs_show(config_file: Path, packed: Packed) -> None:
    jpegs = loading.load(config_file)
    for world_size, batch_size in ((1, 12), (3, 7)):
        for rank in range(world_size):
            mine = share(rank, world_size, batch_size)
            expected = list(ValidationLoader(jpegs, files_in(jpegs, "val"), mine))
            for dtype in ("float16", "uint8"):
                config = from_store(config_file, packed(dtype))  # type: ignore[arg-type]
                val = parts_of(config)[1]
                batches = list(BandValidationLoader(config, val, mine))
                assert [b.labels.tolist() for b in batches] == [b.labels.tolist() for b in expected]
                for batch, other in zip(batches, expected, strict=True):
                    for k, (x, y) in enumerate(zip(batch.inputs, other.inputs, strict=True)):
                        rmse = max(val.manifest.bands[k].rmse)
                        assert (x - y)[batch.labels >= 0].square().mean().sqrt() < 4 * rmse


def test_training_sees_the_images_that_jpegs_show_in_the_same_steps(config_file: Path, packed: Packed) -> None:
    jpegs = loading.load(config_file)
    config = from_store(config_file, packed())
    for rank in range(2):
        theirs = TrainingLoader(jpegs, files_in(jpegs, "train"), [share(rank, 2)])
        ours = BandLoader(config, parts_of(config)[0], [share(rank, 2)])
        for _ in range(9):  # more than a pass
            assert next(ours).labels.tolist() == next(theirs).labels.tolist()


def test_a_stream_goes_on_exactly_from_its_state(config_file: Path, packed: Packed) -> None:
    """Two streams of one rank, and the same ones on two ranks; resumed, and read from memory."""
    config = from_store(config_file, packed("uint8"), "mix.cutmix=1.0")
    train = parts_of(config)[0]
    together = BandLoader(config, train, [share(0, 2), share(1, 2)])
    apart = [BandLoader(config, train, [share(rank, 2)]) for rank in range(2)]
    for n in range(12):
        if n == 6:
            held = config.model_copy(update={"data": config.data.model_copy(update={"in_memory": True})})
            again = BandLoader(held, train, [share(0, 2), share(1, 2)], together.states())
        batch, other = next(together), next(apart[n % 2])
        assert torch.equal(batch.labels, other.labels)
        for x, y in zip(batch.inputs, other.inputs, strict=True):
            assert torch.equal(x, y)
        if n >= 6:
            resumed = next(again)
            assert torch.equal(resumed.labels, batch.labels)
            assert all(torch.equal(x, y) for x, y in zip(resumed.inputs, batch.inputs, strict=True))
    assert [state["batches"] for state in again.states()] == [6, 6]


def test_crops_and_flips_reach_every_place(config_file: Path, packed: Packed) -> None:
    """At hflip 0 or 1 none or all are flipped; corners are in whole blocks, 0 to 4 of 20 - 16."""
    root = packed()
    seen = set()
    for hflip in (0.0, 0.5, 1.0):
        config = from_store(config_file, root, f"data.hflip={hflip}")
        loader = BandLoader(config, parts_of(config)[0], [share(batch_size=40)])
        reader = loader._reader
        flips = []
        read = reader.read

        def noted(indices: Any, side: Any, corners: Any, mirror: Any, read: Any = read, flips: Any = flips) -> Any:
            seen.update(map(tuple, corners.tolist()))
            flips.extend(mirror.tolist())
            return read(indices, side, corners, mirror)

        reader.read = noted  # type: ignore[method-assign]
        for _ in range(8):
            next(loader)
        assert hflip - 0.15 < np.mean(flips) < hflip + 0.15
    assert seen == {(top, left) for top in range(5) for left in range(5)}


def test_bands_that_flips_need_are_read_or_asked_for(config_file: Path, packed: Packed, tmp_path: Path) -> None:
    keys = ("split.transform=identity", "split.block=2")
    shutil.copytree(packed("float16", *keys), tmp_path / "store")
    shutil.rmtree(tmp_path / "store/band_01")
    for number in (2, 3):
        shutil.rmtree(tmp_path / f"store/band_{number:02d}")
    with pytest.raises(UserError, match=r"band 1, which horizontal flips with split.transform = 'identity' need too"):
        parts_of(from_store(config_file, tmp_path / "store", *keys, "split.only=[0]"))
    config = from_store(config_file, tmp_path / "store", *keys, "split.only=[0]", "data.hflip=0.0")
    assert len(next(BandLoader(config, parts_of(config)[0], [share()])).inputs) == 1
    with pytest.raises(UserError, match=r"shard_00000.npy: missing, but band 1 is read; copy band_01/"):
        parts_of(from_store(config_file, tmp_path / "store", *keys, "data.hflip=0.0"))
    cut = tmp_path / "store/band_00/train/shard_00002.npy"
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"shard_00002.npy: \d+ bytes instead of \d+; copy this file again"):
        parts_of(config)


def test_memory_is_checked_first(config_file: Path, packed: Packed, tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")  # as in a container
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2000 kB\n")
    assert memory.available_bytes(tmp_path) == 2_048_000
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert memory.available_bytes(tmp_path) == 2_048_000
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("1000000\n")
    assert memory.available_bytes(tmp_path) == 1_000_000
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("700000\n")
    (tmp_path / "sys/fs/cgroup/memory.stat").write_text("anon 200000\ninactive_file 400000\nactive_file 100000\n")
    assert memory.available_bytes(tmp_path) == 800_000
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("500000\n")
    memory.require_memory(1_000_000, tmp_path)
    with pytest.raises(UserError, match=r"data.in_memory: true given, but the bands that are read take 0\.0 GB"):
        memory.require_memory(1_000_001, tmp_path)
    parts_of(from_store(config_file, packed(), "data.in_memory=true"))


@pytest.mark.parametrize(
    ("line", "top", "limit", "usage", "prefix"),
    [
        ("0::", "sys/fs/cgroup", "memory.max", "memory.current", ""),
        ("7:cpuset,memory:", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ],
    ids=["v2", "v1"],
)
def test_the_limit_of_a_slurm_job_counts(
    tmp_path: Path, line: str, top: str, limit: str, usage: str, prefix: str
) -> None:
    """It is set on the job, of whose last step this process is a task."""
    job = tmp_path / top / "slurm/job_1"
    (job / "step_0").mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"9:pids:/\n{line}/slurm/job_1/step_0\n")
    (job / limit).write_text("5000000\n")
    (job / usage).write_text("4000000\n")
    (job / "memory.stat").write_text(f"rss 9\n{prefix}inactive_file 1000000\n{prefix}active_file 500000\n")
    (job / "step_0" / limit).write_text("max\n")
    assert memory.available_bytes(tmp_path) == 2_500_000


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            ["data.scale=0.25,1.0"],
            r"data.scale: \[0.25, 1.0\] given; allowed: with data.kind = 'bands' only data.scale",
        ),
        (["augment.auto.type=trivial_augment"], "augment.auto: 'trivial_augment' given; .* only augment.auto = none;"),
        (
            ["augment.repeats=3"],
            "augment.repeats: 3 given; allowed: with data.kind = 'bands' only augment.repeats = 1;",
        ),
        (
            ["data.ratio=0.5,2.0", "augment.pca_noise=0.1", "augment.erasing.probability=0.3"],
            r"data.ratio = \[1.0, 1.0\], augment.pca_noise = 0.0, augment.erasing = none; a band store holds no pixels",
        ),
        (
            ["augment.progressive.min_size=16", "augment.progressive.ramp_end=1", "augment.progressive.multiple=16"],
            "augment.progressive",
        ),
    ],
)
def test_what_a_store_cannot_do_is_refused_in_one_message(
    config_file: Path, packed: Packed, keys: list[str], told: str
) -> None:
    with pytest.raises(UserError, match=told) as refused:
        from_store(config_file, packed(), *keys)
    assert "\n" not in str(refused.value)


def test_a_config_that_was_resolved_with_bands_is_read_again(config_file: Path, packed: Packed, tmp_path: Path) -> None:
    """Defaults of scale and ratio are written out, and are those of bands."""
    config = from_store(config_file, packed())
    assert (config.data.scale, config.data.ratio) == ((1.0, 1.0), (1.0, 1.0))
    assert schema.RunConfig.model_validate(config.model_dump(mode="json")) == config
    with pytest.raises(UserError, match="data.in_memory: True given; allowed: false, unless data.kind = 'bands'"):
        loading.load(config_file, ["data.in_memory=true"])


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["split.transform=hadamard"], "split.transform: 'hadamard' given, but the band store .* with 'dct2d'"),
        (["split.block=4"], "split.block: 4 given, but the band store .* with 2"),
        (["split.norm=none"], "split.norm: 'none' given, but the band store .* with 'ortho'"),
        (["data.mean=1,2,3"], r"data.mean: \[1.0, 2.0, 3.0\] given, but the band store"),
        (["data.std=1,2,3"], r"data.std: \[1.0, 2.0, 3.0\] given, but the band store"),
        (["data.resize_size=48"], "data.resize_size: 48 given, but the band store .* with 40"),
        (["data.interpolation=bicubic"], "data.interpolation: 'bicubic' given, but the band store"),
        (
            ["data.image_size=48", "data.resize_size=40", "data.val_image_size=32"],
            "data.image_size: 48 given, but .* has training images of 40 x 40",
        ),
        (["data.val_image_size=36"], "data.val_image_size: 36 given, but the band store .* with 32"),
        (["data.image_size=36"], "data.image_size: 36 given, but the band store .* with 32"),
        (["data.classes=9"], "data.classes: 9 given, but .* has 10 classes"),
    ],
)
def test_what_the_store_was_packed_with_is_compared(
    config_file: Path, packed: Packed, keys: list[str], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        parts_of(from_store(config_file, packed(), *keys))


def test_a_size_that_does_not_fit_is_refused(config_file: Path, tmp_path: Path, run_here: Callable[..., Done]) -> None:
    for size in (31, 33, 42):
        done = run_here("data.py", "pack", config_file, "--to", tmp_path / "store", "--size", size)
        assert done.returncode == 2
        assert f"--size: {size} given; allowed: a multiple of split.block = 2 from data.image_size = 32" in done.stderr
    keys = ["data.image_size=48", "data.resize_size=40", "data.val_image_size=32"]
    with pytest.raises(UserError, match="data.image_size: 48 given; allowed for a band store: at most .* = 40, in"):
        pack(loading.load(config_file, keys), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_pack_whose_plan_could_not_be_written_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = Folder(tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device"), folder.begun({"a": 1}):
            pass
    assert any(folder.path.iterdir())
    with folder.begun({"a": 1}) as complete:
        assert not complete


# Through the commands -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_of_bands(config_file: Path, tmp_path: Path, run_here: Callable[..., Done]) -> None:
    """Packed and verified by hand; trained, evaluated from the store and from the images."""
    store, run_dir = tmp_path / "store", tmp_path / "run"
    done = run_here("data.py", "pack", config_file, "--to", store, "--dtype", "float16", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "160 images of 20 x 20" in done.stdout
    bands_keys = ["--set", "data.kind=bands", "--set", f"data.root={store}"]
    done = run_here("train.py", config_file, *bands_keys, "--dry-run")
    assert "160 training and 50 validation images" in done.stdout, done.stderr
    done = run_here("train.py", config_file, *bands_keys, "--run-dir", run_dir, "--set", "train.epochs=1")
    assert done.returncode == 0, done.stderr
    told = []
    for keys in ([], ["--set", "data.kind=images", "--set", f"data.root={loading.load(config_file).data.root}"]):
        done = run_here("evaluate.py", run_dir, *keys, "--output", tmp_path / "accuracy.json")
        assert done.returncode == 0, done.stderr
        told.append(json.loads((tmp_path / "accuracy.json").read_text()))
    assert told[0]["val_images"] == told[1]["val_images"] == VAL
    assert told[0]["loss"] == pytest.approx(told[1]["loss"], rel=1e-2)


def test_a_branch_reads_its_band_alone(config_file: Path, packed: Packed, tmp_path: Path) -> None:
    """Also where bands are divided by their deviations; runs on different nodes are joined as one on all bands is."""
    store = tmp_path / "store"
    shutil.copytree(packed("uint8"), store)
    for number in (0, 1, 3):
        shutil.rmtree(store / f"band_{number:02d}")
    keys = ["--set", "data.kind=bands", "--set", f"data.root={store}", "--set", "train.epochs=1"]
    keys += ["--set", "schedule.warmup_epochs=0", "--set", "split.scale=0.5"]
    done = run("train.py", config_file, *keys, "--branches", "2", "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    whole = from_store(config_file, packed("uint8"))
    _, first, second, _ = deviations.measured(whole, parts_of(whole)[0])
    assert loading.load(tmp_path / "run/config.toml").split.sigma == (1, 1, second, 1)
    done = run("train.py", config_file, *keys, "--branches", "1", "--run-dir", tmp_path / "other")
    assert done.returncode == 2
    assert "missing, but band 1 is read; copy band_01/" in done.stderr
    assert not (tmp_path / "other").exists()
    done = run(
        "train.py",
        config_file,
        *keys,
        f"--set=data.root={packed('uint8')}",
        "--branches=1",
        f"--run-dir={tmp_path}/other",
    )
    assert done.returncode == 0, done.stderr
    runs = [tmp_path / "run", tmp_path / "other"]
    joined = Joined.of(runs, "last", [], ALONE.ranks)
    assert joined.config.split.sigma == (1, first, second, 1)
    other = joined.runs[1].config.with_values({"split": {"only": (2,)}})
    with pytest.raises(UserError, match=r"other: split.sigma: 1.0 for band 2, but .*run has"):
        joined_sigma([joined.first, replace(joined.runs[1], config=other)])


def checkpoints(run_dir: Path) -> dict[str, Any]:
    last = max(run_dir.glob("checkpoints/step*"))
    return {path.name: torch.load(path, weights_only=True) for path in sorted(last.glob("branch*"))}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_run_resumes_bit_for_bit(config_file: Path, packed: Packed, tmp_path: Path, ranks: int) -> None:
    keys = ["--set", "data.kind=bands", "--set", f"data.root={packed('uint8')}", "--set", "mix.mixup=0.2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run("train.py", config_file, *keys, "--run-dir", whole, ranks=ranks)
    assert done.returncode == 0, done.stderr
    launch = Launch("train.py", config_file, *keys, "--run-dir", killed, ranks=ranks)
    deadline = time.monotonic() + 120
    while not list(killed.glob("checkpoints/step*")) and launch.running and time.monotonic() < deadline:
        time.sleep(0.005)
    launch.signal(9)
    launch.wait()
    done = run("train.py", config_file, *keys, "--run-dir", killed, "--resume", ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert equal(checkpoints(killed), checkpoints(whole))


@pytest.mark.slow
def test_another_store_is_not_the_data_of_a_run(config_file: Path, packed: Packed, tmp_path: Path) -> None:
    """The same images in other types are other values."""
    keys = ["--set", "data.kind=bands", "--set", "train.epochs=1", "--set", "schedule.warmup_epochs=0"]
    keys += ["--run-dir", str(tmp_path / "run"), "--set", "split.branches=[[0]]"]
    done = run("train.py", config_file, *keys, "--set", f"data.root={packed('uint8')}")
    assert done.returncode == 0, done.stderr
    done = run("train.py", config_file, *keys, "--resume", "--set", f"data.root={packed('float16')}")
    assert done.returncode == 2
    assert "the images are not those that" in done.stderr


class Sum:
    """A teacher of one branch that reads bands 0 and 3."""

    def __init__(self, view: View) -> None:
        self.view = view

    def logits(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([x.sum((1, 2, 3)) for x in inputs], dim=1)


def test_a_teacher_reads_the_same_store(config_file: Path, packed: Packed) -> None:
    config = from_store(config_file, packed(), "split.branches=[[1]]")
    both = from_store(config_file, packed(), "split.branches=[[1], [0, 3]]")
    train = parts_of(config)[0]
    teacher = Sum(View.of(from_store(config_file, packed(), "split.branches=[[0, 3]]")))
    source.require_teacher(train, config, teacher)
    batch, expected = (
        next(BandLoader(config, train, [share()], teacher=teacher)),
        next(BandLoader(both, train, [share()])),
    )
    assert torch.equal(batch.inputs[0], expected.inputs[0])
    assert batch.teacher_logits is not None
    assert torch.equal(batch.teacher_logits[:, 0], expected.inputs[1].sum((1, 2, 3)))
    other = Sum(View.of(loading.load(config_file, ["split.block=4"])))
    with pytest.raises(UserError, match=r"the teacher's split.block: 4 given, but the band store .* with 2"):
        source.require_teacher(train, config, other)


def test_labels_are_those_of_the_runs_classes(config_file: Path, packed: Packed) -> None:
    val = parts_of(from_store(config_file, packed()))[1]
    order = [*reversed(val.classes), "another"]
    other = val.renumbered(order, "the run", "the store")
    assert [order[label] for label in other.labels] == [val.classes[label] for label in val.labels]
    with pytest.raises(UserError):
        val.renumbered(order[1:], "the run", "the store")


@pytest.mark.parametrize("block", [1, 2, 4, 6])
def test_the_square_that_is_stored_has_the_center_that_held_out_images_need(config_file: Path, block: int) -> None:
    """The largest one, unless it would be too small to train on."""
    config = loading.load(config_file, [f"split.block={block}", "data.image_size=36", "data.resize_size=36"])
    for image, val, resize in itertools.product((36, 60, 72), (36, 60, 72), range(72, 97)):
        sizes = {"image_size": image, "val_image_size": val, "resize_size": resize}
        side = bands._side(config.model_copy(update={"data": config.data.model_copy(update=sizes)}), None)
        fit = [x for x in range(image, resize + 1) if x % block == 0]
        assert side == max([x for x in fit if (x - val) % (2 * block) == 0 and x >= val] or fit)


def test_a_store_without_the_center_of_held_out_images_is_refused_before_a_run(
    config_file: Path, tmp_path: Path, run_here: Callable[..., Done]
) -> None:
    config, root = loading.load(config_file), tmp_path / "store"
    bands.pack(config, open_here(config.data), Path(config.data.root), root, "uint8", 38, 0)
    parts_of(from_store(config_file, root))
    told = (
        f"data.holdout: 3 given, but the training images in {root}, of 38 x 38, have no center of 32 x 32 in whole "
        "blocks, as which held-out images are read; pack again without --size, or with --size 32 plus a multiple of 4"
    )
    keys = [f"--set=data.{key}" for key in ("kind=bands", f"root={root}", "holdout=3")]
    assert told in run_here("train.py", config_file, *keys, "--dry-run").stdout
    done = run_here("train.py", config_file, *keys, "--run-dir", tmp_path / "run")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"error: {told}")
    assert not (tmp_path / "run").exists()


def test_held_out_images_are_those_of_training_on_images(config_file: Path, packed: Packed) -> None:
    """And are prepared as validation images are: the center of what is stored."""
    jpegs = loading.load(config_file, ["data.holdout=3"])
    config = from_store(config_file, packed(), "data.holdout=3")
    theirs, ours = holdout.split(files_in(jpegs, "train"), jpegs), holdout.split(parts_of(config)[0], config)
    assert [len(part) for part in ours] == [TRAIN - 30, 30]
    for other, part in zip(theirs, ours, strict=True):
        assert [part.name(i) for i in range(len(part))] == [other.name(i) for i in range(len(other))]
        assert part.labels.tolist() == list(other.labels)
    for crops in (CENTER, FLIP):
        expected = list(ValidationLoader(jpegs, theirs[1], share(), crops))
        batches = list(source.validation_loader(config, ours[1], share(), crops))
        assert len(batches) == len(expected)
        for batch, other_batch in zip(batches, expected, strict=True):
            assert batch.labels.tolist() == other_batch.labels.tolist()
            for x, y in zip(batch.inputs, other_batch.inputs, strict=True):
                assert (x - y)[batch.labels >= 0].square().mean().sqrt() < 2e-3
    with pytest.raises(UserError, match="--ten-crop: a band store holds the center alone"):
        source.validation_loader(config, ours[1], share(), TEN)
    train = BandLoader(config, ours[0], [share()])
    seen = [label for _ in range(30) for label in next(train).labels.tolist()]
    assert [seen[: TRAIN - 30].count(label) for label in range(10)] == [13] * 10
