"""The page: drop an image, see what the model makes of it, and switch bands and branches off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bandsplit.app import fragments, uploads
from bandsplit.app.answers import Answer, answer, weights_of
from bandsplit.app.of_run import Example
from bandsplit.app.tiles import Tile, tiles
from bandsplit.errors import UserError
from bandsplit.inference import preparation
from bandsplit.inference.classifier import Classifier
from bandsplit.models.cascade import Cascade

CSS = Path(__file__).with_name("page.css").read_text()

THUMBNAIL = 112
"""Side of an example, in pixels."""

CHOOSE = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) trigger("select", {index: Number(button.dataset.index)});
});
"""
"""JavaScript: a click on an example is a `select` event with its number."""


@dataclass(frozen=True, eq=False)
class Shown:
    """The image that the page shows."""

    crop: Tensor
    """(3, H, W)."""
    uri: str
    tiles: list[tuple[str, Tile]]
    """With their data URIs."""
    whole: Answer
    """With all bands and branches on."""


class Page:
    """A model with its examples and cascade, and what the page answers."""

    def __init__(self, model: Classifier, examples: Sequence[Example] = (), cascade: Cascade | None = None) -> None:
        self.model, self.examples, self.cascade = model, examples, cascade
        self.bands, self.branches = list(range(model.description.block**2)), list(range(len(model.bands)))

    def upload(self, path: str, shown: Shown | None, bands: list[int], branches: list[int]) -> list[Any]:
        """An image was dropped -> what is shown now, a notice and `views`; a refused file leaves what was shown."""
        try:
            image = uploads.opened(Path(path))
            shown = self.shown(preparation.prepared(image, self.model.description))
        except UserError as error:
            return [shown, fragments.notice(str(error), error=True), *self.views(shown, bands, branches)]
        height, width = shown.crop.shape[-2:]
        told = f"{Path(path).name}: {image.width:,} × {image.height:,} pixels, cropped to {width} × {height}."
        return [shown, fragments.notice(told), *self.views(shown, bands, branches)]

    def example(self, number: int, bands: list[int], branches: list[int]) -> list[Any]:
        """An example was chosen -> what `upload` returns."""
        chosen = self.examples[number]
        shown = self.shown(chosen.crop)
        told = f"{chosen.name}: a validation image of {self.model.names[chosen.label]}."
        return [shown, fragments.notice(told), *self.views(shown, bands, branches)]

    def shown(self, crop: Tensor) -> Shown:
        """A crop (3, H, W) with its bands and the answer of the whole model."""
        images = [(fragments.uri(tile.pixels), tile) for tile in tiles(self.model, crop)]
        whole = answer(self.model, crop, self.bands, self.branches)
        return Shown(crop, fragments.uri(crop.movedim(0, -1).numpy()), images, whole)

    def views(self, shown: Shown | None, bands: list[int], branches: list[int]) -> list[str]:
        """Prediction, bands, votes and cascade, as HTML, with these bands and branches on."""
        if shown is None:
            return [fragments.EMPTY] * 4
        model = self.model
        off = [k for k in self.bands if k not in bands], [k for k in self.branches if k not in branches]
        now = answer(model, shown.crop, bands, branches) if any(off) else shown.whole
        numbers = [model.description.branches[place].number for place in off[1]]
        weights = weights_of(model, branches).tolist()
        return [
            fragments.prediction(model, shown.uri, shown.whole, now, fragments.switched_off(off[0], numbers)),
            fragments.bands(model, shown.tiles, bands),
            fragments.votes(model, now, weights, branches),
            fragments.cascade(model, self.cascade, shown.whole) if self.cascade else "",
        ]


def theme() -> Any:
    """Gradio's plainest, in the fonts of the system."""
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


def css(page: Page) -> str:
    """page.css, and the number of columns of the bands."""
    return f"{CSS}:root {{ --block: {page.model.description.block}; }}"


def blocks(page: Page, name: str) -> Any:
    """The Gradio blocks of a page."""
    model, block = page.model, page.model.description.block
    with gr.Blocks(title=f"{name} · Bandsplit", analytics_enabled=False, delete_cache=(600, 3600)) as made:
        shown = gr.State(None, time_to_live=3600)
        gr.HTML(fragments.header(model, name))
        with gr.Row(equal_height=True):
            with gr.Column(scale=2, min_width=320, elem_id="panel-image"):
                gr.HTML(_title("Image", f"At most {uploads.MOST_BYTES // 2**20} MiB; it stays on this server."))
                file = gr.File(show_label=False, height=150, elem_id="file")
                notice = gr.HTML()
                if page.examples:
                    gr.HTML(_title("Examples", "Validation images of the run."))
                    examples = [(fragments.uri(_thumbnail(each)), model.names[each.label]) for each in page.examples]
                    gallery = gr.HTML(fragments.examples(examples), js_on_load=CHOOSE, elem_id="examples")
            with gr.Column(scale=5, min_width=320, elem_id="panel-prediction"):
                gr.HTML(_title("Prediction", "Marks on the bars: with all bands and branches on."))
                prediction = gr.HTML(fragments.EMPTY, elem_id="prediction")
        with gr.Row(equal_height=True):
            with gr.Column(scale=1, min_width=320, elem_id="panel-bands"):
                gr.HTML(_title("Bands", f"Coefficient k of every {block} × {block} block, at its place in the block."))
                labels = [(fragments.band_name(k, block), k) for k in page.bands]
                bands = _switches(labels, "bands")
                tiled = gr.HTML(fragments.EMPTY, elem_id="tiles")
            with gr.Column(scale=1, min_width=320, elem_id="panel-branches"):
                gr.HTML(_title("Branches", "Each votes by its own logits; the fusion weighs these."))
                numbers = [(str(each.number), place) for place, each in enumerate(model.description.branches)]
                branches = _switches(numbers, "branches")
                votes = gr.HTML(fragments.EMPTY, elem_id="votes")
                with gr.Column(visible=page.cascade is not None, elem_id="cascade"):
                    gr.HTML(_title("Cascade", "Branch by branch until the image is certain, with everything on."))
                    stages = gr.HTML(fragments.EMPTY)
        views, switches = [prediction, tiled, votes, stages], [bands, branches]
        _on(file.upload, page.upload, [file, shown, *switches], [shown, notice, *views]).then(
            lambda: None, None, file, api_visibility="private", show_progress="hidden"
        )
        for switch in switches:
            _on(switch.change, page.views, [shown, *switches], views)
        if page.examples:

            def chosen(event: gr.EventData, on: list[int], of: list[int]) -> list[Any]:
                return page.example(event.index, on, of)

            _on(gallery.select, chosen, switches, [shown, notice, *views])
    return made


def _on(event: Any, answer: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> Any:
    """All events together are answered one at a time."""
    return event(
        answer, inputs, outputs, api_visibility="private", show_progress="minimal",
        concurrency_id="model", concurrency_limit=1,
    )  # fmt: skip


def _switches(choices: list[tuple[str, int]], name: str) -> Any:
    return gr.CheckboxGroup(
        choices, value=[value for _, value in choices], show_label=False, container=False, elem_id=name,
    )  # fmt: skip


def _title(title: str, told: str) -> str:
    return f"<h2>{title}<small>{told}</small></h2>"


def _thumbnail(example: Example) -> NDArray[np.uint8]:
    image = Image.fromarray(example.crop.movedim(0, -1).numpy())
    return np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS))
