"""Images/s of data parallelism, branch groups and independent branches over links of a stated rate.

    python bench/network.py [--archs alexnet,vgg16,resnet34] [--ranks 2] [--rates 100,1000,10000] [--rounds 5]

Each rank is a process in a network namespace of its own. Links to a virtual switch carry at most so many Mbit/s in each
direction (veth pairs, `tc tbf`). All ranks take the project's own training steps, over gloo, on gray images of reduced
size: the baseline and four branches (sub4) with data parallelism, and the branches as branch groups and as independent
runs. Each round measures everything once, in a new random order.

Branches win where they are at least 10 % faster. The rate below which they do is computed from the time of a step that
exchanges nothing and from the bytes to send, once as if all of them were sent during arithmetic (the lower rate) and
once as if none were; and it is measured, interpolated between the rates.

Then one rank is slow (after each branch it sleeps for as long as it has computed) or away (it stops for as long as it
has worked). Data parallelism waits for it. Independent branches do not: each rank trains one branch after the other,
and takes the next that it would finish first. The time of all is computed from the speed of each rank.

Needs root and iproute2. Namespaces have no names, so the kernel removes them and their links with the last process,
however that ends. The network of the machine is not touched.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
import numpy as np
import torch
from tqdm import tqdm

from bandsplit.cli import entry
from bandsplit.config import loading
from bandsplit.config.schema import RunConfig
from bandsplit.cpus import available_cpus
from bandsplit.distributed.traffic import Traffic, branch_groups, step_traffic
from bandsplit.errors import UserError
from bandsplit.models.costs import costs_of
from bandsplit.models.ensemble import parameters_of_branches

if TYPE_CHECKING:
    from bandsplit.training.session import Session

SIDES = {"alexnet": 128, "vgg16": 64, "resnet34": 64}
"""Side of the images in pixels: small, but its half is large enough for a branch."""

BASELINE, ALONE = "baseline, data parallel", "baseline, no exchange"
REPLICAS, GROUPS, INDEPENDENT = "branches, data parallel", "branches, branch groups", "branches, independent"
BRANCHES = 4
OF_NODES = (BASELINE, REPLICAS, INDEPENDENT)
"""Arms that are measured with a slow or absent rank."""

MARGIN = 1.1
"""Branches win where they are this much faster."""

BURST = 2**17
"""Bytes."""

UNLIMITED = 0
"""As a rate: links without a limit."""


# ---------------------------------------------------------------------------------------------------- links


@dataclass(frozen=True)
class Limit:
    """Asks a rank to send at most this many Mbit/s."""

    rate: int


@dataclass(frozen=True)
class Stream:
    """Asks rank 1 to send bytes to rank 0, over TCP; both answer with seconds."""

    bytes: int


@contextmanager
def network(ranks: int, serve: Callable[[Connection, int], None]) -> Iterator[list[Connection]]:
    """Processes `serve(connection, rank)` in network namespaces of their own, and this one in another: the switch.

    Raises UserError without the rights or the programs for it.
    """
    require()
    own_namespace()
    run("ip", "link", "add", "switch", "type", "bridge")
    run("ip", "link", "set", "switch", "up")
    context = multiprocessing.get_context("forkserver")
    connections, processes = [], []
    try:
        for rank in range(ranks):
            connection, theirs = context.Pipe()
            process = context.Process(target=joining, args=(theirs, rank, serve))
            process.start()
            theirs.close()
            processes.append(process)
            connections.append(connection)
            answer(connection, rank)
            run("ip", "link", "add", port(rank), "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
            run("ip", "link", "set", port(rank), "master", "switch", "up")
        yield connections
    finally:
        for connection in connections:
            connection.close()  # at which the ranks end
        for process in processes:
            process.join(3)
            process.terminate()
            process.join()


def joining(connection: Connection, rank: int, serve: Callable[[Connection, int], None]) -> None:
    """Joins the network as 10.77.0.(rank + 1), then serves. Sends UserErrors to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its ranks
    try:
        own_namespace()
        connection.send(None)
        connection.recv()
        run("ip", "address", "add", f"{address(rank)}/24", "dev", "eth0")
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "set", "eth0", "up")
        serve(connection, rank)
    except UserError as error:
        connection.send(error)
    except (EOFError, ConnectionError):  # the parent has ended
        pass


def require() -> None:
    if os.geteuid() != 0:
        raise UserError("bench/network.py makes network namespaces, which only root may: run it with sudo")
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} not found: apt-get install iproute2")


def own_namespace() -> None:
    """Moves this process into a new network namespace. Its threads of before stay where they are."""
    new_network = 0x40000000  # CLONE_NEWNET of sched.h
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_network):
        raise UserError(f"cannot make a network namespace: {os.strerror(ctypes.get_errno())}")


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {done.stderr.strip()}")


def port(rank: int) -> str:
    return f"port{rank}"


def address(rank: int) -> str:
    return f"10.77.0.{rank + 1}"


def limit(device: str, rate: int) -> None:
    """Limits what a device sends to `rate` Mbit/s; a millisecond's worth, or BURST, may go at once after a pause."""
    if rate == UNLIMITED:
        run("tc", "qdisc", "replace", "dev", device, "root", "noqueue")
    else:
        burst = max(BURST, rate * 125)
        run("tc", "qdisc", "replace", "dev", device, "root", "tbf", "rate", f"{rate}mbit", "burst", str(burst),
            "latency", "50ms")  # fmt: skip


def set_rate(connections: Sequence[Connection], rate: int) -> None:
    """Limits all links, in both directions."""
    for rank in range(len(connections)):
        limit(port(rank), rate)
    ask(connections, Limit(rate))


def ask(connections: Sequence[Connection], message: object) -> list[Any]:
    """Sends a message to all ranks and returns their answers."""
    for connection in connections:
        connection.send(message)
    return [answer(connection, rank) for rank, connection in enumerate(connections)]


def answer(connection: Connection, rank: int) -> Any:
    try:
        found = connection.recv()
    except (EOFError, ConnectionError):
        raise UserError(f"rank {rank} has ended") from None
    if isinstance(found, UserError):
        raise found
    return found


def carried(rates: Sequence[int]) -> dict[int, float]:
    """Mbit/s of payload that one TCP connection carries over links of these rates."""
    found = {}
    with network(2, serve_links) as connections:
        ask(connections, None)
        for rate in rates:
            set_rate(connections, rate)
            count = max(125_000 * (rate or 10_000), 10 * BURST)  # a second's worth
            seconds, _ = ask(connections, Stream(count))
            found[rate] = count * 8 / 1e6 / seconds
    return found


def serve_links(connection: Connection, rank: int) -> None:
    with socket.create_server((address(rank), 5000)) as server:
        connection.send(None)
        while True:
            match connection.recv():
                case Limit(rate):
                    limit("eth0", rate)
                    connection.send(None)
                case Stream(count):
                    connection.send(stream(server, rank, count))


def stream(server: socket.socket, rank: int, count: int) -> float:
    began = time.perf_counter()
    if rank == 0:
        buffer = bytearray(2**20)
        other, _ = server.accept()
        with other:
            began = time.perf_counter()
            while other.recv_into(buffer):
                pass
    else:
        with socket.create_connection((address(0), 5000)) as other:
            for _ in range(0, count, 125_000):
                other.sendall(bytes(125_000))
    return time.perf_counter() - began


# ---------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Node:
    """How the last rank works; all others are at full speed."""

    name: str
    slowdown: float = 1
    """How many times longer than the others it takes."""
    away: float = 0
    """Seconds that it works, and then is away, in turn; 0: never away."""


ALIKE = Node("all alike")


@dataclass(frozen=True)
class Steps:
    """Asks a rank for steps of an arm; it answers with Taken."""

    arm: str
    count: int
    node: Node = ALIKE


@dataclass(frozen=True)
class Taken:
    seconds: float
    bytes: int
    """Sent, with headers."""


@dataclass(frozen=True)
class Job:
    """What all ranks of a measurement train."""

    together: dict[str, RunConfig]
    """The arms whose ranks exchange something."""
    alone: list[dict[str, RunConfig]]
    """For each rank, the arms that exchange nothing: its share of the baseline's images, and its own branches."""
    threads: int

    @classmethod
    def of(cls, arch: str, ranks: int, batch: int, threads: int, folder: Path) -> Job:
        def config(row: str, batch: int, *overrides: str) -> RunConfig:
            return loading.load(
                Path(f"config/train/{arch}_{row}.toml"),
                [f"data.root={folder}", f"data.image_size={SIDES[arch]}", f"data.threads={threads}",
                 f"train.batch_size={batch}", "train.precision=fp32", "optim.momentum=0", *overrides],
            )  # fmt: skip

        share = BRANCHES // ranks
        own = [list(range(rank * share, (rank + 1) * share)) for rank in range(ranks)]
        together = {
            BASELINE: config("baseline", batch),
            REPLICAS: config("sub4", batch, "parallel.branch_groups=1"),
            GROUPS: config("sub4", batch, f"parallel.branch_groups={ranks}"),
        }
        part = config("baseline", batch // ranks)
        alone = [{ALONE: part, INDEPENDENT: config("sub4", batch, f"split.only={branches}")} for branches in own]
        return cls(together, alone, threads)

    def __call__(self, connection: Connection, rank: int) -> None:
        """Serves as one rank."""
        from bandsplit.distributed.ranks import Ranks, joined  # late: DALI is not needed to measure links
        from bandsplit.training.session import Plan, Session

        torch.set_num_threads(self.threads)
        place: dict[str, object] = {"RANK": rank, "WORLD_SIZE": len(self.alone), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        place |= {"MASTER_ADDR": address(0), "MASTER_PORT": 29500, "GLOO_SOCKET_IFNAME": "eth0"}
        os.environ.update({key: str(value) for key, value in place.items()})
        with joined() as ranks:
            sessions = {arm: Session(Plan.of(config, ranks)) for arm, config in self.together.items()}
            single = Ranks(0, 1, 0, 1, ranks.device)
            sessions |= {arm: Session(Plan.of(config, single)) for arm, config in self.alone[rank].items()}
            connection.send(None)
            while True:
                match connection.recv():
                    case Limit(rate):
                        limit("eth0", rate)
                        connection.send(None)
                    case Steps(arm, count, node):
                        last = rank == len(self.alone) - 1
                        connection.send(taken(sessions[arm], count, node if last else ALIKE))


def taken(session: Session, count: int, node: Node) -> Taken:
    sent, began, cpu = sent_bytes(), time.perf_counter(), time.process_time()
    for _ in range(count):
        parts = session.feed.take(session.streams.parts, ahead=True)
        for i in range(len(session.learners)):
            session.step([i], parts, 0, lr=1e-3)
            time.sleep((node.slowdown - 1) * (time.process_time() - cpu))
            cpu = time.process_time()
            passed = time.perf_counter() - began
            if node.away and passed % (2 * node.away) > node.away:
                time.sleep(2 * node.away - passed % (2 * node.away))
    return Taken(time.perf_counter() - began, sent_bytes() - sent)


def sent_bytes() -> int:
    """Bytes that this process's namespace has sent over its link."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    (own,) = (line.split(":")[1].split() for line in lines if line.strip().startswith("eth0:"))
    return int(own[8])


# ---------------------------------------------------------------------------------------------------- measurement


@dataclass
class Found:
    """Measurements of an architecture."""

    arch: str
    ranks: int
    batch: int
    traffic: dict[str, Traffic]
    gflop: float
    """Of a step of the baseline on one rank."""
    gflop_at_full_size: float
    """The same with the images and the batch of its config."""
    sent: dict[str, float]
    """Bytes of a step and rank, headers included."""
    speeds: dict[int, dict[str, list[float]]]
    """images/s by rate, arm and round."""
    nodes: dict[str, dict[str, list[float]]]
    """images/s by node, arm and round, without a limit of the rate."""

    def seconds(self, arm: str, rate: int = UNLIMITED) -> float:
        """Median time of a step."""
        return self.batch / float(np.median(self.speeds[rate][arm]))

    def computed(self, ours: str, peer: str) -> tuple[float, float]:
        """Mbit/s below which `ours` wins, if the peer sends all bytes during arithmetic, and if it sends none.

        With t for its arithmetic, b bits and r for the rate, a step of the peer takes max(t, b / r) and t + b / r.
        """
        allowed, own = MARGIN * self.seconds(ours), self.seconds(ALONE if peer == BASELINE else INDEPENDENT)
        megabits = 8 * self.traffic[peer].bytes / 1e6
        return (megabits / allowed, megabits / (allowed - own)) if own < allowed else (math.inf, math.inf)

    def measured(self, ours: str, peer: str) -> float:
        """Mbit/s below which `ours` wins: 0 or infinity if it does at none or all of the rates."""
        rates = sorted(rate for rate in self.speeds if rate)
        gains = [self.seconds(peer, rate) / self.seconds(ours, rate) for rate in rates]
        if gains[0] < MARGIN:
            return 0
        for (low, gain), (high, less) in zip(
            zip(rates, gains, strict=True), zip(rates[1:], gains[1:], strict=True), strict=False
        ):
            if less < MARGIN:
                part = (math.log(gain) - math.log(MARGIN)) / (math.log(gain) - math.log(less))
                return float(low * (high / low) ** part)
        return math.inf


def bench(arguments: argparse.Namespace) -> None:
    if arguments.batch % arguments.ranks:
        raise UserError(f"--batch: {arguments.batch} given, expected a multiple of --ranks = {arguments.ranks}")
    require()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    carries = carried([*arguments.rates, UNLIMITED])
    print("\n| link, Mbit/s | carries |\n|-------------:|--------:|")
    for rate, mbits in carries.items():
        print(f"| {name_of(rate):>12} | {mbits:>7,.0f} |")
    results, settings = [], {key: str(value) for key, value in vars(arguments).items()}
    for arch in arguments.archs:
        found = measure(arch, arguments)
        show(found)
        results.append({**vars(found), "traffic": {arm: vars(each) for arm, each in found.traffic.items()}})
        common.write(arguments.output, settings, {"links": carries, "archs": results})


def measure(arch: str, arguments: argparse.Namespace) -> Found:
    ranks, batch = arguments.ranks, arguments.batch
    full = loading.load(Path(f"config/train/{arch}_baseline.toml"))
    with tempfile.TemporaryDirectory() as folder:
        job = Job.of(arch, ranks, batch, arguments.threads, Path(folder))
        common.gray_images(Path(folder), job.together[BASELINE], batch)
        with network(ranks, job) as connections:
            ask(connections, None)
            traffic = {arm: traffic_of(config, ranks) for arm, config in job.together.items()}
            traffic[ALONE], traffic[INDEPENDENT] = Traffic(ranks, 1, 0, 0), Traffic(ranks, BRANCHES // ranks, 0, 0)
            speeds, nodes, sent = timed(connections, traffic, arguments)
    gflop, at_full_size = (
        6e-9 * costs_of(config)[0].macs[config.data.image_size] * config.train.batch_size / ranks
        for config in (job.together[BASELINE], full)
    )
    return Found(arch, ranks, batch, traffic, gflop, at_full_size, sent, speeds, nodes)


def traffic_of(config: RunConfig, ranks: int) -> Traffic:
    _, parameters = parameters_of_branches(config)
    groups = branch_groups(config, ranks, parameters, half=False)
    return step_traffic(config, ranks, groups, parameters, half=False)


def timed(
    connections: Sequence[Connection], traffic: dict[str, Traffic], arguments: argparse.Namespace
) -> tuple[dict[int, dict[str, list[float]]], dict[str, dict[str, list[float]]], dict[str, float]]:
    """images/s of every arm by rate and by node, and bytes that a rank sends in a step."""
    set_rate(connections, UNLIMITED)
    alone, sent = {}, {}
    for arm in traffic:
        ask(connections, Steps(arm, 2))  # DDP sends its bucket assignment in the first step
        first = ask(connections, Steps(arm, 2))
        alone[arm] = max(each.seconds for each in first) / 2
        sent[arm] = sum(each.bytes for each in first) / 2 / len(first)

    kinds = [Node("one at half speed", slowdown=2), Node("one away half of the time", away=arguments.seconds)]
    rates = [*arguments.rates, UNLIMITED]
    speeds = {rate: {arm: list[float]() for arm in traffic if arm != ALONE or not rate} for rate in rates}
    nodes = {node.name: {arm: list[float]() for arm in OF_NODES} for node in kinds}
    cases = [(rate, arm, ALIKE, into) for rate in rates for arm, into in speeds[rate].items()]
    cases += [(UNLIMITED, arm, node, nodes[node.name][arm]) for node in kinds for arm in nodes[node.name]]
    for n in tqdm(range(arguments.rounds), unit="round", disable=None):
        random.Random(n).shuffle(cases)
        for rate, arm, node, into in cases:
            set_rate(connections, rate)
            step = alone[arm] * node.slowdown + (8e-6 * traffic[arm].bytes / rate if rate else 0)
            seconds = arguments.seconds * (4 if node.away else 1)
            count = max(1, round(seconds / step))
            spent = [each.seconds for each in ask(connections, Steps(arm, count, node))]
            images = arguments.batch * count
            if arm == INDEPENDENT and node is not ALIKE:
                share = BRANCHES // len(connections)
                into.append(images / in_turn([each / share for each in spent], BRANCHES))
            else:
                into.append(images / max(spent))
    return speeds, nodes, sent


def in_turn(seconds: Sequence[float], branches: int) -> float:
    """Seconds until all branches are trained, one after the other, each by the rank that finishes it first.

    `seconds`: what each rank takes for a branch.
    """
    ends = [0.0] * len(seconds)
    for _ in range(branches):
        end, rank = min((end + own, rank) for rank, (end, own) in enumerate(zip(ends, seconds, strict=True)))
        ends[rank] = end
    return max(ends)


# ---------------------------------------------------------------------------------------------------- tables


def show(found: Found) -> None:
    peer, side = found.traffic[BASELINE].bytes, SIDES[found.arch]
    print(
        f"\n{found.arch}, {found.ranks} ranks, {found.batch} images of {side}² a step; the baseline sends "
        f"{1e-6 * peer / found.gflop:.2f} MB per GFLOP (in its config: {1e-6 * peer / found.gflop_at_full_size:.3f})\n"
    )
    rates = list(found.speeds)
    print(
        f"| {'images/s at Mbit/s':<29} | MB computed | MB sent | "
        + " | ".join(f"{name_of(rate):^25}" for rate in rates)
        + " |"
    )
    print(f"|{'-' * 31}|------------:|--------:|" + f"{'-' * 26}:|" * len(rates))
    for arm, traffic in found.traffic.items():
        print(
            f"| {arm:<29} | {traffic.bytes / 1e6:>11,.1f} | {found.sent[arm] / 1e6:>7,.1f} | "
            + " | ".join(spread(found.speeds[rate].get(arm, ())) for rate in rates)
            + " |"
        )
    print(f"\n| {'rate below which it wins':<60} |    computed, Mbit/s     | measured |")
    print(f"|{'-' * 62}|:-----------------------:|---------:|")
    for ours in (GROUPS, INDEPENDENT):
        for other in (BASELINE, REPLICAS):
            low, high = found.computed(ours, other)
            computed = "any" if math.isinf(low) else f"{low:,.0f} .. {high:,.0f}"
            print(
                f"| {f'{ours} over {other}':<60} | {computed:^23} | {limit_of(found.measured(ours, other), rates):>8} |"
            )
    print(f"\n| {'images/s without a limit':<29} | " + " | ".join(f"{arm:^25}" for arm in OF_NODES) + " |")
    print(f"|{'-' * 31}|" + f"{'-' * 26}:|" * len(OF_NODES))
    for node, speeds in {ALIKE.name: found.speeds[UNLIMITED], **found.nodes}.items():
        print(f"| {node:<29} | " + " | ".join(spread(speeds[arm]) for arm in OF_NODES) + " |", flush=True)


def name_of(rate: int) -> str:
    return f"{rate:,}" if rate else "no limit"


def limit_of(rate: float, rates: Sequence[int]) -> str:
    limited = [each for each in rates if each]
    if math.isinf(rate):
        return f"> {max(limited):,}"
    return f"{rate:,.0f}" if rate else f"< {min(limited):,}"


def spread(values: Sequence[float]) -> str:
    """Median and range, in a column."""
    return f"{f'{np.median(values):,.1f} ({min(values):,.1f} .. {max(values):,.1f})' if values else '':>25}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--archs", type=archs, default=list(SIDES), help=f"comma-separated (default: {','.join(SIDES)})"
    )
    parser.add_argument("--ranks", type=int, choices=(2, 4), default=2)
    parser.add_argument("--rates", type=rates, default=[100, 1000, 10_000], help="of links, in Mbit/s, comma-separated")
    parser.add_argument("--batch", type=common.count, default=16, help="images per step, on all ranks together")
    parser.add_argument("--rounds", type=common.count, default=5)
    parser.add_argument(
        "--seconds", type=common.positive_number, default=2, help="of each measurement, and of a stay of a rank"
    )
    parser.add_argument("--threads", type=common.count, help="per rank (default: the CPUs, divided by the ranks)")
    common.add_output(parser, "bench/results/network.json")
    arguments = parser.parse_args()
    arguments.threads = arguments.threads or max(1, available_cpus() // arguments.ranks)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the addresses of the ranks have no names
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ranks that see GPUs take NCCL, which needs one GPU each
    entry.run(lambda: bench(arguments))


def archs(text: str) -> list[str]:
    found = text.split(",")
    if unknown := [name for name in found if name not in SIDES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} given; allowed: {', '.join(SIDES)}")
    return found


def rates(text: str) -> list[int]:
    found = sorted({int(rate) for rate in text.split(",")})
    if found[0] < 1:
        raise argparse.ArgumentTypeError(f"{found[0]} given; rates are at least 1 Mbit/s")
    return found


if __name__ == "__main__":
    main()
