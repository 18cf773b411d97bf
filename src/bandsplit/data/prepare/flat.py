"""Class folders from a flat folder of images and a list of their labels, as validation sets are often handed out."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from bandsplit.data.folders import is_labeled
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
            suffix, and have fewer or more folders than the image has in `source`.
        classes: a file with the name of each class a line, for labels that are their numbers from 0.
    """
    source = source.absolute()
    if to.absolute().is_relative_to(source):
        raise UserError(f"--to: {to} is in {source}, the folder that is not to be changed; choose a folder elsewhere")
    images = _images(source)
    labels = _labels(listing, source, _Names(images))
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


class _Names:
    """Finds images by their names in a list."""

    def __init__(self, images: Sequence[str]) -> None:
        """`images`: paths relative to their folder."""
        paths = [(path, str(path)) for path in map(PurePosixPath, images)]
        self._whole = _unique((str(path.with_suffix("")), image) for path, image in paths) | {x: x for x in images}
        self._ends = _unique(
            (end, image) for path, image in paths for each in (path, path.with_suffix("")) for end in _ends(each)
        )

    def image(self, given: PurePosixPath) -> str | None:
        """The image whose path, with or without its suffix, is `given`, or ends with it, or is an end of it.

        None: several are.  Raises KeyError if none is.
        """
        name = str(given)
        for known, key in ((self._whole, name), (self._ends, name), *((self._whole, end) for end in _ends(given))):
            if key in known:
                return known[key]
        raise KeyError(name)


def _unique(named: Iterable[tuple[str, str]]) -> dict[str, str | None]:
    """Name -> image; None for a name of several images."""
    found: dict[str, str | None] = {}
    for name, image in named:
        found[name] = image if found.get(name, image) == image else None
    return found


def _ends(path: PurePosixPath) -> list[str]:
    """The path without its first folder, first two folders, and so on, to its name."""
    return [str(PurePosixPath(*path.parts[first:])) for first in range(1, len(path.parts))]


def _labels(listing: Path, source: Path, images: _Names) -> dict[str, str]:
    """The label of each image that is listed.

    Raises UserError for a line without a label, an image that is not there, a name of several, and one with two labels.
    """
    labels: dict[str, str] = {}
    missing: list[str] = []
    several: list[str] = []
    header: tuple[str, str] | None = None
    for line, (number, row) in enumerate(_rows(listing)):
        if len(row) < 2 or not row[1]:
            raise UserError(f"{listing}, line {number}: {' '.join(row)!r}, expected a name and a label")
        given, label = row[:2]
        path = PurePosixPath(given)
        path = path.relative_to(source) if path.is_relative_to(source) else path
        require_safe(str(path), str(listing))
        boxes = BOXES.fullmatch(label)
        label = boxes[1] if boxes else label
        try:
            name = images.image(path)
        except KeyError:
            if line or is_image(given):
                missing.append(given)
            else:
                header = given, label
            continue
        if name is None:
            several.append(given)
        elif labels.setdefault(name, label) != label:
            raise UserError(f"{listing}, line {number}: {given!r} has the label {label!r} and {labels[name]!r}")
    if header and is_labeled(header[1], labels.values()):
        missing.insert(0, header[0])
    if several:
        raise UserError(
            f"{listing}: {len(several):,} names that fit several images each: {some(several)}; give them as they are "
            f"in {source}, with folders and suffix"
        )
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
