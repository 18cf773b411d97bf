"""Compute, energies and grids of bands in reports, from branches.json."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from bandsplit.reporting import compare, figures, frequency, report, runs
from tests.reporting.test_report import Event, end, finished, groups_of, train, validation, write_run

MACS = ({"64": 100, "32": 30}, {"64": 10, "32": 3})
ENERGY = [100.0, 10.0, None, 0.1]


def with_branches(folder: Path, text: str | None = None) -> Path:
    branches = [{"bands": [k], "parameters": 5, "macs": macs} for k, macs in enumerate(MACS)]
    table = {"branches": branches, "band_energy": ENERGY}
    (folder / "branches.json").write_text(json.dumps(table) if text is None else text)
    return folder


def growing() -> list[Event]:
    """Steps of 10 images: 3 of 32 pixels, then 2 of 64; the line of step 2 is missing."""
    sizes = {1: 32, 3: 32, 4: 64, 5: 64}
    lines = [train(step, step) | {"images": 10 * step, "image_size": size} for step, size in sizes.items()]
    checks = [validation(step, step, 40.0 + step) | {"images": 10 * step} for step in (3, 5)]
    return [*lines[:2], checks[0], *lines[2:], checks[1], end(5, 5)]


def test_training_compute_is_that_of_every_step_summed(tmp_path: Path) -> None:
    """Step by step and branch by branch: forward, and twice that backward."""
    folder = with_branches(write_run(tmp_path / "run", growing()))
    run = runs.read_run(folder)
    expected = [0.0]
    for size in ("32", "32", "32", "64", "64"):
        expected.append(expected[-1] + sum(10 * (macs[size] + 2 * macs[size]) for macs in MACS))
    assert list(run.validation["macs"]) == [expected[3], expected[5]]
    assert run.macs == expected[5]
    (group,) = groups_of(folder)
    curve = figures.group_curve(group, "macs", figures.ACCURACY[0])
    assert dict(curve["mean"]) == {expected[3]: 43, expected[5]: 45}


def test_branches_that_do_not_train_cost_nothing(tmp_path: Path) -> None:
    """The second begins with epoch 1, the first ends after step 4."""
    lines = [train(step, step) | {"images": 10 * step, "image_size": 64, "epoch": step / 2} for step in range(1, 7)]
    check = validation(6, 6, 40.0) | {"images": 60, "stopped_after": [4, None]}
    folder = with_branches(write_run(tmp_path / "run", [*lines, check, end(6, 6)]))
    config = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(config.replace("epochs = 90", "epochs = 90\nstart_epochs = [0, 1]"))
    each = (100, 100, 110, 110, 10, 10)
    assert list(runs.read_run(folder).train["macs"]) == [30 * sum(each[:n]) for n in range(1, 7)]


def test_compute_that_a_run_of_both_sides_does_not_know_is_not_compared_in_the_figure(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"{name}{seed}", growing(), name=name, seed=seed) for name in "ab" for seed in (0, 1)
    ]
    for folder in folders[::2]:
        with_branches(folder)
    groups = groups_of(*folders)
    sides = compare.side("A", folders[:2], groups), compare.side("B", folders[2:], groups)
    assert [*compare.efforts(*sides)] == ["seconds", "step", "macs"]
    figure = compare.compare_figure(*sides)
    figure.draw_without_rendering()
    assert [axes.get_xlabel() for axes in figure.axes] == ["Training time (s)", "Step"]


def test_compute_units() -> None:
    assert figures.axis_unit("macs", 3.1e17) == (1e15, "Training compute (PMACs)")
    assert figures.axis_unit("macs", 5.0) == (1e9, "Training compute (GMACs)")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"branches": [], "band_energy": []}',
        '{"branches": [{"macs": 1}]}',
        '{"branches": [{"parameters": 1, "macs": {}}], "band_energy": [1]}',
        '{"branches": [{"parameters": 1, "macs": {"64": 1}}, {"parameters": 1, "macs": {"32": 1}}], "band_energy": []}',
        '{"branches": [{"parameters": 1, "macs": {"128": 1}}], "band_energy": [1]}',
    ],
)
def test_a_damaged_file_leaves_out_what_it_says(tmp_path: Path, text: str) -> None:
    folder = with_branches(write_run(tmp_path / "run", growing()), text)
    config = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(config.replace('branches = "each"', 'branches = "each"\nonly = [0, 1]'))
    (group,) = groups_of(folder)
    told = f"{folder / 'branches.json'}: damaged; figures and columns of costs and energies are left out"
    assert group.runs[0].remarks == [told]
    assert figures.curves_figure([group], "macs", figures.ACCURACY) is None
    assert figures.curves_figure([group], "step", figures.ACCURACY) is not None
    row = report.make_tables([group])["costs"].text.iloc[0]
    assert list(row[["params (M)", "GMACs", "train TMACs", "images/s"]]) == ["—", "—", "—", "800"]


def test_each_band_stands_at_its_row_and_column(tmp_path: Path) -> None:
    """Band k = u s + v: bands 3 and 1 of block 2 were trained, by two seeds."""
    folders = []
    for seed in (0, 1):
        events = [validation(1, 1, 50, branches=[30 + seed, 20 + seed])]
        folders.append(with_branches(write_run(tmp_path / str(seed), events, seed=seed)))
        config = (folders[-1] / "config.toml").read_text()
        (folders[-1] / "config.toml").write_text(
            config.replace('branches = "each"', 'branches = "each"\nonly = [3, 1]')
        )
    folders.append(write_run(tmp_path / "unknown", [train(1, 1)], seed=2))  # neither validated nor with branches.json
    (folders[-1] / "config.toml").write_text((folders[0] / "config.toml").read_text().replace("seed = 0", "seed = 2"))
    (group,) = groups_of(*folders)
    assert frequency.left_out([group]) == [f"{folders[-1]}, without {what}" for what in ("top-1", "energies")]
    np.testing.assert_array_equal(frequency.accuracy_grid(group), [[np.nan, 20.5], [np.nan, 30.5]])
    energy = frequency.energy_grid(group)
    assert energy is not None
    np.testing.assert_allclose(energy, [[0, -10], [np.nan, -30]], atol=1e-12)


@pytest.mark.parametrize("branches", [[50.0], [50.0] * 4, [50.0] * 36, [50.0] * 64])
def test_heat_maps_are_drawn_for_any_number_of_bands(tmp_path: Path, branches: list[float]) -> None:
    folder = write_run(tmp_path / "run", finished([50.0], branches=branches))
    block = math.isqrt(len(branches))
    config = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(config.replace("block = 2", f"block = {block}"))
    figure = frequency.frequency_figure(groups_of(folder))
    assert (figure is None) == (block == 1)
    if figure is not None:
        (heat_map,) = [axes for axes in figure.axes if axes.get_ylabel() == "u (vertical)"]
        assert heat_map.collections[0].get_array().shape == (block, block)
        assert len(heat_map.texts) == (block**2 if block <= frequency.LARGEST_WRITTEN else 0)
