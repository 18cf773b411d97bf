"""Ranks that fail: exactly one of them reports the error to the user, and each log has the traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bandsplit.distributed import ranks
from bandsplit.distributed.ranks import joined
from bandsplit.errors import ReportedElsewhere, UserError
from tests.conftest import Launch, on_ranks


def test_a_collective_that_fails_on_every_rank_is_reported_once(config_file: Path, tmp_path: Path) -> None:
    """Here because of a missing network interface; on GPUs, for example, because of a full /dev/shm."""
    run_dir = tmp_path / "run"
    launch = Launch("train.py", config_file, "--run-dir", run_dir, ranks=3, env={"GLOO_SOCKET_IFNAME": "eth99"})
    done = launch.wait(60)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "error: a collective failed on every rank: " in done.stderr
    assert "eth99" in done.stderr
    assert "Traceback" not in done.stderr
    for rank in range(3):
        text = (run_dir / f"logs/rank{rank}.log").read_text()
        assert "a collective failed: " in text
        assert "Traceback" in text
        assert "init_process_group" in text


def end_of(errors: list[str]) -> str:
    """The error with which a rank leaves the group if its block ended with an error of this name."""
    rank = 0
    try:
        with joined(60) as ranks:
            rank = ranks.rank
            ranks.wait()  # otherwise one could leave while another is still connecting
            raise {"broken": RuntimeError("Connection closed by peer"), "own": KeyError("own")}[errors[rank]]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("errors", "ends"),
    [
        (
            ["broken"] * 3,
            ["UserError: a collective failed on every rank: Connection closed by peer", *["Reported"] * 2],
        ),
        (["broken", "own", "broken"], ["Reported", "KeyError: 'own'", "Reported"]),
        (["own", "own", "own"], ["KeyError: 'own'"] * 3),
    ],
)
def test_which_rank_reports(errors: list[str], ends: list[str]) -> None:
    for told, wanted in zip(on_ranks(3, end_of, errors), ends, strict=True):
        assert told.startswith(wanted)


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for local_rank in (0, 3):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        with pytest.raises(UserError, match=r"4 ranks on .*, which has 2 GPUs: .*--nproc-per-node 2") as told, joined():
            pass
        assert told.value.one_rank == (local_rank == 0)


def test_torch_uses_no_more_threads_than_there_are_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for available, threads in ((8, 4), (2, 2)):
            monkeypatch.setattr(ranks, "available_cpus", lambda available=available: available)
            with joined():
                assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_ranks_that_torchrun_did_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example on a cluster that sets WORLD_SIZE for its jobs."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(UserError, match="rank 0 of 2 cannot connect to the others: .*MASTER_ADDR expected.*torchrun"),
        joined(),
    ):
        pass


def test_an_error_reported_elsewhere_is_raised_unchanged() -> None:
    """An error that another rank reports is raised unchanged, with one rank and with several."""
    with pytest.raises(ReportedElsewhere), joined():
        raise ReportedElsewhere()


@pytest.mark.parametrize(
    "message",
    [
        "Application timeout caused pair closure",
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3000",
        "Connection reset by peer",
        "Timed out waiting 5000ms for recv operation to complete",
        "NCCL error in: ProcessGroupNCCL.cpp:2000, remote process exited or there was a network error",
    ],
)
def test_errors_of_collectives_are_recognized_by_their_messages(message: str) -> None:
    assert ranks._comes_from_others(RuntimeError(message))
    assert not ranks._comes_from_others(ValueError(message))
