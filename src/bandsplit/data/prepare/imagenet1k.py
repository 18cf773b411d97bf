"""ImageNet-1K (ILSVRC 2012) from its archives, in the layout of torchvision's ImageNet: train/, val/, meta.bin."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bandsplit.data import class_names
from bandsplit.data.prepare import archives, summary
from bandsplit.data.prepare.archives import (
    Unpacked,
    files,
    index,
    is_hidden,
    opened,
    reporting_damage,
    unpack_images,
    write,
)
from bandsplit.data.prepare.checksums import require_published
from bandsplit.data.prepare.destination import Counts, Destination, Job
from bandsplit.data.prepare.destination import opened as destination_opened
from bandsplit.data.prepare.progress import Progress
from bandsplit.data.prepare.synsets import Synsets
from bandsplit.errors import UserError
from bandsplit.paths import reading_from, writing_to

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
TRAIN_NEXT = "IMAGENET={root} {train} resnet34_sub16"
EVALUATE_NEXT = "{evaluate} RUN --set data.root={root}"
META = Path("data/meta.mat")
GROUND_TRUTH = Path("data/ILSVRC2012_validation_ground_truth.txt")


@dataclass(frozen=True)
class Devkit:
    """What the devkit says of classes and validation images."""

    words: dict[str, tuple[str, ...]]
    """WordNet id of each class and its names."""
    val: list[str]
    """WordNet id of each validation image, by number."""


def prepare(source: Path, to: Path, parts: Collection[str], checksums: bool, threads: int) -> str:
    """Unpacks the archives in the folder `source`: `to`/train, val, dev (the devkit), meta.bin and class_names.txt.

    Returns a summary.

    Args:
        parts: which of "train" and "val".
        checksums: whether the archives are compared with the published ones.
    """
    names = {"devkit": DEVKIT} | {
        part: {"train": TRAIN, "val": VAL}[part] for part in ("train", "val") if part in parts
    }
    paths = _found(source, names)
    job = Job("imagenet1k", {"parts": [part for part in names if part != "devkit"]})
    with destination_opened(to, job, beside=paths.values()) as target:
        if target.result is None:
            _prepare(paths, target, checksums, threads)
        images = target.result
        assert images is not None
    return summary.lines(target.root, images, TRAIN_NEXT if "train" in images else EVALUATE_NEXT)


def _found(source: Path, names: dict[str, str]) -> dict[str, Path]:
    with reading_from(source):
        missing = [name for name in names.values() if not (source / name).is_file()]
        if missing:
            there = sorted(path.name for path in source.iterdir())[:10] if source.is_dir() else []
            raise UserError(
                f"--archives: {source}: no {' and no '.join(missing)} in it"
                + (f", but {', '.join(there)}" if there else "")
            )
    return {part: source / name for part, name in names.items()}


def _prepare(paths: dict[str, Path], target: Destination, checksums: bool, threads: int) -> None:
    target.require_space(sum(path.stat().st_size for path in paths.values()))
    devkit = _unpack_devkit(paths["devkit"], target)
    synsets = Synsets(paths["train"], known=devkit.words) if "train" in paths else None
    labels = _labels(paths["val"], devkit) if "val" in paths else {}
    if checksums:
        for path in paths.values():
            require_published(path, path.name, target)

    def finish(name: str, folder: Path, unpacked: Unpacked, size: int) -> None:
        if not unpacked.names:
            raise UserError(f"{paths['train']}: {name}.tar in it has no images")
        counts: Counts = {"train": {name: len(unpacked.names)}}
        if unpacked.hidden:
            counts["hidden"] = {name: unpacked.hidden}
        target.commit(name, {f"train/{name}": folder}, counts, size)

    if synsets is not None:
        synsets.unpack(target, finish, threads)
    if "val" in paths and not target.is_finished("val"):
        _unpack_val(paths["val"], labels, target)
    if not target.is_finished("meta"):
        _write_meta(devkit, target)
    target.finish()


# -------------------------------------------------------------------------------------------------------------- devkit


def _unpack_devkit(path: Path, target: Destination) -> Devkit:
    if target.is_finished("dev"):
        return _parsed(target.root / "dev", path)
    folder = target.emptied("dev")
    with reading_from(path), reporting_damage(path), opened(path) as (source, _):
        for member, content in files(source, path):
            below = PurePosixPath(*PurePosixPath(member.name).parts[1:])  # without ILSVRC2012_devkit_t12/
            if below.name and not is_hidden(member.name):
                place = folder / below
                with writing_to(place):
                    place.parent.mkdir(parents=True, exist_ok=True)
                write(content, member.size, place)
    devkit = _parsed(folder, path)
    target.commit("dev", {"dev": folder}, {})
    return devkit


def _parsed(folder: Path, path: Path) -> Devkit:
    """Reads the devkit's two files as torchvision's parse_devkit_archive does: classes are synsets without children."""
    for name in (META, GROUND_TRUTH):
        if not (folder / name).is_file():
            raise UserError(f"{path}: no {name} in it; expected the devkit of tasks 1 and 2, {DEVKIT}")
    import scipy.io

    try:
        with (folder / META).open("rb") as file:
            synsets: Any = scipy.io.loadmat(file, squeeze_me=True)["synsets"]
        rows = [row for row in (tuple(row) for row in synsets) if row[4] == 0]
        ids = {int(row[0]): str(row[1]) for row in rows}
        words = {str(row[1]): tuple(str(row[2]).split(", ")) for row in rows}
        numbers = (folder / GROUND_TRUTH).read_text(encoding="utf-8").split()
        val = [ids[int(number)] for number in numbers]
    except (ValueError, KeyError, IndexError, TypeError, scipy.io.matlab.MatReadError) as error:
        raise UserError(f"{path}: {META} and {GROUND_TRUTH} in it cannot be parsed: {error!r}") from error
    return Devkit(words, val)


def _write_meta(devkit: Devkit, target: Destination) -> None:
    import torch

    encoded = io.BytesIO()
    torch.save((devkit.words, devkit.val), encoded)
    path = target.work("meta") / "meta.bin"
    names = path.with_name(class_names.BESIDE)
    with writing_to(path):
        path.write_bytes(encoded.getbuffer())
        lines = (f"{wnid} {', '.join(words)}\n" for wnid, words in sorted(devkit.words.items()))
        names.write_text("".join(lines), encoding="utf-8")
    target.commit("meta", {path.name: path, names.name: names}, {})


# ---------------------------------------------------------------------------------------------------- validation images


def _labels(path: Path, devkit: Devkit) -> dict[str, str]:
    """The class of each validation image: the numbers of the devkit are in the order of the sorted names."""
    members = [member.name for member in index(path) if not is_hidden(member.name)]
    names = sorted(archives.image_name(name, str(path)) for name in members)
    if len(names) != len(devkit.val):
        raise UserError(f"{path}: {len(names):,} images in it, but the devkit has labels of {len(devkit.val):,}")
    return dict(zip(names, devkit.val, strict=True))


def _unpack_val(path: Path, labels: dict[str, str], target: Destination) -> None:
    folder = target.work("val")
    with writing_to(folder):
        for name in set(labels.values()):
            (folder / name).mkdir(exist_ok=True)
    size = path.stat().st_size
    with Progress(f"unpacking {path.name}", size) as progress, reporting_damage(path), opened(path) as (source, _):
        contents = ((member.name, member.size, content) for member, content in files(source, path))
        unpacked = unpack_images(contents, str(path), lambda name: folder / labels[name] / name, progress)
    with writing_to(folder):
        for image in folder.glob("*/*"):
            if labels.get(image.name) != image.parent.name:  # left over from an archive that has been replaced since
                image.unlink()
    counts: Counts = {"val": dict(Counter(labels.values()))}
    if unpacked.hidden:
        counts["hidden"] = {"val": unpacked.hidden}
    target.commit("val", {"val": folder}, counts, size)
