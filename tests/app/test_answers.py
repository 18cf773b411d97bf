"""What the page says: the answers of `predict`, of some of the branches, and of images without some of their bands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bandsplit.app import fragments
from bandsplit.app.answers import answer, bands_read, weights_of
from bandsplit.app.tiles import tiles
from bandsplit.evaluation.cascade import Staged
from bandsplit.inference import preparation
from bandsplit.inference.classifier import Classifier
from bandsplit.models.cascade import Cascade
from bandsplit.spectral import transforms
from tests.app.files import photograph
from tests.inference.models import classifier

ALL = range(4)


def crop_of(model: Classifier, seed: int = 0) -> torch.Tensor:
    return preparation.prepared(photograph(60, 50, seed), model.description)


def fitted(model: Classifier, *weights: float) -> Classifier:
    return Classifier(replace(model.description, fusion="learned", weights=weights), model.state_dict())


def test_with_everything_on_it_is_predict(config_file: Path) -> None:
    model = fitted(classifier(config_file), 0.7, 0.0, 1.5, 0.2)
    image = photograph(60, 50)
    expected, found = (
        model.predict(image, k=10),
        answer(model, preparation.prepared(image, model.description), ALL, ALL),
    )
    assert found.top(10) == [guess.label for guess in expected.top]
    assert found.confidences is not None
    assert found.confidences[found.top(10)] == pytest.approx([guess.confidence for guess in expected.top])
    assert found.votes == expected.votes


@pytest.mark.parametrize("method", ["mean", "learned"])
def test_branches_that_are_on_are_the_model_of_these(config_file: Path, method: str) -> None:
    model = classifier(config_file)
    if method == "learned":
        model = fitted(model, 0.7, 0.0, 1.5, 0.2)
    crop, some = crop_of(model), model.only([0, 2])
    part, whole = answer(some, crop, ALL, range(2)), answer(model, crop, ALL, [0, 2])
    np.testing.assert_allclose(whole.confidences, part.confidences, rtol=1e-5)
    assert weights_of(model, [0, 2])[[0, 2]].tolist() == pytest.approx(list(some.description.weights))
    assert answer(model, crop, ALL, []).confidences is None
    if method == "learned":
        assert answer(model, crop, ALL, [1]).confidences is None, "a branch without weight"


@pytest.mark.parametrize("transform", ["dct2d", "dct1d", "identity"])
def test_without_a_band_it_is_the_image_without_it(config_file: Path, transform: str) -> None:
    """The image is put together again from the other bands, and classified as it is."""
    model = classifier(config_file, f"split.transform={transform}", "split.branches=[[0], [1, 2], [3, 0]]")
    crop = crop_of(model)
    bands = model.split(crop[None])
    bands[[1, 3]] = 0
    image = transforms.merge(bands, model.matrix, 2) * model.std + model.mean
    with torch.no_grad():
        expected = model.branch_logits(image / 255)
    found = answer(model, crop, [0, 2], range(3))
    torch.testing.assert_close(found.logits, expected, rtol=1e-3, atol=1e-4)
    assert bands_read(model) == [0, 1, 2, 3]


def test_tiles_show_what_is_in_the_bands(config_file: Path) -> None:
    pixels = classifier(config_file, "split.transform=identity")
    crop = crop_of(pixels)
    for k, tile in enumerate(tiles(pixels, crop)):
        assert tile.contrast is None
        assert np.array_equal(tile.pixels, crop[:, k // 2 :: 2, k % 2 :: 2].movedim(0, -1).numpy())
    low, *details = tiles(classifier(config_file, "split.scale=0"), crop)
    blocks = crop.double().unfold(1, 2, 2).unfold(2, 2, 2).mean((-2, -1)).movedim(0, -1).numpy()
    assert np.abs(low.pixels - blocks).max() <= 0.51
    for k, tile in enumerate(details):
        assert tile.contrast is not None
        assert tile.contrast > 1
        assert tile.pixels.min() == 0
        assert tile.pixels.max() == 255
        assert tile.pixels.mean() == pytest.approx(127.5, abs=8), k
    (flat, *nothing) = tiles(classifier(config_file), torch.full((3, 32, 32), 200, dtype=torch.uint8))
    assert (flat.pixels == 200).all()
    assert all(((tile.pixels == 127) | (tile.pixels == 128)).all() for tile in nothing)


@pytest.mark.parametrize("threshold", [0.0, 0.12, 0.99])
def test_the_cascade_stops_where_it_does_when_it_is_run(config_file: Path, threshold: float) -> None:
    """As the stages of `evaluate.py --cascade` on the same image."""
    model = classifier(config_file)
    fitted = Cascade([2, 0, 1], [0.9, 0.5, 0.4], [1.0, 1.2, 0.9], threshold, 1.0)
    crop = crop_of(model)
    staged = Staged(model, fitted, 1)  # type: ignore[arg-type]
    with torch.inference_mode():
        staged.add(model.inputs(crop[None]))
        predicted, (stage,) = staged.finish()
    shown = fragments.cascade(model, fitted, answer(model, crop, ALL, ALL))
    assert shown.count("goes on") == stage
    assert shown.count("not needed") == 2 - stage
    assert f": {model.names[int(predicted[0])]}" in shown
    assert ("Goes through all 3 stages" in shown) == (stage == 2)


def test_the_header_names_every_network(config_file: Path) -> None:
    assert "<p>resnet18 × 0.125 · 4 branches · " in fragments.header(classifier(config_file), "")
    with config_file.open("a") as config:
        config.write("".join(f"[[branch]]\nbands = [{k}]\nwidth = {0.25 / (1 + (k > 0))}\n" for k in range(3)))
    assert "<p>1 resnet18 × 0.25, 2 resnet18 × 0.125 · 3 branches · " in fragments.header(classifier(config_file), "")


def test_names_are_text_and_certainty_is_not_claimed(config_file: Path) -> None:
    model = classifier(config_file)
    names = ("<script>alert(1)</script>", *model.names[1:])
    model = Classifier(replace(model.description, names=names), model.state_dict())
    crop = crop_of(model)
    now = answer(model, crop, ALL, ALL)
    shown = fragments.prediction(model, "", now, now, "") + fragments.votes(model, now, [1] * 4, ALL)
    shown += fragments.header(model, names[0]) + fragments.notice(names[0]) + fragments.examples([("", names[0])])
    assert "<script" not in shown
    assert fragments.percent(0.99999) == "99.9\N{NO-BREAK SPACE}%"
    assert fragments.percent(1.0) == "100.0\N{NO-BREAK SPACE}%"


def test_what_has_changed_is_told_in_a_sentence() -> None:
    names, cat, dog = ("cat", "dog"), np.array([0.8, 0.2]), np.array([0.4, 0.6])
    off = fragments.switched_off([1, 3], [0])
    assert off == "Without bands 1 and 3, and without branch 0"
    space = "\N{NO-BREAK SPACE}"
    assert fragments.change(names, cat, dog, off) == f"{off}: dog (60.0{space}%) instead of cat (80.0{space}%)."
    still = fragments.change(names, cat, np.array([0.7, 0.3]), fragments.switched_off([], [2]))
    assert still == f"Without branch 2: still cat, at 70.0{space}% instead of 80.0{space}%."
    assert fragments.change(names, cat, cat, fragments.switched_off([], [])) == "All bands and branches are on."
