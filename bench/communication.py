"""Bytes that a rank sends per step for every number of branch groups: computed, and measured with gloo.

    python bench/communication.py [CONFIG] [--set KEY=VALUE …] [--world-size 8] [--processes 2,4]

The first table is computed from the config alone, for GPUs. For the second, each number of local processes trains the
config for a few steps on CPUs, with a smaller batch of gray images and plain SGD, since optimizers send nothing. The
bytes sent over the loopback interface, headers included, are compared with the formula. Other traffic on that interface
is counted too, so use an idle machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch

from bandsplit.cli import entry
from bandsplit.config import loading
from bandsplit.config.schema import SGD, RunConfig
from bandsplit.distributed.ranks import Ranks, joined
from bandsplit.distributed.traffic import Traffic, possible_groups, step_traffic
from bandsplit.errors import ReportedElsewhere, UserError
from bandsplit.models.ensemble import parameters_of_branches
from bandsplit.models.precision import Precision
from bandsplit.training.session import Plan, Session

DEFAULT = ["train.batch_size=2048"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=Path("config/train/resnet34_sub16.toml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--world-size", type=common.count, default=8, help="number of ranks in the computed table")
    parser.add_argument(
        "--processes", type=several, default=[2, 4], help="numbers of processes to measure, comma-separated"
    )
    parser.add_argument("--images", type=common.count, default=8, help="global batch size of the measurement")
    parser.add_argument("--steps", type=common.count, default=2, help="number of measured steps")
    common.add_output(parser, "bench/results/communication.json")
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ranks that see GPUs take NCCL, and one GPU each

    config = loading.load(arguments.config, [*DEFAULT, *arguments.set])
    parameters, trained = parameters_of_branches(config)
    half = Precision(config.train.precision, torch.device("cuda")).half_bands
    print(
        f"\n{config.name}: {len(parameters)} branches, {sum(parameters) / 1e6:.1f} M parameters, "
        f"{config.train.batch_size} images of {config.data.image_size}², float{16 if half else 32} bands, "
        f"{arguments.world_size} ranks"
    )
    print("| branch groups | branches / rank | gradients MB | bands MB |  all MB | less than plain DDP by |")
    print("|--------------:|----------------:|-------------:|---------:|--------:|-----------------------:|")
    computed = [
        step_traffic(config, arguments.world_size, g, trained, half)
        for g in possible_groups(config, arguments.world_size)
    ]
    for sent in computed:
        print(
            f"| {sent.branch_groups:>13} | {sent.branches:>15} | {sent.gradients / 1e6:>12,.1f} | "
            f"{sent.bands / 1e6:>8,.1f} | {sent.bytes / 1e6:>7,.1f} | {computed[0].bytes / sent.bytes:>22.1f} |"
        )

    print(f"\nmeasured: {arguments.images} images per step, {arguments.steps} steps, float32 bands")
    print("| processes | branch groups | computed MB | measured MB | measured / computed |")
    print("|----------:|--------------:|------------:|------------:|--------------------:|")
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        common.gray_images(Path(folder), config, arguments.images)
        for processes in arguments.processes:
            for groups in possible_groups(config, processes):
                small = loading.load(
                    arguments.config,
                    [*DEFAULT, *arguments.set, f"data.root={folder}", f"train.batch_size={arguments.images}",
                     "train.precision=fp32", f"parallel.branch_groups={groups}"],
                ).model_copy(update={"optim": SGD(lr=1e-3, momentum=0)})  # fmt: skip
                sent = step_traffic(small, processes, groups, trained, half=False)
                found = _measure(small, processes, arguments.steps)
                measured.append({"processes": processes, "computed": _as_dict(sent), "measured": found})
                print(
                    f"| {processes:>9} | {groups:>13} | {sent.bytes / 1e6:>11,.2f} | {found / 1e6:>11,.2f} | "
                    f"{found / sent.bytes:>19.3f} |",
                    flush=True,
                )
    settings = {"config": str(arguments.config), "set": arguments.set, "images": arguments.images}
    common.write(arguments.output, settings, {"computed": list(map(_as_dict, computed)), "measured": measured})


def several(text: str) -> list[int]:
    found = [common.count(each) for each in text.split(",")]
    if min(found) < 2:
        raise argparse.ArgumentTypeError(f"{min(found)} given; at least 2 processes exchange something")
    return found


def _as_dict(sent: Traffic) -> dict[str, Any]:
    return {**vars(sent), "bytes": sent.bytes}


def _measure(config: RunConfig, processes: int, steps: int) -> float:
    """Mean number of bytes that one process sends per step. Raises the UserError of a rank."""
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port = any_port.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bandsplit.training.session"])
    results = context.SimpleQueue()
    work = partial(_train, config, processes, steps, port, results)
    ranks = [context.Process(target=work, args=(rank,)) for rank in range(processes)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if results.empty():
        codes = ", ".join(str(process.exitcode) for process in ranks)
        raise UserError(f"the ranks have ended with exit codes {codes}, with what they have printed above")
    found: int | UserError = results.get()
    if isinstance(found, UserError):
        raise found
    return found / processes / steps


def _train(config: RunConfig, processes: int, steps: int, port: int, results: Any, rank: int) -> None:
    place = {"RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "LOCAL_RANK": rank}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()}, GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    try:
        with joined() as ranks:
            sent = _sent(config, ranks, steps)
        if rank == 0:
            results.put(sent)
    except UserError as error:
        results.put(error)
    except ReportedElsewhere:
        pass


def _sent(config: RunConfig, ranks: Ranks, steps: int) -> int:
    """Bytes that all ranks send in so many steps."""
    session = Session(Plan.of(config, ranks))

    def step(ahead: bool) -> None:
        parts = session.feed.take(session.streams.parts, ahead)
        session.step(range(len(session.learners)), parts, 0, lr=1e-3)

    step(ahead=False)  # DDP sends its bucket assignment in the first step
    ranks.wait()
    before = _loopback_bytes()
    for n in range(steps):
        step(ahead=n + 1 < steps)
    ranks.wait()
    sent = _loopback_bytes() - before
    ranks.wait()
    return sent


def _loopback_bytes() -> int:
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


if __name__ == "__main__":
    entry.run(main)
