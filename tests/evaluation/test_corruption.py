"""Evaluation on corrupted images: from the command to table, JSON, CSV and figure, on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from bandsplit.data.corruption import KINDS, Corruption
from bandsplit.data.crops import Crop
from bandsplit.distributed.ranks import Ranks
from bandsplit.errors import UserError
from bandsplit.evaluation.corrupted import kinds_of
from bandsplit.evaluation.joined import Joined
from tests.conftest import Done, run

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


def test_kinds_are_named_or_all() -> None:
    assert kinds_of("all") == [*KINDS]
    assert kinds_of("jpeg,noise,jpeg") == ["jpeg", "noise"]
    with pytest.raises(
        UserError, match="'nose' given; allowed: all, or some of noise,blur,.*,jpeg; did you mean noise"
    ):
        kinds_of("blur,nose")


def test_accuracy_by_kind_and_strength(
    finished: Callable[..., Path], tmp_path: Path, run_here: Callable[..., Done]
) -> None:
    """The same on one and on three ranks, and as if counted by hand; with a table and a figure beside it."""
    told = []
    for ranks, evaluate in ((1, run_here), (3, partial(run, ranks=3))):
        output = tmp_path / f"{ranks}.json"
        done = evaluate("evaluate.py", finished(1), "--corrupt", "noise", "--output", output)
        assert done.returncode == 0, done.stderr
        told.append(json.loads(output.read_text()))
    results = told[0]["corruption"]["results"]
    assert told[0] == {**told[1], "loss": told[0]["loss"], "ece": told[0]["ece"]}
    assert [(row["kind"], row["value"]) for row in results] == [("noise", value) for value in KINDS["noise"]]

    runs = Joined.of([finished(1)], "best", [], ALONE)
    files = runs.validation_files()
    runs.ensemble.eval()
    for row in (results[1], results[-1]):
        shown = [Crop(corruption=Corruption(row["kind"], row["value"]))]
        right, fused_right = np.zeros(4), 0
        for batch in runs.loader(files, shown):
            with torch.no_grad():
                logits = runs.ensemble(batch.inputs)
            right += (logits.argmax(-1) == batch.labels).sum(-1).numpy()
            fused_right += int((logits.mean(0).argmax(-1) == batch.labels).sum())
        assert row["branch_top1"] == pytest.approx(2 * right)
        assert row["top1"] == pytest.approx(2 * fused_right)

    table = pd.read_csv(tmp_path / "1_corruption.csv")
    assert len(table) == 6 * 5
    plain = table[table["strength"] == 0]
    assert plain.loc[plain["branch"] == "ensemble", "top1"].tolist() == pytest.approx([told[0]["top1"]])
    corrupted = table[(table["strength"] > 0) & (table["branch"] == "ensemble")]
    assert told[0]["corruption"]["mean_top1"] == pytest.approx(corrupted["top1"].mean(), abs=1e-4)
    assert (tmp_path / "1_corruption.png").stat().st_size > 10_000


def test_wrong_kinds_and_speed(
    finished: Callable[..., Path], tmp_path: Path, run_here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_here("evaluate.py", finished(1), "--corrupt", "fog")
    assert (done.returncode, "--corrupt: 'fog' given; allowed: all, or some of noise," in done.stderr) == (2, True)
    monkeypatch.setattr("bandsplit.evaluation.speed._SECONDS", 0.1)
    done = run_here("evaluate.py", finished(1), "--latency", "--output", tmp_path / "x.json")
    assert done.returncode == 0, done.stderr
    speed = json.loads((tmp_path / "x.json").read_text())["speed"]
    assert speed["batch_size"] == 12
    assert 0 < speed["latency_ms"] <= speed["latency_p95_ms"]
    assert speed["images_per_second"] > 0
    assert speed["networks_images_per_second"] > 0
    assert f"{speed['networks_images_per_second']:,.0f} images/s; batches of 12" in done.stdout
