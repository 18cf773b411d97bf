"""The parts of the page that show an answer, as HTML; page.css has their looks."""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bandsplit.app.answers import Answer, bands_read
from bandsplit.app.tiles import Tile
from bandsplit.inference.classifier import Classifier
from bandsplit.models import cascade as cascades
from bandsplit.models.cascade import Cascade

TOP = 5

LARGEST_LABELED = 4
"""The largest block whose bands have room for all of their label."""

EMPTY = '<p class="empty">No image yet.</p>'


def header(model: Classifier, name: str) -> str:
    """What the model is, in two lines."""
    d = model.description
    kinds = Counter(f"{branch.network.arch}{_times(branch.network.width)}" for branch in d.branches)
    facts = [
        ", ".join(f"{count} {kind}" if len(kinds) > 1 else kind for kind, count in kinds.items()),
        _count(len(model.bands), "branch", "branches"),
        f"block {d.block}: {_count(d.block**2, 'band')}",
        _count(len(model.classes), "class", "classes"),
        f"{d.fusion} fusion",
        f"step {d.training.step:,}",
    ]
    if d.training.top1 is not None:
        facts.append(f"top-1 of its run, mean of all branches: {d.training.top1:.1f} %")
    return f"<header><h1>{escape(name)}</h1><p>{escape(' · '.join(facts))}</p></header>"


def notice(text: str, error: bool = False) -> str:
    """A sentence on the last image."""
    kind = ("refused", "alert") if error else ("told", "status")
    return f'<p class="notice {kind[0]}" role="{kind[1]}">{escape(text)}</p>'


def examples(shown: Sequence[tuple[str, str]]) -> str:
    """Buttons with the data URI and the class of each example."""
    buttons = "".join(
        f'<button type="button" data-index="{i}" title="{escape(name)}"><img src="{uri}" alt="{escape(name)}"></button>'
        for i, (uri, name) in enumerate(shown)
    )
    return f'<div class="examples">{buttons}</div>'


def prediction(model: Classifier, crop: str, whole: Answer, now: Answer, off: str) -> str:
    """The image, the likeliest classes, and what has changed since all was on.

    Args:
        crop: the image as a data URI.
        off: what is switched off, in words; "" if all is on.
    """
    image = f'<img class="crop" src="{crop}" alt="The image as the model sees it">'
    if now.confidences is None:
        words = f"{off}: no branch is left that has a weight, so there is no prediction."
        return f'<div class="prediction">{image}<div><p class="change">{escape(words)}</p></div></div>'
    assert whole.confidences is not None
    rows = []
    for label in now.top(TOP):
        then = f'<i class="then" style="left:{100 * whole.confidences[label]:.2f}%"></i>' if off else ""
        rows.append(_row(model.names[label], _bar(now.confidences[label], then), now.confidences[label]))
    words = change(model.names, whole.confidences, now.confidences, off)
    return (
        f'<div class="prediction">{image}<div><table class="bars">{"".join(rows)}</table>'
        f'<p class="change">{escape(words)}</p></div></div>'
    )


def change(names: Sequence[str], whole: NDArray[np.float64], now: NDArray[np.float64], off: str) -> str:
    """What switching off has changed, in a sentence; confidences (classes,)."""
    if not off:
        return "All bands and branches are on."
    before, after = int(whole.argmax()), int(now.argmax())
    was = f"{names[before]} ({percent(whole[before])})"
    if before == after:
        return f"{off}: still {names[after]}, at {percent(now[after])} instead of {percent(whole[after])}."
    return f"{off}: {names[after]} ({percent(now[after])}) instead of {was}."


def bands(model: Classifier, shown: Sequence[tuple[str, Tile]], on: Collection[int]) -> str:
    """The bands in their places in the block, those that are off faded; tiles with their data URIs."""
    block, read = model.description.block, bands_read(model)
    figures = []
    for k, (uri, tile) in enumerate(shown):
        state = "" if k in on else ' class="off"'
        note = "natural color" if tile.contrast is None else f"contrast × {_two_digits(tile.contrast)}"
        if block > LARGEST_LABELED:
            note = "color" if tile.contrast is None else f"× {_two_digits(tile.contrast)}"
        unread = "" if k in read else "<span>no branch reads it</span>"
        figures.append(
            f'<figure{state}><img src="{uri}" alt="Band {k}"><figcaption><b>{band_name(k, block)}</b>'
            f"<span>{note}</span>{unread}</figcaption></figure>"
        )
    return f'<div class="bands">{"".join(figures)}</div>'


def band_name(k: int, block: int) -> str:
    """Number, row and column of a band; the number alone where bands are many and small."""
    return f"{k}" if block > LARGEST_LABELED else f"{k} ({k // block}, {k % block})"


def votes(model: Classifier, now: Answer, weights: Sequence[float], on: Collection[int]) -> str:
    """Every branch with its bands, its weight in the fusion, and the class that it votes for."""
    rows = []
    for place, (branch, vote) in enumerate(zip(model.description.branches, now.votes, strict=True)):
        state = "" if place in on else ' class="off"'
        read = ", ".join(map(str, branch.bands)) if len(branch.bands) <= 8 else f"{len(branch.bands)} bands"
        rows.append(
            f"<tr{state}><th>{branch.number}</th><td>{read}</td><td>{weights[place]:.2f}</td>"
            f'<td class="name">{escape(vote.name)}</td><td class="bar">{_bar(vote.confidence)}</td>'
            f"<td>{percent(vote.confidence)}</td></tr>"
        )
    head = "<tr><th>Branch</th><th>Bands</th><th>Weight</th><th class='name'>Vote</th><th></th><th></th></tr>"
    return f'<table class="votes"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


def cascade(model: Classifier, fitted: Cascade, whole: Answer) -> str:
    """The stages of the cascade with all bands and branches on, and the one at which the image leaves."""
    applied = cascades.apply(fitted, whole.logits.permute(1, 0, 2).numpy())
    stop, count = int(applied.stages[0]), len(fitted.order)
    rows = []
    for stage, (place, confidence) in enumerate(zip(fitted.order, applied.confidence[0], strict=True)):
        state = ' class="off"' if stage > stop else ' class="stop"' if stage == stop else ""
        then = f'<i class="then" style="left:{100 * fitted.threshold:.2f}%"></i>' if stage < count - 1 else ""
        what = "stops here" if stage == stop else "goes on" if stage < stop else "not needed"
        rows.append(
            f"<tr{state}><th>{stage + 1}</th><td>{'+ ' * (stage > 0)}branch {model.description.branches[place].number}"
            f'</td><td class="bar">{_bar(confidence, then)}</td><td>{percent(confidence)}</td>'
            f'<td class="name">{what}</td></tr>'
        )
    name, full = (model.names[int(each[0])] for each in (applied.predicted, applied.full))
    if stop == count - 1:
        words = f"Goes through all {count} stages: {name}."
    else:
        same = "as all stages say" if name == full else f"where all stages say {full}"
        above = f"above the threshold of {percent(fitted.threshold)}"
        words = f"Stops after stage {stop + 1} of {count}, {above}: {name}, {same}."
    return f'<p class="change">{escape(words)}</p><table class="votes stages"><tbody>{"".join(rows)}</tbody></table>'


def uri(pixels: NDArray[np.uint8]) -> str:
    """An image (h, w, 3) as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def percent(confidence: float) -> str:
    """Rounded down, so that nothing but certainty is 100 %."""
    return f"{math.floor(1000 * confidence) / 10:.1f}\N{NO-BREAK SPACE}%"


def switched_off(bands: Iterable[int], branches: Iterable[int]) -> str:
    """What is off, in words: "Without bands 1 and 3, and without branch 0"."""
    told = [
        f"{one if len(which) == 1 else many} {_and([str(each) for each in which])}"
        for which, one, many in ((list(bands), "band", "bands"), (list(branches), "branch", "branches"))
        if which
    ]
    return "Without " + ", and without ".join(told) if told else ""


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _row(name: str, bar: str, confidence: float) -> str:
    return f'<tr><th>{escape(name)}</th><td class="bar">{bar}</td><td>{percent(confidence)}</td></tr>'


def _bar(confidence: float, mark: str = "") -> str:
    return f'<div class="track"><i style="width:{100 * confidence:.2f}%"></i>{mark}</div>'


def _two_digits(number: float) -> str:
    return f"{number:.1f}" if number < 9.95 else f"{number:.0f}"


def _times(width: float) -> str:
    return "" if width == 1 else f" × {width:g}"


def _count(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"
