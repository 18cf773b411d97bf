"""Classify images with a trained model: their likeliest classes, and what each branch says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bandsplit.cli import options

EXAMPLES = """
bandsplit predict runs/demo-seed0 data/demo/val/disc_striped/00000.jpg
bandsplit predict runs/demo-seed0 data/demo/val --csv runs/demo-seed0/predictions.csv
bandsplit predict demo.safetensors image.jpg -k 1 --json -
"""


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = options.parser(prog, __doc__, EXAMPLES)
    parser.add_argument("model", type=Path, help="run directory, or a safetensors file of `bandsplit export`")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image file, or folder of images")
    parser.add_argument("-k", type=options.count, default=5, help="number of most likely classes to print (default: 5)")
    options.add_checkpoint(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the predictions as JSON; - is standard output")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the predictions as CSV; - is standard output")
    parser.add_argument(
        "--batch-size", type=options.count, default=64, help="images that are classified at once (default: 64)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    given = parser.parse_args(arguments)

    from bandsplit.inference.request import Request, predict

    predict(Request(**vars(given)))
