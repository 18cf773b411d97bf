"""What a scan found in a data set, as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from bandsplit.config.schema import Data
from bandsplit.data import class_names
from bandsplit.data.index import Index

_SIDES = (0, 64, 128, 224, 256, 384, 512, 1024, 2048)
"""Lower bounds of the shorter side's bins, in pixels."""

_EXAMPLES = 20


def summary(parts: Mapping[str, Index], data: Data) -> str:
    """Counts per class, formats, sizes, duplicates within and across the parts, and files that are left out.

    Raises UserError as `class_names.readable` does.
    """
    lines: list[str] = []
    for part, index in parts.items():
        lines += [*_part(part, index, data), ""]
    text = "\n".join([*lines, *_duplicates(parts)])
    return text.encode(errors="backslashreplace").decode()  # names of classes may have bytes that are no UTF-8


def bad_files(parts: Mapping[str, Index]) -> pd.DataFrame:
    """One row per file that is left out: part, name, reason."""
    rows = [(part, name, reason) for part, index in parts.items() for name, reason in index.bad()]
    return pd.DataFrame(rows, columns=["part", "name", "reason"])


def _part(part: str, index: Index, data: Data) -> Iterator[str]:
    good = index.good
    yield f"{part}: {good.sum():,} images, {index.column('bytes')[good].sum() / 2**20:,.1f} MiB"
    if index.passed_over:
        yield f"  passed over   {'; '.join(index.passed_over)}"
    yield f"  left out      {(~good).sum():,}"
    yield from _classes(index, class_names.readable(index.classes, data))
    for name in ("format", "color"):
        texts = pd.Series(index.texts(name)[good]).replace("", "unknown").value_counts()
        yield f"  {name:<13} {', '.join(f'{text} {count:,}' for text, count in texts.items())}"
    turned = int((index.column("orientation")[good] > 1).sum())
    if turned:
        yield f"  EXIF          {turned:,} images ask to be rotated or mirrored; they are used as they are stored"
    yield from _sizes(index)
    yield from _listed("left out", index.bad())
    yield from _listed("decoded otherwise by Pillow or on a GPU", index.notes())


def _classes(index: Index, names: Sequence[str]) -> Iterator[str]:
    counts = np.bincount(index.column("label")[index.good], minlength=len(index.classes))
    span = f"{counts.min():,} to {counts.max():,} images, median {np.median(counts):,.0f}"
    yield f"  classes       {len(counts):,}, with {span}"
    order = np.argsort(counts, kind="stable")
    if counts.min() != counts.max():
        few, many = (
            ", ".join(f"{_shown(index.classes[i], names[i])} {counts[i]:,}" for i in some)
            for some in (order[:5], order[::-1][:5])
        )
        yield f"  fewest        {few}"
        yield f"  most          {many}"


def _shown(label: str, name: str) -> str:
    """A class with the first of its names."""
    return label if name == label else f"{name.split(',')[0]} ({label})"


def _sizes(index: Index) -> Iterator[str]:
    shorter = np.minimum(index.column("width"), index.column("height"))[index.good]
    shorter = shorter[shorter > 0]
    if not len(shorter):
        return
    yield f"  shorter side  {shorter.min():,} to {shorter.max():,} pixels, median {np.median(shorter):,.0f}"
    bins = np.bincount(np.digitize(shorter, _SIDES) - 1, minlength=len(_SIDES))
    for low, high, count in zip(_SIDES, (*_SIDES[1:], None), bins, strict=True):
        if count:
            name = f"{low:,} to {high - 1:,}" if high else f"{low:,} and more"
            yield f"  {name:>16}  {count:>11,}  {'#' * round(40 * count / bins.max())}"


def _listed(title: str, files: Sequence[tuple[str, str]]) -> Iterator[str]:
    if files:
        yield f"  {title}:"
        yield from (f"    {name!r}: {why}" for name, why in files[:_EXAMPLES])
        if len(files) > _EXAMPLES:
            yield f"    … and {len(files) - _EXAMPLES:,} more"


def _duplicates(parts: Mapping[str, Index]) -> Iterator[str]:
    """Files of equal content, by checksum."""
    tables = [
        pd.DataFrame({"part": part, "row": np.arange(len(index)), "checksum": index.column("checksum")})[index.good]
        for part, index in parts.items()
    ]
    files = pd.concat(tables)
    files = files[files["checksum"] != 0]
    repeated = files[files.duplicated("checksum", keep=False)]
    groups = repeated.groupby("checksum")["part"].agg(lambda each: " and ".join(sorted(set(each))))
    if not len(groups):
        yield "duplicates: none" if len(files) else "duplicates: unknown, since contents were not read"
        return
    for where, number in groups.value_counts().items():
        yield f"duplicates in {where}: {number:,} contents"
        for checksum in groups.index[groups == where][:5]:
            same = repeated[repeated["checksum"] == checksum]
            names = [f"{part}/{parts[part].named(row)}" for part, row in zip(same["part"], same["row"], strict=True)]
            yield f"    {' = '.join(map(repr, names[:4]))}{' = …' if len(names) > 4 else ''}"
