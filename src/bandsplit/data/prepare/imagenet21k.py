"""ImageNet-21K from its archive: classes with few images left out, as many images of each of the others held out.

The rule, 500 images a class and 50 of them held out, is that of Ridnik et al., "ImageNet-21K Pretraining for the
Masses", 2021 (ImageNet-21K-P); its held-out images are other ones.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from bandsplit.data.prepare import held_out, summary
from bandsplit.data.prepare.archives import Unpacked
from bandsplit.data.prepare.checksums import require_published
from bandsplit.data.prepare.destination import Counts, Destination, Job, opened
from bandsplit.data.prepare.summary import some
from bandsplit.data.prepare.synsets import Synsets
from bandsplit.errors import UserError
from bandsplit.paths import reading_from, writing_to

Release = Literal["winter21", "fall11"]

NAMES: dict[Release, str] = {"winter21": "winter21_whole.tar.gz", "fall11": "fall11_whole.tar"}
TIMM: dict[Release, str] = {"winter21": "imagenet21k_miil_w21_synsets.txt", "fall11": "imagenet21k_miil_synsets.txt"}
"""timm's lists of the classes that have 500 images: 10,450 and 11,221."""
NEXT = "IMAGENET21K={root} {train} resnet34_21k_baseline --set data.classes={classes}"


def prepare(
    source: Path,
    to: Path,
    release: Release | None,
    *,
    min_images: int,
    val_images: int,
    seed: int,
    checksum: bool,
    threads: int,
) -> str:
    """Unpacks the archive `source`, or the one in the folder `source`, to `to`/train and `to`/val; returns a summary.

    Args:
        release: None if the file's name tells it.
        min_images: classes with fewer images are left out.
        val_images: images of each class that are held out, which is fewer.
        seed: chooses them.
        checksum: whether the archive is compared with the published one.
    """
    path = _found(source, release)
    release = release or _release(path)
    options = {"release": release, "min_images": min_images, "val_images": val_images, "seed": seed}
    with opened(to, Job("imagenet21k", options), beside=[path]) as target:
        if target.result is None:
            _prepare(path, release, target, min_images, val_images, seed, checksum, threads)
        images = target.result
        assert images is not None
    left_out = images.get("left out", {})
    few = sum(left_out.values())
    notes = [f"{len(left_out):,} classes with fewer than {min_images} images are left out ({few:,} images)"]
    if min_images == 500:  # as in timm's lists
        notes.append(compared(set(images["train"]), left_out, release))
    return summary.lines(target.root, images, NEXT, *notes)


def _found(source: Path, release: Release | None) -> Path:
    with reading_from(source):
        if source.is_file():
            return source
        names = [NAMES[release]] if release else list(NAMES.values())
        there = [name for name in names if (source / name).is_file()]
    if len(there) == 1:
        return source / there[0]
    if there:
        raise UserError(f"--archives: {source}: both {' and '.join(there)} in it; choose with --release")
    if not source.exists():
        raise UserError(f"--archives: {source}: no such file or folder")
    raise UserError(f"--archives: {source}: no {' and no '.join(names)} in it; name the folder or the file itself")


def _release(path: Path) -> Release:
    for release in NAMES:
        if path.name.startswith(release):
            return release
    raise UserError(f"--release: {path.name} does not tell which release it is; give --release winter21 or fall11")


def _prepare(
    path: Path,
    release: Release,
    target: Destination,
    min_images: int,
    val_images: int,
    seed: int,
    checksum: bool,
    threads: int,
) -> None:
    target.require_space(path.stat().st_size)
    synsets = Synsets(path)
    if checksum:
        require_published(path, NAMES[release], target)

    def finish(name: str, folder: Path, unpacked: Unpacked, size: int) -> None:
        counts: Counts = {"hidden": {name: unpacked.hidden}} if unpacked.hidden else {}
        if len(unpacked.names) < max(min_images, 1):
            counts["left out"] = {name: len(unpacked.names)}
            target.commit(name, {}, counts, size)
            with writing_to(folder):
                shutil.rmtree(folder)
            return
        val = target.emptied(f"val/{name}")
        with writing_to(val):
            for image in held_out.chosen(unpacked.names, val_images, seed, name):
                (folder / image).rename(val / image)
        counts |= {"train": {name: len(unpacked.names) - val_images}, "val": {name: val_images}}
        target.commit(name, {f"train/{name}": folder, f"val/{name}": val}, counts, size)

    synsets.unpack(target, finish, threads)
    if not (target.root / "train").exists():
        raise UserError(f"{path}: no class in it has {min_images} images; lower --min-images, into another --to")
    target.finish()


def compared(kept: set[str], left_out: dict[str, int], release: Release) -> str:
    """The difference to the list of classes that timm has for this release, in words."""
    found = find_spec("timm")
    if found is None or found.origin is None:
        return "the classes are not compared with timm's list, which is not installed: pip install -e .[timm]"
    path = Path(found.origin).parent / "data/_info" / TIMM[release]
    with reading_from(path):
        theirs = set(path.read_text(encoding="utf-8").split())
    if kept == theirs:
        return f"the {len(kept):,} classes are those of timm's {path.name}"
    extra, few, gone = sorted(kept - theirs), sorted(theirs & left_out.keys()), sorted(theirs - kept - left_out.keys())
    few = [f"{name} with {left_out[name]} images" for name in few]
    parts = [
        f"{len(names):,} {what} ({some(names)})"
        for names, what in (
            (extra, "classes that it does not have"),
            (few, "of its classes left out for too few images"),
            (gone, "of its classes are not in the archive"),
        )
        if names
    ]
    return f"compared with the {len(theirs):,} classes of timm's {path.name}: {'; '.join(parts)}"
