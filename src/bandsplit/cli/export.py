"""Write a trained model as one file: weights as safetensors, or a graph from images to logits for other tools."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from bandsplit.cli import options
from bandsplit.errors import UserError
from bandsplit.paths import require_file

EXAMPLES = """
bandsplit export runs/demo-seed0 --output demo.safetensors
bandsplit export runs/demo-seed0 --format onnx --branches 0,2 --dtype float16
"""

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch": ".pt2"}


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = options.parser(prog, __doc__, EXAMPLES)
    parser.add_argument("model", type=Path, help="run directory, or a safetensors file of this command")
    parser.add_argument(
        "--format",
        choices=list(SUFFIXES),
        default="safetensors",
        help="safetensors, for bandsplit.load and model.init_from (default); onnx or torch, from images to logits",
    )
    parser.add_argument("--branches", type=_numbers, metavar="0,3", help="only these branches (default: all)")
    parser.add_argument(
        "--dtype", choices=["float32", "float16"], default="float32", help="of the weights (default: float32)"
    )
    options.add_checkpoint(parser)
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the file to write, or to replace (default: RUN.safetensors, …)"
    )
    given = parser.parse_args(arguments)
    trained = Path(os.path.realpath(given.model))  # Path.resolve raises for a circular link
    is_file = os.path.isfile(trained)  # noqa: PTH113  # False without permission
    path = given.output or Path((trained.stem if is_file else trained.name) + SUFFIXES[given.format])
    require_file("--output", path)
    if given.format == "torch" and path.suffix != SUFFIXES["torch"]:
        raise UserError(f"--output {path}: torch.export reads files that end in .pt2")
    if os.path.realpath(path) == str(trained):
        raise UserError(f"--output {path}: this is the model itself; name another file")

    import torch

    from bandsplit.inference import graphs, weights
    from bandsplit.inference.loading import load

    model = load(given.model, given.checkpoint, given.fusion)
    if given.branches is not None:
        model = model.only(given.branches)
    dtype = getattr(torch, given.dtype)
    checked = ""
    if given.format == "safetensors":
        weights.write(model, path, dtype)
    else:
        write = graphs.write_onnx if given.format == "onnx" else graphs.write_torch
        batches = ", ".join(map(str, graphs.BATCHES))
        checked = f"; with {batches} images its logits differ by at most {write(model, path, dtype):.1g}"
    size, count = path.stat().st_size / 1e6, len(model.branches)
    print(f"{path}: {count} branch{'es' * (count > 1)}, {given.dtype}, {size:,.1f} MB{checked}")


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} given, expected numbers of branches, such as 0,3") from None
