"""Time, throughput and memory of a training step: branches beside the baseline and beside plain training scripts.

    python bench/step.py [CONFIG …] [--set KEY=VALUE …] [--batch 32] [--rounds 5] [--images DATA]

By default the ResNet-34 rows: baseline, one band per branch (sub4, sub16, sub36) and bands as channels. The first
CONFIG is what the others are compared with. Each round times every subject once, in a new random order, so that the
ratios hold on a noisy machine. Inputs are random, already on the device. With --images, a data config, JPEG files come
through DALI, for the peers through torchvision's ImageFolder and DataLoader; before each measurement the batches that
were prepared in the meantime are thrown away, and the time that a step waits for its images is shown.

forward, backward and optimizer are the differences between three measurements: the forward pass and loss alone, with
the backward pass, and the whole step. GEMM is the time of matrix products with the sizes of all convolutions and linear
layers, three times (forward, and gradients of inputs and weights), as a part of the step.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from operator import attrgetter
from pathlib import Path
from typing import Any

import common
import numpy as np
import timm
import timm.optim
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy, linear
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

from bandsplit.cli import entry
from bandsplit.config.schema import RunConfig
from bandsplit.config.schema.augment import Augment
from bandsplit.config.schema.loss import Mix
from bandsplit.cpus import available_cpus
from bandsplit.data.loader import Batch
from bandsplit.distributed.mesh import Mesh
from bandsplit.distributed.ranks import Ranks, joined
from bandsplit.errors import UserError
from bandsplit.models import networks
from bandsplit.models.ensemble import Ensemble
from bandsplit.models.precision import Precision
from bandsplit.paths import expanded
from bandsplit.training import capture
from bandsplit.training.learner import learners_of
from bandsplit.training.session import Plan, Session
from bandsplit.training.steps import steps_of

ROWS = ("baseline", "sub4", "sub16", "sub36", "sub4_channels_coarse", "sub64_channels_coarse")
CONFIGS = [Path(f"config/train/resnet34_{row}.toml") for row in ROWS]

Product = tuple[int, int, int]
"""m, k and n of (m, k) @ (k, n)."""

PARTS = ("forward", "forward and backward", "step")

PLAIN: dict[str, object] = {
    "split.block": 1,
    "loss.type": "cross_entropy",
    "model.width": 1.0,
    "model.stem": "standard",
    "model.tweaks": ("b",),
    "model.drop_path": 0.0,
    "model.dropout": None,
    "model.bn_batch_size": "rank",
    "train.freeze": (),
    "train.activation_checkpointing": False,
    "train.compile": False,
    "train.clip_norm": None,
    "train.ema_decay": None,
    "optim.type": "sgd",
}
"""Keys that torchvision's and timm's step do not follow, and the values that they have."""

OF_FOLDERS: dict[str, object] = {"data.kind": "images", "data.layout": "folders"}
"""The same for torchvision's ImageFolder with a DataLoader."""


@dataclass(frozen=True)
class Subject:
    """What is timed: a function for each of PARTS, which needs no arguments; of CUDA graphs for the step alone."""

    name: str
    parts: dict[str, Callable[[], None]]
    products: Counter[Product]
    """How often a forward pass of a batch takes each matrix product."""
    prepared: int
    """Batches that may have been prepared since the last step."""
    take: Callable[[], Any]
    """Takes a batch without training."""
    waited: list[float]
    """Seconds that each whole step waited for its images."""
    precision: Precision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="*", type=Path, default=CONFIGS)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--batch", type=common.count, default=32, help="images per step (default: 32)")
    parser.add_argument("--rounds", type=common.count, default=5)
    parser.add_argument(
        "--steps", type=common.count, help="steps per measurement (default: 1, with --images 5; on a GPU use more)"
    )
    parser.add_argument(
        "--images", type=Path, metavar="DATA", help="data config of JPEG files, instead of random inputs"
    )
    parser.add_argument("--no-peers", action="store_true", help="leave out torchvision's and timm's step")
    common.add_output(parser, "bench/results/step.json")
    arguments = parser.parse_args()
    entry.run(lambda: bench(arguments))


def bench(arguments: argparse.Namespace) -> None:
    sets, synthetic = [*arguments.set, f"train.batch_size={arguments.batch}"], arguments.images is None
    configs = common.loaded(arguments.config, sets, arguments.images)
    for config in configs:
        if (parts := config.train.grad_accum_steps) != 1:
            raise UserError(f"train.grad_accum_steps: {parts!r} given by {config.name}; allowed: 1, a batch at once")
    if not arguments.no_peers:
        require_plain(configs[0], synthetic)
    with joined() as ranks:
        subjects = [of_config(config, ranks, synthetic) for config in configs]
        if not arguments.no_peers:
            subjects += peers(configs[0], ranks.device, synthetic)
        steps = arguments.steps or (1 if synthetic else 5)
        seconds, _, peaks = timed(subjects, arguments.rounds, steps, ranks.device)
        gemm = {subject.name: 3 * seconds_of(subject.products, subject.precision) for subject in subjects}
    show(subjects, seconds, gemm, peaks, arguments.batch)
    waits = {subject.name: subject.waited for subject in subjects}
    results = {"seconds": seconds, "waits": waits, "peak_bytes": peaks, "gemm_seconds": gemm}
    common.write(arguments.output, {key: str(value) for key, value in vars(arguments).items()}, results)


# ---------------------------------------------------------------------------------------------------- subjects


def of_config(config: RunConfig, ranks: Ranks, synthetic: bool) -> Subject:
    """The branches of a config, trained one after the other as the training loop does, on random inputs or its data."""
    waited: list[float] = []
    if synthetic:
        precision = Precision(config.train.precision, ranks.device)
        precision.apply()
        mesh = Mesh(ranks, len(config.split.groups))
        _, learners = learners_of(config, config.train.batch_size, precision, mesh)
        torch.backends.cudnn.benchmark = True
        batches: Iterator[Batch] = repeat(common.random_batch(config, config.train.batch_size, precision, ranks.device))
    else:
        session = Session(Plan.of(config, ranks))
        config, precision, learners, mesh = session.config, session.plan.precision, session.learners, session.mesh
        batches = (batch for _ in repeat(None) for batch in session.feed.take(1, ahead=True))
    first = next(batches)
    inputs, labels = first.inputs, first.labels
    take = steps_of(learners, config, mesh, seed=lambda i, number: torch.manual_seed(0))
    captured = capture.obstacle(config, ranks.device, mesh.replicas) is None

    def losses() -> Iterator[Tensor]:
        for learner, x in zip(learners, inputs, strict=True):
            with precision.autocast():
                yield cross_entropy(learner.network(x), labels)

    def forward() -> None:
        for _ in losses():
            pass

    def forward_and_backward() -> None:
        for loss, learner in zip(losses(), learners, strict=True):
            loss.backward()  # type: ignore[no-untyped-call]
            learner.optimizer.zero_grad(set_to_none=True)

    def step() -> None:
        began = time.perf_counter()
        batch = next(batches)
        waited.append(time.perf_counter() - began)
        take(range(len(learners)), [batch], 0, lr=1e-3)

    with torch.device("meta"):
        branches = Ensemble.of(config).branches
    products: Counter[Product] = sum(
        (products_of(branch, x.shape) for branch, x in zip(branches, inputs, strict=True)), Counter()
    )
    parts = {"step": step} if captured else dict(zip(PARTS, (forward, forward_and_backward, step), strict=True))
    prepared = 0 if synthetic else config.data.prefetch + 1  # one is on its way to the device
    return Subject(config.name, parts, products, prepared, partial(next, batches), waited, precision)


def require_plain(config: RunConfig, synthetic: bool) -> None:
    """Raises UserError if torchvision's and timm's step would not have the network and the step of a config."""
    without = f"--no-peers leaves out torchvision's and timm's step, which cannot be compared with {config.name}"
    for name, value in {**PLAIN, **({} if synthetic else OF_FOLDERS)}.items():
        if (given := attrgetter(name)(config)) != value:
            raise UserError(f"{name}: {given!r} given, allowed: {value!r}; {without}")
    for name, table in () if synthetic else (("augment", Augment()), ("mix", Mix())):
        if getattr(config, name) != table:
            raise UserError(f"[{name}]: given, allowed: none of its keys; {without}")
    if [config.model_of(number) for number in config.split.numbers] != [config.model]:
        raise UserError(f"[[branch]] or split.branches: given, allowed: one network, that of [model]; {without}")
    arch, size = config.model.arch, config.data.image_size
    for name, known in (("torchvision", torchvision.models.list_models()), ("timm", timm.list_models())):
        if arch not in known:
            raise UserError(f"model.arch: {arch!r} given, which {name} does not have; {without}")
    shape = config.train.batch_size, 3, size, size
    with torch.device("meta"):
        own = products_of(networks.build(config.model, 3, config.classes, size), shape)
        for name, net in nets_of_peers(config).items():
            try:
                same = products_of(net, shape) == own
            except RuntimeError:  # it does not take such small images
                same = False
            if not same:
                raise UserError(f"model.arch: {arch!r} at {size} pixels is another network than {name}'s; {without}")


def nets_of_peers(config: RunConfig) -> dict[str, nn.Module]:
    return {
        "torchvision": torchvision.models.get_model(config.model.arch, num_classes=config.classes),
        "timm": timm.create_model(config.model.arch, num_classes=config.classes),
    }


def peers(config: RunConfig, device: torch.device, synthetic: bool) -> list[Subject]:
    """The network of a config on whole images, trained with the means of torchvision and of timm alone."""
    nets = nets_of_peers(config)
    sgd = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
    optimizers = {
        "torchvision": torch.optim.SGD(nets["torchvision"].parameters(), **sgd),
        "timm": timm.optim.create_optimizer_v2(nets["timm"], opt="sgd", **sgd),
    }
    precision = Precision(config.train.precision, device)
    return [plain(name, net, optimizers[name], config, precision, synthetic) for name, net in nets.items()]


def plain(
    name: str,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    precision: Precision,
    synthetic: bool,
) -> Subject:
    net.to(precision.device).train()
    side, count, device = config.data.image_size, config.train.batch_size, precision.device
    batches: Iterator[Any]
    if synthetic:
        images = torch.randn(count, 3, side, side, device=device)
        batches = repeat((images, torch.randint(config.classes, (count,), device=device)))
    else:
        batches = image_folder(config)
    waited: list[float] = []

    def loss_of(x: Tensor, labels: Tensor) -> Tensor:
        with precision.autocast():
            return cross_entropy(net(x), labels)

    x, labels = (tensor.to(device) for tensor in next(batches))

    def forward() -> None:
        loss_of(x, labels)

    def forward_and_backward() -> None:
        loss_of(x, labels).backward()  # type: ignore[no-untyped-call]
        optimizer.zero_grad(set_to_none=True)

    def step() -> None:
        began = time.perf_counter()
        taken = [tensor.to(device, non_blocking=True) for tensor in next(batches)]
        waited.append(time.perf_counter() - began)
        loss_of(*taken).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    parts = dict(zip(PARTS, (forward, forward_and_backward, step), strict=True))
    prepared = 0 if synthetic else 2 * available_cpus()  # by the workers of a DataLoader
    products = products_of(net, x.shape)
    return Subject(f"{name}'s step", parts, products, prepared, partial(next, batches), waited, precision)


def image_folder(config: RunConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of torchvision's ImageFolder in a DataLoader, with the usual training transforms."""
    data = config.data
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(data.image_size, tuple(data.scale)),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32),
            v2.Normalize(list(data.mean), list(data.std)),
        ]
    )
    folder = ImageFolder(expanded(data.root, "data.root") / data.train, transform)
    workers = available_cpus()
    loader = DataLoader(
        folder, config.train.batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True
    )
    return chain.from_iterable(repeat(loader))


# ---------------------------------------------------------------------------------------------------- arithmetic


def products_of(net: nn.Module, shape: Sequence[int]) -> Counter[Product]:
    """The matrix products of a forward pass of inputs of this shape, batch first: one for each convolution (as im2col
    has it) and linear layer."""
    found: Counter[Product] = Counter()

    def note(module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        n, k = module.weight.shape[0], module.weight[0].numel()
        found[output.numel() // n, k, n] += 1

    net = copy.deepcopy(net).to("meta")
    hooks = [m.register_forward_hook(note) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    net(torch.empty(*shape, device="meta"))
    for hook in hooks:
        hook.remove()
    return found


def seconds_of(products: Counter[Product], precision: Precision) -> float:
    """Time of matrix products of random numbers: the shortest of three for each shape, on a CPU also of oneDNN's."""
    total, device = 0.0, precision.device
    for (m, k, n), times in products.items():
        a, b = (torch.randn(shape, device=device, dtype=precision.dtype) for shape in ((m, k), (n, k)))
        ways: list[Callable[[], Tensor]] = [partial(linear, a, b)]
        if device.type == "cpu":  # as a convolution of 1 x 1, for which torch calls oneDNN instead of its BLAS
            ways.append(partial(conv2d, a.view(1, m, 1, k).permute(0, 3, 1, 2), b[:, :, None, None]))
        total += times * min(measured(way, 1, device) for way in ways for _ in range(3))
    return total


# ---------------------------------------------------------------------------------------------------- measurement


def measured(work: Callable[[], Any], times: int, device: torch.device) -> float:
    """Seconds of one call, mean of several in a row."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(device)
    return (time.perf_counter() - began) / times


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(
    subjects: Sequence[Subject], rounds: int, steps: int, device: torch.device
) -> tuple[dict[str, dict[str, list[float]]], dict[str, list[float]], dict[str, int]]:
    """Seconds of every part of every subject in every round, CPU time of its whole step, and GPU memory.

    CPU time: of all threads of this process, preparing images included. GPU memory: of a step, beside networks and
    optimizer. Steps are those of a long run: they find no more batches prepared than a step leaves.
    """
    peaks = {}
    for subject in subjects:  # warm-up: memory, cuDNN's choice of algorithms, compilation, CUDA graphs
        before = common.held_bytes(device)
        for _ in range(3):
            for part in subject.parts.values():
                part()
        if device.type == "cuda":
            peaks[subject.name] = common.peak_bytes(subject.parts["step"], device) - before
        subject.waited.clear()
    seconds = {subject.name: {part: [] for part in subject.parts} for subject in subjects}
    cpu_seconds: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    order = [(subject, part) for subject in subjects for part in subject.parts]
    for n in tqdm(range(rounds), unit="round", disable=None):
        random.Random(n).shuffle(order)
        for subject, part in order:
            work = subject.parts[part]
            if part == "step" and subject.prepared:
                for _ in range(subject.prepared):
                    subject.take()
                work()
                del subject.waited[-1]
            before = time.process_time()
            seconds[subject.name][part].append(measured(work, steps, device))
            if part == "step":
                cpu_seconds[subject.name].append((time.process_time() - before) / steps)
    return seconds, cpu_seconds, peaks


def show(subjects: Sequence[Subject], seconds: Any, gemm: dict[str, float], peaks: dict[str, int], count: int) -> None:
    first = subjects[0].name
    print(f"\nbatch {count}; medians of the rounds; in brackets their range\n")
    print(
        f"| {'':<32} | GMACs | step ms | step / {first} | forward | backward | optimizer | waiting | images/s "
        f"| GFLOP/s | GEMM |" + " peak MiB |" * bool(peaks)
    )
    print(f"|{'-' * 34}|" + f"{'-' * 6}:|" * (10 + bool(peaks)))
    for subject in subjects:
        found = {part: np.array(values) for part, values in seconds[subject.name].items()}
        step = found["step"]
        ratios = step / np.array(seconds[first]["step"])
        mid = float(np.median(step))
        parts = ["", "", ""]
        if len(found) > 1:
            forward, both, _ = found.values()
            parts = [f"{100 * np.median(each) / mid:.0f} %" for each in (forward, both - forward, step - both)]
        waiting = f"{100 * np.median(subject.waited) / mid:.0f} %"
        macs = sum(m * k * n * times for (m, k, n), times in subject.products.items())
        print(
            f"| {subject.name:<32} | {macs / count / 1e9:.3f} | {1e3 * mid:,.0f} "
            f"| {np.median(ratios):.2f} ({ratios.min():.2f} .. {ratios.max():.2f}) | "
            + " | ".join((*parts, waiting))
            + f" | {count / mid:,.1f} | {6 * macs / mid / 1e9:,.0f} | {100 * gemm[subject.name] / mid:.0f} % |"
            + (f" {peaks[subject.name] / 2**20:,.0f} |" if peaks else "")
        )


if __name__ == "__main__":
    main()
