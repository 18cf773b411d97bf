"""Packed images: sizes, colors, names, and that a training reads them."""

from __future__ import annotations

import io
import os
import shutil
import signal
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from bandsplit.config import loading
from bandsplit.data import summary
from bandsplit.data.images import open_here, scan
from bandsplit.data.store import images, packing
from bandsplit.data.store import pack as store
from bandsplit.data.store.images import Encoding, packed_name, resized
from bandsplit.data.store.manifest import ImageManifest, read_manifest
from bandsplit.errors import UserError
from tests.conftest import TRAIN_PER_CLASS, Done

TRAIN = 10 * TRAIN_PER_CLASS
ENCODING = Encoding(48, 90, "bilinear", Path("/"))


def pack(config_file: Path, root: Path, to: Path) -> ImageManifest:
    config = loading.load(config_file, [f"data.root={root}"])
    return images.pack(config, open_here(config.data), root, to, 40, 90, workers=0, chunk_images=64)


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def photo(size: tuple[int, int]) -> Image.Image:
    """Smooth colors, which JPEG keeps."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    return Image.fromarray((np.stack([x, y, (x + y) / 2], -1) * 200 + 20).astype(np.uint8))


def decoded(content: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(float)


@pytest.mark.parametrize("size", [(100, 80), (80, 100), (96, 500), (48, 1000), (40, 60), (49, 49)])
def test_the_shorter_side_is_at_most_what_was_asked_for(tmp_path: Path, size: tuple[int, int]) -> None:
    path = save(tmp_path / "x.jpg", photo(size), quality=95)
    content = resized(path, ENCODING)
    small = min(size) <= 48
    assert (content == path.read_bytes()) == small
    scale = 1.0 if small else 48 / min(size)
    expected = Image.open(path).resize([round(length * scale) for length in size], Image.Resampling.BILINEAR)
    assert np.abs(decoded(content) - np.asarray(expected)).mean() < 2


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16", "F"])
@pytest.mark.parametrize("side", [40, 80])
def test_other_modes_become_rgb(tmp_path: Path, mode: str, side: int) -> None:
    image = photo((side, side))
    if mode in ("I;16", "F"):
        gray = np.asarray(image.convert("L"))
        values = gray.astype(np.uint16) * 257 if mode == "I;16" else gray / np.float32(255)
        path = save(tmp_path / "x.tiff", Image.fromarray(values))
        image = image.convert("L").convert("RGB")
    else:
        converted = image.quantize() if mode == "P" else image.convert(mode)
        path = save(tmp_path / ("x.jpg" if mode == "CMYK" else "x.png"), converted)
        image = converted.convert("RGB")
    content = resized(path, ENCODING)
    packed = Image.open(io.BytesIO(content))
    assert (packed.format, packed.mode) == ("JPEG", "RGB")
    expected = image.resize((min(side, 48),) * 2, Image.Resampling.BILINEAR)
    assert np.abs(decoded(content) - np.asarray(expected)).mean() < (12 if mode == "1" else 4)


@pytest.mark.parametrize("options", [{}, {"tiffinfo": {339: 2}}], ids=["32 bits", "signed"])
def test_gray_without_a_known_white_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    image = Image.new("I;16" if options else "I", (40, 40), 1000)
    with pytest.raises(ValueError, match="^gray of 32 bits, or signed, whose white is not known"):
        resized(save(tmp_path / "x.tiff", image, **options), ENCODING)


def test_colors_are_brought_to_srgb(tmp_path: Path) -> None:
    """A profile whose red is sRGB's green, and the reverse."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tXYZ", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"tXYZ", b"gXYZ", 1)
    for text in ("sRGB", "sRGB".encode("utf-16-be").decode("latin-1")):
        swapped = swapped.replace(text.encode("latin-1"), text.replace("s", "t", 1).encode("latin-1"))
    red = Image.new("RGB", (40, 40), (200, 20, 20))
    for profile, expected in ((swapped, (20, 200, 20)), (srgb, (200, 20, 20)), (b"damaged", (200, 20, 20))):
        path = save(tmp_path / "x.jpg", red, quality=95, icc_profile=profile)
        content = resized(path, ENCODING)
        assert np.abs(decoded(content).mean((0, 1)) - expected).max() < 6
        assert (content == path.read_bytes()) == (profile is not swapped)


def test_orientation_is_ignored_as_by_the_pipeline(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    path = save(tmp_path / "x.jpg", photo((100, 80)), exif=exif)
    packed = Image.open(io.BytesIO(resized(path, ENCODING)))
    assert packed.size == (60, 48)
    assert not packed.getexif()


def test_folders_are_what_a_training_reads(config_file: Path, image_root: Path, tmp_path: Path) -> None:
    manifest = pack(config_file, image_root, tmp_path / "packed")
    assert manifest.parts["train"].images == TRAIN
    before, after = (
        open_here(loading.load(config_file, [f"data.root={r}"]).data).values()
        for r in (image_root, tmp_path / "packed")
    )
    for part, other in zip(before, after, strict=True):
        assert (part.classes, list(part.labels)) == (other.classes, list(other.labels))
        for path, packed in zip(part.paths, other.paths, strict=True):
            assert Path(path).relative_to(image_root) == Path(packed).relative_to(tmp_path / "packed")
            assert min(Image.open(packed).size) == 40


def test_two_packs_are_identical_and_an_interrupted_one_continues(
    config_file: Path, image_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(config_file, image_root, tmp_path / "whole")
    encode, count = images.resized, [0]

    def interrupted(*arguments: Any) -> bytes:
        count[0] += 1
        if count[0] == 100:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(images, "resized", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(config_file, image_root, tmp_path / "again")
    pack(config_file, image_root, tmp_path / "again")
    assert count[0] == 100 + TRAIN - 64 + 50  # the first chunk was finished
    assert files_of(tmp_path / "again") == files_of(tmp_path / "whole")


def test_what_cannot_be_decoded_is_left_out_by_name(
    config_file: Path, image_root: Path, tmp_path: Path, run_here: Callable[..., Done]
) -> None:
    root, to = tmp_path / "images", tmp_path / "packed"
    shutil.copytree(image_root, root)
    paths = open_here(loading.load(config_file, [f"data.root={root}"]).data)["train"].paths
    lost = [Path(paths[n]) for n in (3, 4, 5)]
    for path, content in zip(lost, (b"", b"no image", lost[2].read_bytes()[:-600]), strict=True):
        path.write_bytes(content)
    done = run_here(
        "data.py", "pack", config_file, "--to", to, "--kind", "images", "--workers", 1, "--set", f"data.root={root}"
    )
    assert done.returncode == 0, done.stderr
    assert "157 images" in done.stdout
    assert "3 left out" in done.stdout
    for path in lost:
        assert f"'{path.relative_to(root)}': " in done.stdout
        assert not (to / path.relative_to(root)).exists()
    assert run_here("data.py", "verify", to).returncode == 0
    victim = next((to / "val").rglob("*.jpg"))
    victim.write_bytes(victim.read_bytes()[:-1])
    done = run_here("data.py", "verify", to)
    assert done.returncode == 2
    assert f"{victim}: damaged" in done.stderr


def test_names_that_are_not_utf8(
    config_file: Path, image_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a class and of an image that is left out; `data.train` ends with a slash."""
    root, cafe = tmp_path / "images", os.fsdecode(b"caf\xe9")
    shutil.copytree(image_root, root)
    for part in ("train", "val"):
        (root / part / "disc_striped").rename(root / part / cafe)
    (root / "train" / cafe / f"{cafe}.jpg").write_bytes(b"no image")
    config = loading.load(config_file, [f"data.root={root}", 'data.train="train/"'])
    to = tmp_path / "packed"
    store.run(config, Namespace(kind="images", to=to, size=40, quality=90, workers=0))
    assert "'train/caf\\udce9/caf\\udce9.jpg': not an image" in capsys.readouterr().out
    manifest = read_manifest(to)
    assert isinstance(manifest, ImageManifest)
    assert manifest.parts["train"].images == TRAIN
    assert [each.name for each in manifest.parts["train"].left_out] == [f"train/{cafe}/{cafe}.jpg"]
    again = open_here(loading.load(config_file, [f"data.root={to}"]).data)["train"]
    assert (again.classes, len(again)) == (list(manifest.classes), TRAIN)
    assert cafe in again.classes
    assert r"caf\udce9" in summary.summary(scan(config.data), config.data)


def crash(chunk: packing.Chunk) -> packing.Record:
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def test_a_decoder_that_crashes_takes_a_worker_with_it_also_where_it_is_the_only_one() -> None:
    with pytest.raises(UserError, match="a worker was killed"):
        list(packing.worked(crash, [packing.Chunk("train", 0, 0, [], [])], 1))


def test_names(config_file: Path, image_root: Path, tmp_path: Path) -> None:
    assert [packed_name(name) for name in ("a/x.JPG", "a/x.jpeg", "a/x.png", "a/x")] == [
        "a/x.JPG", "a/x.jpeg", "a/x.png.jpg", "a/x.jpg"
    ]  # fmt: skip
    root = tmp_path / "images"
    shutil.copytree(image_root, root)
    folder = next((root / "train").iterdir())
    photo((50, 50)).save(folder / "x.png")
    pack(config_file, root, tmp_path / "packed")
    assert (tmp_path / "packed" / (folder / "x.png.jpg").relative_to(root)).is_file()
    photo((50, 50)).save(folder / "x.png.jpg")
    with pytest.raises(UserError, match=r"x.png would become .*x.png.jpg, which is there already"):
        pack(config_file, root, tmp_path / "other")
    (folder / "x.png.jpg").rename(folder / f"{'x' * 251}.jpg")
    pack(config_file, root, tmp_path / "other")
    assert (tmp_path / "other" / folder.relative_to(root) / f"{'x' * 251}.jpg").is_file()
    (folder / "x.png").rename(folder / f"{'x' * 251}.png")
    with pytest.raises(UserError, match=r"x.png would become .*x.png.jpg, a name of more than 255 bytes"):
        pack(config_file, root, tmp_path / "third")
    assert not (tmp_path / "third").exists()
