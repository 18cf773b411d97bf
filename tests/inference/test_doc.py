"""The Python of doc/models.md runs as it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bandsplit.inference import weights
from tests.conftest import REPOSITORY
from tests.inference.models import classifier


def test_the_python_of_the_page_runs(
    config_file: Path,
    image_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a folder where a saved model takes the place of the run."""
    pytest.importorskip("huggingface_hub", reason="the extra `hub` is not installed")
    model, here = classifier(config_file), tmp_path / "here"
    (here / "runs/demo-seed0").mkdir(parents=True)
    (here / "data").mkdir()
    (here / "data/demo").symlink_to(image_root)
    weights.write(model, here / "runs/demo-seed0" / weights.NAME)
    monkeypatch.chdir(here)
    page = (REPOSITORY / "doc/models.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {})
    expected = model.predict(here / "data/demo/val/disc_striped/00000.jpg", k=3)
    assert f"{expected.top[0].name}: {expected.top[0].confidence:.1%}" in capsys.readouterr().out
    for name in re.findall(r"`model\.(\w+)", page):
        assert name == "init_from" or hasattr(model, name)
