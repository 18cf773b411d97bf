"""report.py: grouping, statistics, table, figures and messages, on synthetic run directories."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from PIL import Image

from bandsplit.errors import UserError
from bandsplit.reporting import figures, report, runs, tables
from tests.conftest import REPOSITORY

ROOT = REPOSITORY
Event = dict[str, Any]


def train(step: int, seconds: float, loss: float = 2.0) -> Event:
    measured = {"images_per_second": 800.0, "data_wait": 0.03, "peak_memory_mib": 512.0, "lr": 0.1}
    return {"event": "train", "step": step, "epoch": step / 100, "seconds": seconds, "loss": loss} | measured


def validation(step: int, seconds: float, top1: float, branches: Sequence[float] = (40.0, 20.0)) -> Event:
    place = {"event": "validation", "step": step, "epoch": step / 100, "seconds": seconds}
    return place | {"loss": 1.0, "top1": top1, "top5": top1 + 20, "branch_top1": list(branches)}


def end(step: int, seconds: float) -> Event:
    return {"event": "end", "step": step, "epoch": step / 100, "seconds": seconds, "top1": 0.0, "top5": 0.0}


def curve(top1: Iterable[float], pace: float = 1.0, branches: Sequence[float] = (40.0, 20.0)) -> list[Event]:
    """A training line and a validation at steps 100, 200, ...; `pace` is seconds per step."""
    lines = []
    for step, value in enumerate(top1, start=1):
        lines += [train(step * 100, step * 100 * pace), validation(step * 100, step * 100 * pace, value, branches)]
    return lines


def finished(top1: Sequence[float], pace: float = 1.0, branches: Sequence[float] = (40.0, 20.0)) -> list[Event]:
    return [*curve(top1, pace, branches), end(100 * len(top1), 100 * len(top1) * pace)]


def write_run(
    folder: Path,
    events: Sequence[Event],
    *,
    name: str = "net",
    seed: int = 0,
    batch_size: int = 256,
    tail: str = "",
    threads: int = 2,
) -> Path:
    folder.mkdir(parents=True)
    config = {
        "name": name,
        "seed": seed,
        "data": {"name": "imagenet", "threads": threads},
        "split": {"block": 2, "branches": "each"},
        "train": {"epochs": 90, "batch_size": batch_size},
    }
    (folder / "config.toml").write_text(tomli_w.dumps(config))
    (folder / "environment.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + tail)
    return folder


def groups_of(*folders: Path) -> list[runs.Group]:
    return runs.group_runs([runs.read_run(folder) for folder in folders])


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "src" / "report.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_runs_that_differ_only_in_the_seed_are_one_group(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / str(seed), finished([50, 60]), seed=seed) for seed in range(3)]
    (group,) = groups_of(*folders)
    assert len(group.runs) == 3
    assert group.label == "net"
    assert group.legend([3]) == "net, mean ± 2 SD, n = 3"


def test_keys_without_effect_on_results_do_not_split_a_group(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / str(n), finished([50]), seed=n, threads=n) for n in (1, 2)]
    (group,) = groups_of(*folders)
    assert (group.label, len(group.runs)) == ("net", 2)
    assert group.remarks == ["net: one group of runs that differ in data.threads"]


def test_what_a_run_measures_with_its_seed_does_not_split_a_group(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / str(seed), finished([50]), seed=seed) for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        measured = f'branches = "each"\nscale = 0.5\nsigma = [4.0, 1.{seed}, 1.2, 0.5]'
        config = (folder / "config.toml").read_text()
        (folder / "config.toml").write_text(config.replace('branches = "each"', measured))
    (group,) = groups_of(*folders)
    assert (group.label, len(group.runs)) == ("net", 2)
    assert group.remarks == ["net: one group of runs that differ in split.sigma"]


def test_configurations_of_one_name_are_told_apart_by_the_keys_that_differ(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", finished([50]))
    b = write_run(tmp_path / "b", finished([50]), batch_size=512)
    c = write_run(tmp_path / "c", finished([50]), name="other", batch_size=1024)
    groups = groups_of(a, b, c)
    assert [group.label for group in groups] == ["net (train.batch_size=256)", "net (train.batch_size=512)", "other"]
    assert len({group.color for group in groups}) == 3


def test_a_run_in_progress_stays_apart_from_finished_ones_in_their_color(tmp_path: Path) -> None:
    done = write_run(tmp_path / "done", finished([50, 60]))
    growing = write_run(tmp_path / "growing", curve([51]), seed=1)
    first, second = groups_of(growing, done)
    assert first.label == "net"
    assert second.label == "net (in progress, epoch 1 of 90)"
    assert first.color == second.color


def test_mean_and_two_sigma_on_irregular_times_equal_a_plain_numpy_computation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folders, runs = [], []
    for seed in range(3):
        seconds = np.cumsum(rng.uniform(50, 150, size=12))
        top1 = np.cumsum(rng.uniform(0, 5, size=12))
        runs.append((seconds, top1))
        points = enumerate(zip(seconds, top1, strict=True), start=1)
        events = [validation(100 * k + seed, s, a) for k, (s, a) in points]
        folders.append(write_run(tmp_path / str(seed), [*events, end(1200 + seed, seconds[-1])], seed=seed))
    (group,) = groups_of(*folders)
    result = figures.group_curve(group, "seconds", figures.ACCURACY[0])

    low, high = max(seconds[0] for seconds, _ in runs), min(seconds[-1] for seconds, _ in runs)
    assert (result.index[0], result.index[-1]) == (low, high)
    knots = {float(second) for seconds, _ in runs for second in seconds if low <= second <= high}
    assert set(result.index) == knots
    for second, row in result.iterrows():
        values = []
        for seconds, top1 in runs:
            k = min(max(int(np.searchsorted(seconds, second)), 1), len(seconds) - 1)
            share = (second - seconds[k - 1]) / (seconds[k] - seconds[k - 1])
            values.append(top1[k - 1] + share * (top1[k] - top1[k - 1]))
        mean = sum(values) / 3
        sigma = (sum((value - mean) ** 2 for value in values) / 2) ** 0.5
        assert row["mean"] == pytest.approx(mean, rel=1e-12)
        assert row["two_sigma"] == pytest.approx(2 * sigma, rel=1e-9)


def test_runs_without_a_common_time_are_averaged_point_by_point_where_their_steps_are_equal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One validation each, at other times; those of the other group are of different steps."""
    both = [
        ("net", 100, 100.0, 50.0),
        ("net", 100, 104.0, 54.0),
        ("other", 100, 100.0, 50.0),
        ("other", 200, 104.0, 54.0),
    ]
    folders = [
        write_run(tmp_path / str(n), [validation(step, seconds, top1)], name=name, seed=n)
        for n, (name, step, seconds, top1) in enumerate(both)
    ]
    same, other = groups_of(*folders)
    found = figures.group_curve(same, "seconds", figures.ACCURACY[0])
    assert found.reset_index().to_numpy().tolist() == [[102.0, 52.0, pytest.approx(4 * 2**0.5)]]
    words = f"{other.label}, whose runs cover no common part of the x axis"
    assert figures.left_out([same, other], "seconds", figures.ACCURACY) == [words]
    figure = figures.curves_figure([same, other], "seconds", figures.ACCURACY)
    assert figure is not None
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [same.legend([2])]
    assert figures.branches_figure([other]) is None
    report.report(folders[2:], tmp_path / "out")
    told = capsys.readouterr().out
    assert [line for line in told.splitlines() if line.startswith("accuracy")] == [
        f"accuracy_time: left out: {words}",
        f"accuracy_step: left out: {words}",
        "accuracy_macs: left out, these runs have no data for it",
    ]


def test_seeds_on_hosts_of_different_speed_keep_their_accuracies(tmp_path: Path) -> None:
    """Every point of the time curve is the mean at a step, the last one that of the table."""
    top1 = [20, 50, 70, 80]
    paces = enumerate([1.0, 1.3])
    (group,) = groups_of(*(write_run(tmp_path / str(n), finished(top1, pace), seed=n) for n, pace in paces))
    found = figures.group_curve(group, "seconds", figures.ACCURACY[0])
    assert found["mean"].tolist() == top1
    assert found["two_sigma"].tolist() == [0, 0, 0, 0]
    assert found.index.tolist() == pytest.approx([115, 230, 345, 460])


def test_a_run_that_lacks_values_is_named_and_the_others_of_its_group_are_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One is not validated yet; of another, no line says how long it waited for data."""
    early, slow = [train(100, 90.0), train(200, 180.0)], curve([10, 20])
    for event in slow:
        event.pop("data_wait", None)
    of = {"early": early, "slow": slow, "net0": curve([30, 40]), "net1": curve([50, 60])}
    folders = {name: write_run(tmp_path / name, events, seed=n) for n, (name, events) in enumerate(of.items())}
    (group,) = groups_of(*folders.values())
    mean = figures.group_curve(group, "step", figures.ACCURACY[0])["mean"]
    assert mean.tolist() == [30, 40]
    figure = figures.curves_figure([group], "step", figures.LOSS)
    assert figure is not None
    label = figure.legends[0].get_texts()[0].get_text()
    assert label == "net (in progress, epoch 2 of 90), mean ± 2 SD, n = 3-4 of 4"
    branches = figures.branches_figure([group])
    assert branches is not None
    panel = branches.axes[0]
    assert panel.get_title() == "net\n(in progress, epoch 2 of 90), n = 3"
    assert np.asarray(panel.lines[0].get_ydata()).tolist() == [40, 40]

    report.report([*folders.values()], tmp_path / "out")
    lines = [line for line in capsys.readouterr().out.splitlines() if "without values" in line]
    named = f"left out: {folders['early']}, without values"
    assert lines == [
        f"accuracy_time: {named}",
        f"accuracy_step: {named}",
        f"loss: {named} of Validation loss (ensemble)",
        f"throughput: left out: {folders['slow']}, without values of Waiting for data (% of time)",
        f"branches: {named}",
    ]


def test_table_is_exact_for_a_small_example(tmp_path: Path) -> None:
    # top-1 60, 61, 62: mean 61, sample standard deviation 1. Hours at 18, 36 and 54 s per step: 1, 2, 3.
    folders = [
        write_run(tmp_path / str(n), finished([50, 60 + n], pace=18.0 * (n + 1), branches=[30, 45 + 2 * n]), seed=n)
        for n in range(3)
    ]
    folders.append(write_run(tmp_path / "plain", finished([70], branches=[70]), name="plain"))
    folders.append(write_run(tmp_path / "new", [train(50, 90.0)], name="new"))
    table = tables.results_table(groups_of(*folders))
    *rows, _blank, caption = table.markdown().splitlines()
    assert all(len(row) == len(rows[0]) for row in rows)
    assert [" ".join(row.split()) for row in rows] == [
        "| configuration | n | epochs | steps | top-1 | top-5 | best branch | hours |",
        f"| {'-' * 34} | -: | -----: | ----: | {'-' * 11}: | {'-' * 11}: | {'-' * 11}: | {'-' * 10}: |",
        "| net | 3 | 2 | 200 | 61.00 ± 2.00 | 81.00 ± 2.00 | 47.00 ± 4.00 | 2.00 ± 2.00 |",
        "| plain | 1 | 1 | 100 | 70.00 | 90.00 | — | 0.028 |",
        "| new (in progress, epoch 0.5 of 90) | 1 | 0.5 | 50 | — | — | — | 0.025 |",
    ]
    assert "last validation" in caption
    numbers = table.numbers.set_index("configuration")
    assert list(numbers.loc["net", ["n", "top1", "top1_two_sd", "best_branch_top1", "hours_two_sd"]]) == [
        3,
        61,
        2,
        47,
        2,
    ]
    assert numbers.loc["plain", ["top1_two_sd", "best_branch_top1"]].isna().all()


def steps(run: runs.Run) -> list[int]:
    return [int(step) for step in run.train["step"]]


def test_a_line_that_is_still_being_written_is_not_damaged(tmp_path: Path) -> None:
    run = runs.read_run(write_run(tmp_path / "growing", curve([50, 60]), tail='{"event": "train", "st'))
    assert (steps(run), len(run.validation), run.ended, run.remarks) == ([100, 200], 2, False, [])


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "train", "st{"event": "train", "step": 1, "epoch": 1, "seconds": 1}',  # joined after a kill
        '{"event": "train", "step": 1, "epoch": 1, "seconds": 1}{"event": "end"}',
        '{"event": "train", "step": 1}',
        '{"event": "train", "step": "1", "epoch": NaN, "seconds": 1}',
        '{"event": "validation", "step": 1, "epoch": 1, "seconds": 1}',
        '{"event": "validation", "step": 1, "epoch": 1, "seconds": 1, "branch_top1": [1], "top1": NaN}',
        "[]",
        "1",
        "{}",
        "\0\0\0\0",  # a file system after a power failure
        "\ufffd",
    ],
)
def test_damaged_lines_are_left_out_and_numbered(tmp_path: Path, line: str) -> None:
    whole = finished([50, 60])
    folder = write_run(tmp_path / "run", whole)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join([*lines[:2], line, "\n", *lines[2:]]))
    run = runs.read_run(folder)
    assert (steps(run), len(run.validation), run.ended) == ([100, 200], 2, True)
    assert run.remarks == [f"{folder / 'metrics.jsonl'}: left out 1 damaged line: 3"]


def test_steps_that_were_trained_again_count_once(tmp_path: Path) -> None:
    """Killed after step 300, resumed after step 100, and not yet back at step 300."""
    first, again = curve([10, 20, 30]), curve([10, 21], pace=2)[2:]
    folder = write_run(tmp_path / "run", [*first, *again])
    run = runs.read_run(folder)
    assert steps(run) == [100, 200]
    assert list(run.validation["top1"]) == [10, 21]
    assert list(run.train["seconds"]) == [100, 400]
    assert (run.steps, run.ended) == (200, False)
    assert run.remarks == [f"{folder / 'metrics.jsonl'}: left out 4 events of steps that were trained again"]


def test_a_run_that_was_extended_after_its_end_keeps_every_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [*finished([10, 20]), *finished([10, 20, 30])[4:]])
    run = runs.read_run(folder)
    assert (steps(run), run.ended, run.remarks) == ([100, 200, 300], True, [])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_a_gap_in_the_line(tmp_path: Path, bad: float) -> None:
    losses = [3.0, 2.0, bad, bad, 2.0, 1.0]
    events = [train(100 * k, 100.0 * k, loss) for k, loss in enumerate(losses, start=1)]
    folders = [write_run(tmp_path / "0", events)]
    folders.append(write_run(tmp_path / "1", [event | {"loss": 2.0} for event in events], seed=1))
    (group,) = groups_of(*folders)
    told = "train loss is not finite in 2 events, first at step 300; the figures have a gap there"
    assert group.runs[0].remarks == [f"{folders[0] / 'metrics.jsonl'}: {told}"]
    assert group.runs[1].remarks == []
    loss = figures.LOSS[0]
    for runs_of_it in (group.runs[:1], group.runs):
        part = replace(group, runs=runs_of_it)
        mean = figures.group_curve(part, "step", loss)["mean"]
        assert list(mean.isna()) == [False, False, True, True, False, False]
        figure = figures.curves_figure([part], "step", [loss])
        assert figure is not None
        drawn = np.asarray(figure.axes[0].lines[0].get_ydata(), dtype=float)
        np.testing.assert_array_equal(np.isnan(drawn), mean.isna())


@pytest.mark.parametrize(
    ("largest", "expected"),
    [(90, (1, "Training time (s)")), (5400, (60, "Training time (min)")), (90_000, (3600, "Training time (h)"))],
)
def test_time_axis_unit(largest: float, expected: tuple[float, str]) -> None:
    assert figures.axis_unit("seconds", largest) == expected


def test_branch_panels_share_limits_that_include_every_run(tmp_path: Path) -> None:
    short = write_run(tmp_path / "short", curve([10], branches=[5] * 16), name="short")
    long = write_run(tmp_path / "long", finished([10, 50, 80], branches=[30, 20, 10, 5]), name="long")
    figure = figures.branches_figure(groups_of(short, long))
    assert figure is not None
    panels = [axes for axes in figure.axes if axes.get_title(loc="left") or axes.get_title()]
    assert [len(axes.lines) for axes in panels] == [16 + 1, 4 + 1]
    for axes in panels:
        assert axes.get_xlim()[0] == 0 <= axes.get_ylim()[0]
        assert axes.get_xlim()[1] >= 300
        assert axes.get_ylim()[1] >= 80


def test_a_run_of_some_branches_shows_their_numbers(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "some", finished([10, 50], branches=[30, 20]))
    config = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(config.replace('branches = "each"', 'branches = "each"\nonly = [3, 1]'))
    figure = figures.branches_figure(groups_of(folder))
    assert figure is not None
    assert [label.get_text() for axes in figure.axes[-1:] for label in axes.get_yticklabels()] == ["3", "1"]


def test_command_writes_every_figure_and_the_table(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / str(seed), finished([50, 60 + seed]), seed=seed) for seed in range(2)]
    folders.append(write_run(tmp_path / "growing", curve([40]), name="growing", tail='{"ev'))
    result = command(*folders, "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "growing (in progress, epoch 1 of 90)" in result.stdout
    assert (tmp_path / "out" / "table.md").read_text(encoding="utf-8") in result.stdout
    names = {"accuracy_time", "accuracy_step", "loss", "throughput", "branches"}
    for name in ("accuracy_macs", "frequency"):
        assert f"{name}: left out, these runs have no data for it" in result.stdout
    for ending in ("svg", "pdf"):
        assert {path.stem for path in (tmp_path / "out").glob(f"*.{ending}")} == names
    for ending in ("md", "csv", "tex"):
        assert {path.stem for path in (tmp_path / "out").glob(f"*.{ending}")} == {"table", "costs"}
    for name in names:
        assert "<svg" in (tmp_path / "out" / f"{name}.svg").read_text(encoding="utf-8")
        with Image.open(tmp_path / "out" / f"{name}.png") as image:
            assert round(image.info["dpi"][0]) == 200
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50


def test_a_run_without_validation_gets_the_figures_it_has_data_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", [train(10, 5.0), train(20, 9.0)])
    report.report([run])
    assert "accuracy_time: left out" in capsys.readouterr().out
    assert {path.name for path in (run / "plots").glob("*.png")} == {"loss.png", "throughput.png"}


def test_the_same_run_named_twice_counts_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished([50]))
    report.report([run, tmp_path / "other" / ".." / "run"], tmp_path / "out")
    assert "| net           |  1 |" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")


def test_a_users_mistake_ends_with_one_message_and_code_2(tmp_path: Path) -> None:
    result = command(tmp_path / "none")
    assert result.returncode == 2
    assert "none: no such folder" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_messages_name_what_is_missing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [])
    with pytest.raises(UserError, match="no training or validation events yet"):
        report.report([run])
    for name in ("metrics.jsonl", "config.toml"):
        (run / name).unlink()
        with pytest.raises(UserError, match=f"run: not a run directory, {name} is missing"):
            report.report([run])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: exists and is not a folder"):
        report.report([write_run(tmp_path / "full", finished([50]))], tmp_path / "file")


def test_of_many_folders_those_that_cannot_be_drawn_are_left_out_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with runs/*, which may contain other folders and files."""
    folder = tmp_path / "runs"
    write_run(folder / "good", finished([50]))
    damaged = write_run(folder / "damaged", finished([60]), name="damaged")
    with (damaged / "metrics.jsonl").open("r+") as file:
        file.write("#")
    write_run(folder / "waiting", [])
    for name, text in (("broken", "name = "), ("other", "name = 'other'"), ("latin", "name = 'caf\xe9'")):
        (write_run(folder / name, finished([50])) / "config.toml").write_bytes(text.encode("latin-1"))
    (folder / "plots").mkdir()
    (folder / "joined.json").write_text("{}")
    (write_run(folder / "half", finished([50])) / "metrics.jsonl").unlink()
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    report.report(sorted(folder.iterdir()), tmp_path / "out")
    lines = capsys.readouterr().out.replace(f"{folder}/", "").splitlines()
    assert [line for line in lines if "left out" in line and "no data" not in line] == [
        "left out: broken/config.toml: not valid TOML: Invalid value (at end of document)",
        "left out: gone: no such folder; expected a run directory",
        "left out: half: not a run directory, metrics.jsonl is missing",
        "left out: joined.json: not a folder; expected a run directory",
        "left out: latin/config.toml: not valid TOML: "
        "'utf-8' codec can't decode byte 0xe9 in position 11: invalid continuation byte",
        "left out: other/config.toml: not the config of a run, train.epochs is missing",
        "left out: plots: not a run directory, config.toml is missing",
        "left out: waiting/metrics.jsonl: no training or validation events yet; try again in a minute",
        "damaged/metrics.jsonl: left out 1 damaged line: 1",
        "loss: left out: damaged, without values of Training loss (mean of branches)",
        "throughput: left out: damaged, without values",
    ]
    rows = (tmp_path / "out/table.md").read_text().splitlines()[2:4]
    assert [row.split()[1] for row in rows] == ["damaged", "net"]


def test_if_nothing_can_be_drawn_every_reason_is_reported(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    run = write_run(tmp_path / "run", [])
    result = command(tmp_path / "plots", run, "--output", tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: none of these can be drawn:",
        f"{tmp_path / 'plots'}: not a run directory, config.toml is missing",
        f"{run / 'metrics.jsonl'}: no training or validation events yet; try again in a minute",
    ]
    assert not (tmp_path / "out").exists()


@pytest.fixture(params=["plots missing", "plots there"])
def read_only_run(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A run directory that is read-only even for root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() == 0:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True)
        if mounted.returncode:
            pytest.skip("this root can mount nothing")
    run = write_run(folder / "run", finished([50]))
    if request.param == "plots there":
        (run / "plots").mkdir()
    if os.geteuid() == 0:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        yield run
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    else:
        for path in (run, *run.glob("plots")):
            path.chmod(0o555)
        yield run
        for path in (run, *run.glob("plots")):
            path.chmod(0o755)


def test_a_read_only_run_is_drawn_elsewhere(read_only_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as told:
        report.report([read_only_run])
    assert str(told.value).startswith(f"{read_only_run / 'plots'}: cannot be written: ")
    assert str(told.value).endswith("; --output names another folder")
    report.report([read_only_run], tmp_path / "out")
    assert (tmp_path / "out/table.md").exists()


def test_more_than_ten_configurations_have_different_colors(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / str(n), finished([50]), name=f"net{n}") for n in range(14)]
    assert len({group.color for group in groups_of(*folders)}) == 14


def test_neither_torch_nor_dali_is_imported_and_help_loads_no_plotting() -> None:
    code = "import sys, bandsplit.reporting; sys.exit(bool({'torch', 'nvidia.dali'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    # -X importtime lists every import on stderr
    line = [sys.executable, "-X", "importtime", str(ROOT / "src" / "report.py"), "--help"]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert "--output" in result.stdout
    assert "argparse" in result.stderr
    assert not {"pandas", "matplotlib", "numpy"} & {
        entry.split("|")[-1].strip() for entry in result.stderr.splitlines()
    }
