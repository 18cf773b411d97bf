"""A validation part for a data set that has none: some images of each class, chosen by the seed."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

from bandsplit.data import folders
from bandsplit.data.prepare import held_out, links, summary
from bandsplit.data.prepare.destination import Job, opened
from bandsplit.data.prepare.links import Link
from bandsplit.errors import UserError
from bandsplit.paths import reading_from

NEXT = "{train} CONFIG --set data.root={root} --set data.classes={classes}"


def prepare(source: Path, to: Path, share: Fraction | int, seed: int, link: Link) -> str:
    """Makes `to`/train and `to`/val from the class folders in `source`/train, or in `source`; returns a summary.

    The source stays as it is: the images in `to` are links to it, or copies.

    Args:
        share: images of each class for validation: a fraction (rounded, at least one) or a count.
    """
    source = source.absolute()
    with reading_from(source):
        if not source.is_dir():
            raise UserError(f"--from: {source}: no such folder")
        folder = source / "train" if (source / "train").is_dir() else source
    if to.absolute().is_relative_to(folder):
        raise UserError(f"--to: {to} is in {folder}, where it would be a class; choose a folder elsewhere")
    found = folders.walk(folder)
    images: dict[str, list[str]] = {name: [] for name in found.classes}
    for path in map(os.fsdecode, found.names.to_pylist()):
        name, _, image = path.partition("/")
        images[name].append(image)
    counts = {name: _val_images(name, len(names), share, folder) for name, names in images.items()}

    used: set[Link] = set()
    job = Job("split", {"from": str(folder), "share": str(share), "seed": seed, "link": link})
    with opened(to, job) as target:
        if target.result is None:
            target.require_space(int(found.sizes.sum()) if link == "copy" else 0)
            for name, names in images.items():
                if target.is_finished(name):
                    continue
                val = held_out.chosen(names, counts[name], seed, name)
                work = {part: target.emptied(f"{part}/{name}") for part in ("train", "val")}
                for image in names:
                    part = "val" if image in val else "train"
                    used.add(links.place(folder / name / image, work[part] / image, link))
                target.commit(
                    name,
                    {f"{part}/{name}": place for part, place in work.items()},
                    {"train": {name: len(names) - len(val)}, "val": {name: len(val)}},
                )
            target.finish()
        result = target.result
        assert result is not None
    notes = links.described(used, link, folder)
    if found.passed_over:
        notes.append(f"passed over: {'; '.join(found.passed_over)}")
    return summary.lines(target.root, result, NEXT, *notes)


def _val_images(name: str, count: int, share: Fraction | int, folder: Path) -> int:
    wanted = max(1, round(share * count)) if isinstance(share, Fraction) else share
    if wanted >= count:
        raise UserError(
            f"{folder / name}: {count} images, of which {wanted} would be held out; none are left to train on"
        )
    return wanted
