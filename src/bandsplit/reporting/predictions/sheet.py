"""The contact sheet: the most confident mistakes, with their images."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageOps

from bandsplit.gray import with_8_bits
from bandsplit.reporting.figures import WIDTH
from bandsplit.reporting.predictions.figures import Drawn, short_names
from bandsplit.reporting.predictions.results import Results

COUNT, COLUMNS = 24, 6

SIDE = 192
"""Of a thumbnail, in pixels."""


def mistakes(results: Results, folder: Path | None) -> Drawn:
    """The wrong predictions with the highest confidence, below their true and predicted class.

    Args:
        folder: what the names of images are relative to; None: as the file says.
    """
    p = results.predictions
    root = folder or (Path(p.folder) if p.folder else None)
    if root is None:
        return "the file does not name the folder of the images; --images does"
    wrong = np.flatnonzero(results.predicted != p.labels)
    if not len(wrong):
        return "there are no mistakes"
    if not root.is_dir():
        return f"{root}: no such folder; --images names the folder of the images"
    order = wrong[np.argsort(-results.confidence[wrong], kind="stable")]
    found: dict[int, NDArray[np.uint8]] = {}
    for row in order[: 4 * COUNT].tolist():
        thumbnail = _thumbnail(root / p.names[row])
        if thumbnail is not None:
            found[row] = thumbnail
        if len(found) == COUNT:
            break
    if not found:
        return f"{root / p.names[order[0]]}: not an image; --images names the folder of the images"
    columns = min(COLUMNS, len(found))
    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(WIDTH * columns / COLUMNS, 1.65 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    names = short_names(results, 22)
    for axes, (row, thumbnail) in zip(panels, found.items(), strict=False):
        true, predicted = (names[c] for c in (p.labels[row], results.predicted[row]))
        axes.imshow(thumbnail)
        axes.set_title(f"{true}\n→ {predicted}\n{_percent(results.confidence[row])}", fontsize=6.5, loc="left")
    for axes in figure.axes:
        axes.axis("off")
    return figure


def _percent(confidence: float) -> str:
    """Never 100 %: rounded down."""
    return f"{math.floor(1000 * confidence) / 10:.1f} %"


def _thumbnail(path: Path) -> NDArray[np.uint8] | None:
    """(SIDE, SIDE, 3), the square in the middle; None if there is no such image, or Pillow cannot read it."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (SIDE, SIDE))
            return np.asarray(ImageOps.fit(with_8_bits(image).convert("RGB"), (SIDE, SIDE)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
