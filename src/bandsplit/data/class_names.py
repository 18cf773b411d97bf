"""Readable names of classes, from the files in which they are handed out.

They are shown to people and change nothing else: classes are known by their folders or labels.
"""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from loguru import logger

from bandsplit.config.schema import Data
from bandsplit.errors import UserError
from bandsplit.paths import expanded, reading_from

BESIDE = "class_names.txt"
"""The file in `data.root` that is read where `data.class_names` is not given."""

TIMM = "timm"

_EXPECTED = (
    'a class and its name per line ("n01440764 tench"), or one name per class in their order, as text, .csv or .json; '
    "torchvision's meta.bin; or timm"
)

Pair = tuple[str, str]


def readable(classes: Sequence[str], data: Data) -> list[str]:
    """The name of each class; a class that has none keeps its own, which is logged once.

    Raises UserError if `data.class_names` cannot be read or understood, names a class twice or none of these classes.
    Where it is not given and the file in `data.root` is such a one, that is logged instead.
    """
    try:
        named = _names(classes, data)
    except UserError as error:
        if data.class_names is not None:
            raise
        _warn(f"{error}; classes keep the names of their folders")
        return list(classes)
    unnamed = [name for name in classes if not named.get(name)]
    if named and unnamed:
        _warn(f"{data.class_names or BESIDE}: no name for {len(unnamed):,} of {len(classes):,} classes, such as "
              f"{unnamed[0]}, which keep those of their folders")  # fmt: skip
    return [named.get(name) or name for name in classes]


@cache
def _warn(message: str) -> None:
    logger.warning("data.class_names: {}", message)


def _names(classes: Sequence[str], data: Data) -> dict[str, str]:
    """Names by class, also of other classes; none where `data.class_names` is not given and no file is there."""
    if data.class_names == TIMM:
        where, pairs = TIMM, _of_timm()
    else:
        path = expanded(data.root, "data.root") / expanded(data.class_names or BESIDE, "data.class_names")
        with reading_from(path):
            if not path.is_file():
                if data.class_names is None:
                    return {}
                raise UserError(f"data.class_names: {path}: no such file; expected {_EXPECTED}")
            where, pairs = str(path), _pairs(path, classes)
    named: dict[str, str] = {}
    for known_as, name in pairs:
        if known_as in named:
            raise UserError(f"{where}: {known_as!r} is named twice, {named[known_as]!r} and {name!r}")
        named[known_as] = " ".join(name.split())
    if not any(named.get(name) for name in classes):
        example = next(iter(named), None)
        raise UserError(f"{where}: none of the {len(classes):,} classes, such as {classes[0]!r}, is named in it"
                        + (f", but {example!r} is" if example else "") + f"; expected {_EXPECTED}")  # fmt: skip
    return named


def _pairs(path: Path, classes: Sequence[str]) -> Sequence[Pair]:
    if path.suffix == ".bin":
        return _of_torchvision(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=_Object) if path.suffix.lower() == ".json" else None
    except ValueError as error:  # not UTF-8, or no JSON
        raise UserError(f"{path}: cannot be understood: {error}; expected {_EXPECTED}") from None
    if content is not None:
        return _of_json(path, content, classes)
    lines = {n: line.strip() for n, line in enumerate(text.split("\n"), 1) if line.strip()}
    if path.suffix.lower() == ".csv":
        rows = {n: next(csv.reader([line])) for n, line in lines.items()}
    else:
        rows = {n: line.split("\t" if "\t" in line else None, 1) for n, line in lines.items()}
    if len(lines) == len(classes) and not {row[0].strip() for row in rows.values()} & set(classes):
        return _in_order(path, list(lines.values()), classes)
    for n, row in rows.items():
        if len(row) < 2:
            raise UserError(f"{path}, line {n}: {lines[n]!r} given; expected a class and its name")
    return [(row[0].strip(), row[1]) for row in rows.values()]


class _Object(list[tuple[str, Any]]):
    """Keys and values of a JSON object, in which a key may be there twice."""


def _of_json(path: Path, content: object, classes: Sequence[str]) -> Sequence[Pair]:
    """{class: name}, Keras' {index: [class, name]}, or names in the order of the classes."""
    if isinstance(content, _Object) and _are_texts(value for _, value in content):
        return content
    if isinstance(content, _Object) and all(_is_pair(value) for _, value in content):
        return [(value[0], value[1]) for _, value in content]
    if isinstance(content, list) and _are_texts(content):
        return _in_order(path, content, classes)
    raise UserError(f'{path}: neither {{class: name}} nor {{"0": [class, name]}} nor a list of names in the order of '
                    "the classes")  # fmt: skip


def _are_texts(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and _are_texts(value)


def _in_order(path: Path, names: Sequence[str], classes: Sequence[str]) -> list[Pair]:
    if len(names) != len(classes):
        raise UserError(f"{path}: {len(names):,} names in it, but there are {len(classes):,} classes")
    return list(zip(classes, names, strict=True))


def _of_torchvision(path: Path) -> list[Pair]:
    """The file that torchvision's ImageNet keeps: names by class, and the classes of the validation images."""
    import torch

    try:
        words, _ = torch.load(path, weights_only=True)
        return [(known_as, ", ".join(names)) for known_as, names in words.items()]
    except (RuntimeError, ValueError, TypeError, AttributeError, EOFError, KeyError, pickle.UnpicklingError):
        raise UserError(f"{path}: not the meta.bin that torchvision's ImageNet reads, or damaged") from None


def _of_timm() -> Sequence[Pair]:
    """WordNet's names of all classes of ImageNet-1K and -22K."""
    try:
        from timm.data import ImageNetInfo
    except ImportError as error:
        raise UserError(
            f"data.class_names: {TIMM!r} given, but timm cannot be imported ({error}); pip install -e .[timm]"
        ) from None
    subsets: list[Any] = [ImageNetInfo(subset) for subset in ("imagenet-1k", "imagenet-22k")]
    wnids = {wnid for subset in subsets for wnid in subset.label_names()}
    return [(wnid, subsets[0].label_name_to_description(wnid)) for wnid in sorted(wnids)]
