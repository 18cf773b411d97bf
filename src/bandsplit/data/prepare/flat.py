"""Class folders from a flat folder of images and a list of their labels, as validation sets are often handed out."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from bandsplit.data.prepare import links, summary
from bandsplit.data.prepare.archives import is_hidden, is_image, require_safe
from bandsplit.data.prepare.destination import Job, opened
from bandsplit.data.prepare.links import Link
from bandsplit.data.prepare.summary import some
from bandsplit.errors import UserError
from bandsplit.paths import reading_from

NEXT = "{evaluate} RUN --set data.root={parent} --set data.val={name}"

BOXES = re.compile(r"(\S+)(\s+\d+){4}(\s+\S+(\s+\d+){4})*")
"""Kaggle's list of ImageNet's validation images: the class and a box, once for each object."""


def prepare(source: Path, listing: Path, to: Path, classes: Path | None, link: Link) -> str:
    """Makes `to`/CLASS/NAME of each image of the folder `source` that is listed; returns a summary.

    The source stays as it is: the images in `to` are links to it, or copies.

    Args:
        listing: a line an image: name and label, in CSV (with or without a header), separated by tabs, or by blanks,
            where the label is the last word.  Further columns of CSV and tabs are not read.  The name may lack its
            folder and its suffix.
        classes: a file with the name of each class a line, for labels that are their numbers from 0.
    """
    source = source.absolute()
    if to.absolute().is_relative_to(source):
        raise UserError(f"--to: {to} is in {source}, the folder that is not to be changed; choose a folder elsewhere")
    images = _images(source)
    labels = _labels(listing, _by_any_name(images))
    folders = _folders(set(labels.values()), classes, listing)
    by_class: dict[str, list[str]] = {}
    for name, label in sorted(labels.items()):
        by_class.setdefault(folders[label], []).append(name)

    used: set[Link] = set()
    options = {
        "from": str(source),
        "list": str(listing.absolute()),
        "classes": classes and str(classes.absolute()),
        "link": link,
    }
    with opened(to, Job("flat", options)) as target:
        if target.result is None:
            target.require_space(links.needed_bytes((source / name for name in labels), link))
            for folder, names in sorted(by_class.items()):
                if not target.is_finished(folder):
                    work = target.emptied(folder)
                    used |= {links.place(source / name, work / name, link) for name in names}
                    target.commit(folder, {folder: work}, {"": {folder: len(names)}})
            target.finish()
        result = target.result
        assert result is not None
    not_listed = len(images) - len(labels)
    notes = links.described(used, link, source)
    if not_listed:
        notes.append(f"{not_listed:,} images are not in {listing} and are left out")
    return summary.lines(target.root, result, NEXT, *notes)


def _images(source: Path) -> list[str]:
    """Names of the images in a folder, at any depth."""
    with reading_from(source):
        if not source.is_dir():
            raise UserError(f"--from: {source}: no such folder")
        names = [str(path.relative_to(source)) for path in source.rglob("*") if is_image(path.name) and path.is_file()]
    names = sorted(name for name in names if not is_hidden(name))
    if not names:
        raise UserError(f"--from: {source}: no images in it")
    return names


def _by_any_name(images: list[str]) -> dict[str, str]:
    """Each image under its name, and without its folder and suffix where that leaves no doubt."""
    found: dict[str, set[str]] = {}
    for name in images:
        path = PurePosixPath(name)
        for short in {path.name, str(path.with_suffix("")), path.stem}:
            found.setdefault(short, set()).add(name)
    return {short: min(names) for short, names in found.items() if len(names) == 1} | {name: name for name in images}


def _labels(listing: Path, images: dict[str, str]) -> dict[str, str]:
    """The label of each image that is listed.

    Raises UserError for a line without a label, an image that is not there, and one with two labels.
    """
    labels: dict[str, str] = {}
    missing: list[str] = []
    for number, row in _rows(listing):
        if len(row) < 2 or not row[1]:
            raise UserError(f"{listing}, line {number}: {' '.join(row)!r}, expected a name and a label")
        given, label = row[:2]
        require_safe(given, str(listing))
        boxes = BOXES.fullmatch(label)
        label = boxes[1] if boxes else label
        name = images.get(given) or images.get(PurePosixPath(given).name)
        if name is not None:
            if labels.setdefault(name, label) != label:
                raise UserError(f"{listing}, line {number}: {given!r} has the label {label!r} and {labels[name]!r}")
        elif number > 1:  # else a header
            missing.append(given)
    if missing or not labels:
        raise UserError(f"{listing}: {len(missing):,} images that are not there: {some(missing) or 'none is listed'}")
    return labels


def _rows(listing: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and columns of each line that is not empty."""
    with reading_from(listing):
        lines = listing.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    first = next((line for line in lines if line.strip()), "")
    delimiter = next((character for character in "\t," if character in first), None)
    for number, line in enumerate(lines, 1):
        if line.strip():
            columns = (
                line.strip().rsplit(None, 1) if delimiter is None else next(csv.reader([line], delimiter=delimiter))
            )
            yield number, [column.strip() for column in columns]


def _folders(labels: set[str], classes: Path | None, listing: Path) -> dict[str, str]:
    """The class folder of each label.

    Numbers stand for the lines of `classes`; without, they get leading zeros, since folders are sorted by name.
    """
    numbers = all(label.isascii() and label.isdigit() for label in labels)
    if classes is not None:
        with reading_from(classes):
            names = classes.read_text(encoding="utf-8-sig").split("\n")
        names = [name.strip() for name in names if name.strip()]
        known = {str(number): name for number, name in enumerate(names)} if numbers else {name: name for name in names}
        keys = {label: str(int(label)) if numbers else label for label in labels}
        odd = sorted(label for label, key in keys.items() if key not in known)
        if odd:
            allowed = f"0 to {len(names) - 1}" if numbers else "a name in it"
            raise UserError(f"{listing}: the labels {some(odd)} are not in {classes}; expected {allowed}")
        folders = {label: known[key] for label, key in keys.items()}
    else:
        width = max(len(label) for label in labels)
        folders = {label: label.zfill(width) if numbers else label for label in labels}
    for folder in folders.values():
        if "/" in folder or is_hidden(folder):
            raise UserError(f"{classes or listing}: {folder!r} cannot be the name of a class folder")
    return folders
