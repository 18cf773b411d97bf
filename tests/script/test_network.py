"""bench/network.py: links carry their rate and leave nothing behind; rates below which branches win."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bandsplit.distributed.traffic import Traffic
from tests.conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "bench"))

import network

can_build = os.geteuid() == 0 and shutil.which("ip") and shutil.which("tc")
needs_root = pytest.mark.skipif(not can_build, reason="needs root, ip and tc")


def started(*arguments: str) -> subprocess.Popen[str]:
    """The bench, or Python, in a session of its own, by which its processes are found."""
    command = [sys.executable, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=REPOSITORY / "bench", stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def namespaces(session: int | None = None) -> set[str]:
    """Network namespaces of all processes, or of those of a session."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if session is None or int((process / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                found.add(str((process / "ns/net").readlink()))
        except OSError:  # has ended
            pass
    return found


TRIES = """
import json, network
tries = []
while len(tries) < 5 and max(tries, default=0) < 0.85 * 20:
    tries += network.carried([20]).values()
print(json.dumps(tries))
"""


@needs_root
@pytest.mark.slow
def test_two_namespaces_pass_bytes_at_the_rate_of_their_link() -> None:
    """Never at more, and at no less in one of five tries: a busy host may pause for longer than BURST makes up for."""
    before = subprocess.check_output(["ip", "-o", "link"])
    done = started("-c", TRIES)
    output, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors
    assert max(json.loads(output)) == pytest.approx(20, rel=0.15)
    assert subprocess.check_output(["ip", "-o", "link"]) == before
    assert not namespaces(done.pid)


@needs_root
@pytest.mark.long
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_nothing_is_left_when_it_is_stopped(sent: signal.Signals, code: int) -> None:
    own = str(Path("/proc/self/ns/net").readlink())
    bench = started("network.py", "--rates", "1")
    made: set[str] = set()
    until = time.monotonic() + 60
    while len(made) < 3 and time.monotonic() < until:  # two ranks and the switch
        made = namespaces(bench.pid) - {own}
        time.sleep(0.1)
    assert len(made) == 3
    if sent == signal.SIGINT:
        os.killpg(bench.pid, sent)  # as a terminal does
    else:
        bench.send_signal(sent)
    assert bench.wait(30) == code
    until = time.monotonic() + 20
    while made & namespaces() and time.monotonic() < until:
        time.sleep(0.1)
    assert not made & namespaces()
    assert not namespaces(bench.pid)


@needs_root
@pytest.mark.long
def test_training_sends_what_is_computed_and_is_as_fast_as_its_link(tmp_path: Path) -> None:
    file = tmp_path / "network.json"
    options = "--archs resnet34 --rates 1000 --rounds 1 --seconds 0.1 --batch 8 --output"
    command = [sys.executable, "bench/network.py", *options.split(), str(file)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(file.read_text())["results"]["archs"]
    for arm in (network.BASELINE, network.REPLICAS):
        count = found["traffic"][arm]["gradients"]
        assert found["sent"][arm] == pytest.approx(count, rel=0.02)
        (speed,) = found["speeds"]["1000"][arm]
        assert speed < 8 / (0.85 * count * 8e-9)
    assert found["sent"][network.GROUPS] < 0.01 * found["sent"][network.REPLICAS]
    assert found["sent"][network.INDEPENDENT] == found["sent"][network.ALONE] == 0


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_branches_in_turn_end_as_early_as_in_the_best_of_all_assignments(ranks: int) -> None:
    for seconds in np.random.default_rng(0).uniform(1, 5, (20, ranks)):
        best = min(
            max(own * assigned.count(rank) for rank, own in enumerate(seconds))
            for assigned in itertools.product(range(ranks), repeat=5)
        )
        assert network.in_turn(seconds, 5) == pytest.approx(best)


@pytest.mark.parametrize("overlapping", [True, False])
def test_computed_rate_is_the_measured_one_of_links_as_the_model_has_them(overlapping: bool) -> None:
    """images/s of many rates, made by the two formulas; batch 1, so that they are the inverse of seconds."""
    t, ours, megabits = 0.8, 1.0, 80.0
    together: Callable[..., float] = max if overlapping else lambda *parts: sum(parts)
    rates = [round(10 * 1.02**n) for n in range(400)]
    speeds = {
        rate: {network.BASELINE: [1 / together(t, megabits / rate)], network.INDEPENDENT: [1 / ours]} for rate in rates
    }
    speeds[network.UNLIMITED] = {network.BASELINE: [2 / t], network.ALONE: [1 / t], network.INDEPENDENT: [1 / ours]}
    traffic = {network.BASELINE: Traffic(1, 1, megabits * 1e6 / 8, 0)}
    found = network.Found("resnet34", 2, 1, traffic, 1, 1, {}, speeds, {})
    pair = network.INDEPENDENT, network.BASELINE
    low, high = found.computed(*pair)
    assert found.measured(*pair) == pytest.approx(low if overlapping else high, rel=0.02)

    speeds[network.UNLIMITED][network.ALONE] = [1 / 1.2]
    assert found.computed(*pair) == (math.inf, math.inf)
    for each in speeds.values():
        each[network.INDEPENDENT] = [1e9]
    assert math.isinf(found.measured(*pair))
    for each in speeds.values():
        each[network.INDEPENDENT] = [1e-9]
    assert found.measured(*pair) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--archs", "resnet35"], "'resnet35' given; allowed: alexnet, vgg16, resnet34"),
        (["--rates", "0,100"], "0 given; rates are at least 1 Mbit/s"),
        (["--ranks", "3"], "invalid choice: 3 (choose from 2, 4)"),
        (["--threads", "0"], "'0' given, expected a positive integer"),
        (["--rounds", "0"], "'0' given, expected a positive integer"),
        (["--seconds", "0"], "'0' given, expected a positive number"),
        (["--batch", "15"], "error: --batch: 15 given, expected a multiple of --ranks = 2"),
    ],
)
def test_wrong_options(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(options, monkeypatch, capsys)


def test_without_rights_or_programs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert refusal([], monkeypatch, capsys) == (
        "error: bench/network.py makes network namespaces, which only root may: run it with sudo\n"
    )
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "")
    assert refusal([], monkeypatch, capsys) == "error: ip and tc not found: apt-get install iproute2\n"


def test_ranks_see_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(network, "bench", lambda arguments: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    monkeypatch.setattr(sys, "argv", ["network.py", "--rates", "100,10,100"])
    network.main()
    assert seen == [""]


def refusal(options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["network.py", *options])
    with pytest.raises(SystemExit) as ended:
        network.main()
    assert ended.value.code == 2
    return capsys.readouterr().err
