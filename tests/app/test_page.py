"""The page in a headless Chromium: real clicks, real uploads, and files that no page should fall over."""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loguru import logger
from PIL import Image

from bandsplit.app import fragments, of_run
from bandsplit.cli import app
from bandsplit.errors import UserError
from bandsplit.inference.classifier import Guess
from bandsplit.inference.loading import load
from bandsplit.models.cascade import Cascade
from bandsplit.models.fusion import Fusion
from bandsplit.runs import checkpoint
from bandsplit.runs.fitted import FILE, Fitted, HeldOut, preparation
from bandsplit.runs.restored import Restored
from tests.app.files import photograph
from tests.conftest import REPOSITORY
from tests.inference.models import classifier

CHROMIUM = shutil.which("chromium")

in_a_browser = [
    pytest.mark.slow,
    pytest.mark.xdist_group("page"),  # one server, which has seen the uploads at its end
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH"),
    pytest.mark.skipif(find_spec("playwright") is None, reason="playwright is not installed"),
    pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed"),
]


def browser_test(test: Callable[..., None]) -> Callable[..., None]:
    for mark in in_a_browser:
        test = mark(test)
    return test


def test_without_gradio_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"bandsplit app needs Gradio: pip install -e \.\[app\]"):
        app.main([str(tmp_path)])


def test_events_that_need_the_model_wait_for_each_other(config_file: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    from bandsplit.app import page

    example = of_run.Example("a.jpg", 0, torch.zeros(3, 32, 32, dtype=torch.uint8))
    made = page.blocks(page.Page(classifier(config_file), [example]), "tiny")
    limits = [(each.concurrency_id, each.concurrency_limit) for each in made.fns.values() if each.name != "<lambda>"]
    assert limits == [("model", 1)] * 4  # an upload, two groups of switches, an example


# Server and browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(finished: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with a cascade, whose first stage is never certain enough and whose second always is."""
    path = tmp_path_factory.mktemp("app") / "tiny"
    shutil.copytree(finished(1), path, symlinks=True)
    branches = Restored.of(path, "best").fitted_branches
    learned = Fusion([0.4, 0.3, 0.2, 0.1], 2.0, 20.0)
    cascade = Cascade([2, 0, 1], [0.2, 0.4, 0.3], [1e-9, 1e3, 1.0], 0.2, 1.0)
    fitted = Fitted(branches, HeldOut(40, 40, 0.25, 0, ""), {"mean": learned, "learned": learned}, cascade)
    fitted.write(checkpoint.find(path / "checkpoints", "best") / FILE)
    return path


def test_a_cascade_of_another_preprocessing_is_told(run_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run_dir, tmp_path / "copy", symlinks=True))
    path = checkpoint.find(copy / "checkpoints", "best") / FILE
    fitted = Fitted.read(path)
    assert fitted is not None
    now = preparation(Restored.of(copy, "best").config.data)
    model, told = load(copy), list[str]()
    sink = logger.add(told.append, format="{message}", level="WARNING")
    for size in (now["resize_size"], 99):
        replace(fitted, held_out=replace(fitted.held_out, prepared={**now, "resize_size": size})).write(path)
        assert of_run.cascade(copy, "best", model) == fitted.cascade
    logger.remove(sink)
    (only,) = told
    assert f"{path}: fusion was fitted on images prepared with" in only
    assert "'resize_size': 99" in only


def test_a_cascade_is_for_the_weights_that_it_was_fitted_for(run_dir: Path) -> None:
    model = load(run_dir)
    assert of_run.cascade(run_dir, "best", model) is not None
    with torch.no_grad():
        next(model.branches[3].parameters()).add_(1)  # trained anew, in as many steps
    assert of_run.cascade(run_dir, "best", model) is None


@pytest.fixture(scope="module")
def url(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the command, running; it ends by Ctrl-C, and leaves no upload behind."""
    folder = tmp_path_factory.mktemp("uploads")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "import sys; from bandsplit.cli import app, entry; entry.run(lambda: app.main(sys.argv[1:]))"
    server = subprocess.Popen(
        [sys.executable, "-c", code, str(run_dir), "--port", str(port)],
        env={**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(REPOSITORY / "src")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line == f"Serving {run_dir} at http://127.0.0.1:{port}/; Ctrl-C ends it\n"
    yield f"http://127.0.0.1:{port}/"
    assert any(folder.rglob("*.png")), "uploads were here"
    server.send_signal(signal.SIGINT)
    assert server.wait(30) == 0
    assert not list(folder.iterdir())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """The page, which asks no other host for anything."""
    context = browser.new_context()
    context.set_default_timeout(60_000)
    page, asked = context.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    answer = page.goto(url)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    page.wait_for_selector("#file input[type=file]", state="attached")
    yield page
    outside = [each for each in asked if not each.startswith((url, "data:", "blob:"))]
    assert not outside
    context.close()


def upload(page: Any, path: Path) -> None:
    page.set_input_files("#file input[type=file]", path)


def notice(page: Any, name: str) -> str:
    """The sentence on the file of this name, when it has come."""
    return str(page.locator(".notice", has_text=name).inner_text())


def expect_top(page: Any, top: list[Guess]) -> None:
    """The page shows these classes and confidences, now or soon."""
    from playwright.sync_api import expect

    rows = page.locator("#prediction tr")
    expect(rows.locator("th")).to_have_text([guess.name for guess in top])
    expect(rows.locator("td:last-child")).to_have_text([fragments.percent(guess.confidence) for guess in top])


# Tests ----------------------------------------------------------------------------------------------------------------


@browser_test
def test_an_image_is_classified_and_switches_change_it(page: Any, run_dir: Path, tmp_path: Path) -> None:
    model, path = load(run_dir), tmp_path / "photograph.png"
    photograph(70, 50).save(path)
    expected = model.predict(path)
    upload(page, path)
    assert notice(page, path.name) == "photograph.png: 70 × 50 pixels, cropped to 32 × 32."
    expect_top(page, expected.top)
    votes = page.locator("#votes tbody tr")
    assert votes.count() == 4
    for i, vote in enumerate(expected.votes):
        assert vote.name in votes.nth(i).inner_text()
    assert "Stops after stage 2 of 3" in page.locator("#cascade").inner_text()
    assert page.locator("#tiles figure").count() == 4

    page.get_by_label("3 (1, 1)").click()
    page.get_by_text(re.compile("^Without band 3: ")).wait_for()
    for number in ("1", "2", "3"):
        page.locator("#branches").get_by_label(number, exact=True).click()
    page.get_by_text(re.compile("^Without band 3, and without branches 1, 2 and 3: ")).wait_for()
    page.get_by_label("3 (1, 1)").click()
    page.get_by_text(re.compile("^Without branches 1, 2 and 3: ")).wait_for()
    (alone,) = model.only([0]).predict([path])
    expect_top(page, alone.top)
    page.locator("#branches").get_by_label("0", exact=True).click()
    page.get_by_text("no branch is left that has a weight").wait_for()


@browser_test
def test_an_example_is_classified(page: Any, run_dir: Path, image_root: Path) -> None:
    buttons = page.locator("#examples button")
    assert buttons.count() == 10
    buttons.nth(3).click()
    told = notice(page, "a validation image of")
    name, label = re.fullmatch(r"(\S+): a validation image of (\w+)\.", told).groups()  # type: ignore[union-attr]
    assert name.startswith(f"{label}/")
    expect_top(page, load(run_dir).predict(image_root / "val" / name).top)


@browser_test
def test_awkward_files_are_answered_and_the_page_lives_on(page: Any, run_dir: Path, tmp_path: Path) -> None:
    model, image = load(run_dir), photograph(60, 60)
    good = tmp_path / "good.png"
    image.save(good)
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not an image\n" * 9)
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    (tmp_path / "large.bmp").write_bytes(bytes(21 * 2**20))
    good_bytes = good.read_bytes()
    (tmp_path / "cut.png").write_bytes(good_bytes[: len(good_bytes) // 2])
    refused = {
        "empty.jpg": "is empty",
        "text.jpg": "is not an image",
        "huge.png": "100 million pixels",
        "cut.png": "is damaged or cut off",
    }
    for name, told in refused.items():
        upload(page, tmp_path / name)
        page.locator(".notice.refused", has_text=name).wait_for()
        assert told in notice(page, name)
        assert page.locator("#prediction .empty").count() == 1
    upload(page, tmp_path / "large.bmp")
    page.get_by_text("exceed the maximum allowed size of 20.0 Mb").wait_for()
    alpha = image.copy()
    alpha.putalpha(image.convert("L"))
    read = {
        "cmyk.jpg": image.convert("CMYK"),
        "gray.jpg": image.convert("L"),
        "sixteen.png": Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257),
        "alpha.png": alpha,
        "good.png": image,
    }
    for name, each in read.items():
        each.save(tmp_path / name)
        upload(page, tmp_path / name)
        assert notice(page, name).endswith("60 × 60 pixels, cropped to 32 × 32.")
        expect_top(page, model.predict(tmp_path / name).top)


@browser_test
def test_four_uploads_at_once(browser: Any, url: str, page: Any, run_dir: Path, tmp_path: Path) -> None:
    """Each of four visitors gets the answer for their own image."""
    visitors = [browser.new_page() for _ in range(4)]
    paths = [tmp_path / f"image{i}.png" for i in range(4)]
    for i, (visitor, path) in enumerate(zip(visitors, paths, strict=True)):
        photograph(60, 50, seed=i).save(path)
        visitor.goto(url)
        visitor.wait_for_selector("#file input[type=file]", state="attached")
    for visitor, path in zip(visitors, paths, strict=True):
        upload(visitor, path)
    for visitor, path, expected in zip(visitors, paths, load(run_dir).predict(paths), strict=True):
        notice(visitor, path.name)
        expect_top(visitor, expected.top)
        visitor.close()


DROP = """
files => {
  const drop = new DataTransfer();
  for (const [name, text] of files)
    drop.items.add(new File([Uint8Array.from(atob(text), c => c.charCodeAt(0))], name));
  return drop;
}
"""
"""JavaScript: the files as (name, Base64) -> what a browser tells of files that are dropped."""


@browser_test
def test_of_ten_files_dropped_at_once_the_first_is_taken(page: Any, tmp_path: Path) -> None:
    files = []
    for i in range(10):
        path = tmp_path / f"image{i}.png"
        photograph(60, 50, seed=i).save(path)
        files.append((path.name, base64.b64encode(path.read_bytes()).decode()))
    page.dispatch_event("#file button", "drop", {"dataTransfer": page.evaluate_handle(DROP, files)})
    assert notice(page, "image0.png").startswith("image0.png: 60 × 50 pixels")
    upload(page, tmp_path / "image7.png")
    notice(page, "image7.png")
