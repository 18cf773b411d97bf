"""Shared by the benchmarks: options, inputs, interleaved rounds, medians with their range, a table and a JSON file."""

from __future__ import annotations

import argparse
import gc
import io
import json
import math
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from bandsplit.cli.options import count
from bandsplit.config import loading
from bandsplit.config.schema import RunConfig
from bandsplit.cpus import available_cpus
from bandsplit.data import demo
from bandsplit.errors import UserError
from bandsplit.models.precision import Precision
from bandsplit.paths import writing_to
from bandsplit.runs import directory
from bandsplit.spectral.view import View

if TYPE_CHECKING:
    from bandsplit.data.loader import Batch

Images = npt.NDArray[np.uint8]


def positive_number(text: str) -> float:
    """The type of an option that takes a positive number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} given, expected a positive number")
    return value


def output_file(text: str) -> Path:
    """The type of --output. Refuses a folder before anything is measured."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} given, expected a file, but this is a folder")
    return Path(text)


def add_output(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--output", type=output_file, default=Path(default), help=f"JSON file (default: {default})")


def arguments(description: str, output: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--images", type=Path, help="folder of JPEG files, searched recursively (default: demo images)")
    parser.add_argument("--rounds", type=count, default=9, help="timed rounds; each round times every subject once")
    parser.add_argument("--threads", type=count, default=available_cpus(), help="threads per subject")
    add_output(parser, output)
    return parser


def require_gpu() -> None:
    """Raises UserError if --gpu is given where torch finds no GPU."""
    if not torch.cuda.is_available():
        raise UserError("--gpu: given, but torch finds no GPU here")


def loaded(paths: Sequence[Path], overrides: Sequence[str], data: Path | None = None) -> list[RunConfig]:
    """Loads configs. Raises UserError also for two of the same name, since results are kept by name."""
    configs = [loading.load(path, overrides, data) for path in paths]
    names = [config.name for config in configs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"CONFIG: {names.count(twice[0])} configs are named {twice[0]!r}; allowed: configs with different names"
        )
    return configs


def jpeg_files(folder: Path | None, count: int) -> list[Path]:
    """`count` JPEG files below a folder, in a random but fixed order; files repeat if there are fewer.

    Without a folder, demo images, which are generated in data/demo if it does not exist.
    """
    if folder is None:
        folder = Path("data/demo")
        if not folder.exists():
            demo.generate(folder)
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not found:
        raise UserError(f"{folder}: no JPEG files found")
    random.Random(0).shuffle(found)
    return (found * -(-count // len(found)))[:count]


def files_of(options: argparse.Namespace) -> list[Path]:
    """--files JPEG files. Raises UserError if they are less than a batch, for which a DataLoader would wait forever."""
    if options.files < options.batch:
        raise UserError(f"--files: {options.files} given, expected at least --batch = {options.batch}")
    return jpeg_files(options.images, options.files)


def gray_images(root: Path, config: RunConfig, batch_size: int) -> None:
    """Writes gray training and validation images: the same number per class, and at least one batch of each."""
    file, side = root / "gray.jpg", config.data.image_size
    Image.new("RGB", (side, side), (128, 128, 128)).save(file)
    for part in (config.data.train, config.data.val):
        for k in range(config.classes):
            folder = root / part / f"{k:05d}"
            folder.mkdir(parents=True)
            for n in range(-(-batch_size // config.classes)):
                (folder / f"{n}.jpg").hardlink_to(file)


def require_no_teacher(configs: Sequence[RunConfig]) -> None:
    """Raises UserError with distillation, since random images pass no teacher."""
    for config in configs:
        if config.distillation is not None:
            raise UserError(f"distillation: given by {config.name}, but random images pass no teacher; allowed: unset")


def random_batch(config: RunConfig, count: int, precision: Precision, device: torch.device) -> Batch:
    """Normally distributed bands of `count` images, as the loader would hand them over.

    Raises UserError with distillation.
    """
    from bandsplit.data.loader import Batch  # late: DALI is not needed by most benchmarks

    require_no_teacher([config])
    size, view = config.data.image_size // config.split.block, View.of(config)
    shapes = [(count, 3 * len(group), size, size) for group in view.inputs]
    dtype = torch.float16 if precision.half_bands else torch.float32
    inputs = [torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last) for shape in shapes]
    return Batch(view.of_branches(inputs), torch.randint(config.classes, (count,), device=device))


def decoded(files: list[Path], side: int) -> Images:
    """Decodes images to (len(files), side, side, 3): the shorter side is resized to `side`, then center-cropped."""
    images = []
    for file in files:
        image = Image.open(io.BytesIO(file.read_bytes())).convert("RGB")
        scale = side / min(image.size)
        image = image.resize([max(side, round(length * scale)) for length in image.size])
        left, top = ((length - side) // 2 for length in image.size)
        images.append(np.asarray(image.crop((left, top, left + side, top + side))))
    return np.stack(images)


def interleaved(
    subjects: Mapping[str, Callable[[], int]], rounds: int, seconds: float, pause: float = 0, skip: int = 0
) -> dict[str, list[float]]:
    """Throughput in images/s of every subject in every round. Each round runs all subjects, in a new random order.

    Args:
        subjects: functions that process some images and return their number.
        rounds: number of rounds.
        seconds: time for which each subject is called in a round.
        pause: seconds of sleep before each measurement, in which prefetch queues of all subjects fill up.
        skip: calls before each measurement that are not counted, which drain the subject's prefetch queue.
    """
    for subject in subjects.values():  # warm-up
        for _ in range(3):
            subject()
    rates: dict[str, list[float]] = {name: [] for name in subjects}
    order = list(subjects)
    for n in range(rounds):
        random.Random(n).shuffle(order)
        for name in order:
            time.sleep(pause)
            for _ in range(skip):
                subjects[name]()
            count, began = 0, time.perf_counter()
            while (spent := time.perf_counter() - began) < seconds:
                count += subjects[name]()
            rates[name].append(count / spent)
    return rates


def held_bytes(device: torch.device) -> int:
    """Bytes of GPU memory that tensors and CUDA graphs hold; 0 on a CPU."""
    if device.type == "cpu":
        return 0
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes of GPU memory that tensors and CUDA graphs hold during a step."""
    held, allocated = held_bytes(device), torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return held + torch.cuda.max_memory_allocated(device) - allocated


def ratio(rates: Mapping[str, list[float]], ours: str, peer: str) -> tuple[float, float, float]:
    """Median, minimum and maximum over the rounds of the ratio ours / peer."""
    ratios = np.array(rates[ours]) / np.array(rates[peer])
    return float(np.median(ratios)), float(ratios.min()), float(ratios.max())


def print_table(title: str, rates: Mapping[str, list[float]], ours: str) -> None:
    print(f"\n{title}")
    print(f"| {'subject':<34} | img/s (median) |      min .. max      | ours / subject (min .. max) |")
    print(f"|{'-' * 36}|---------------:|:--------------------:|:---------------------------:|")
    for name, values in rates.items():
        spread = f"{min(values):,.0f} .. {max(values):,.0f}"
        against = "" if name == ours else "{:.2f} ({:.2f} .. {:.2f})".format(*ratio(rates, ours, name))
        print(f"| {name:<34} | {np.median(values):>14,.0f} | {spread:^20} | {against:^27} |")


def write(path: Path, settings: dict[str, Any], results: dict[str, Any]) -> None:
    """Writes the settings, the machine and the results of every round as JSON."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"processor": _processor(), "gpu": gpu, **directory.environment(1, "cuda" if gpu else "cpu")}
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"settings": settings, "machine": machine, "results": results}, indent=2) + "\n")
    print(f"\nall rounds: {path}")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
