"""`bandsplit data pack` and `verify`: images resized once, or the bands of every image, as files that are read fast."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bandsplit.cli import options
from bandsplit.config import loading
from bandsplit.cpus import available_cpus

PACK_EXAMPLES = """
bandsplit data pack resnet34_sub16 --to /data/bands
bandsplit data pack resnet34_baseline --to /data/resized --kind images --size 256
"""
VERIFY_EXAMPLES = """
bandsplit data verify /data/bands
"""


def add(commands: Any) -> None:
    about = "resize all images once, or store their bands"
    pack = commands.add_parser("pack", help=about, **options.texts(_pack.__doc__, PACK_EXAMPLES))
    options.add_config(pack)
    pack.add_argument("--to", type=Path, required=True, metavar="DIR", help="new or unfinished folder to pack into")
    pack.add_argument(
        "--kind", choices=("bands", "images"), default="bands", help="what to pack (default: the bands of every image)"
    )
    pack.add_argument(
        "--dtype", choices=("uint8", "float16"), default="uint8", help="bands: data type of a value (default: uint8)"
    )
    pack.add_argument(
        "--size",
        type=options.count,
        help="bands: side in pixels of the square that is stored of a training image (default: the largest within "
        "data.resize_size that is whole blocks and centered on what is validated, or, if data.image_size is more, "
        "whole blocks alone); images: most pixels of the shorter side (default: data.resize_size)",
    )
    pack.add_argument("--quality", type=_quality, default=90, help="images: JPEG quality, 1 to 100 (default: 90)")
    pack.add_argument(
        "--workers", type=options.count, default=available_cpus(), help="processes (default: as many as CPUs allotted)"
    )
    pack.set_defaults(run=_pack)
    verify = commands.add_parser("verify", help="check packed data", **options.texts(_verify.__doc__, VERIFY_EXAMPLES))
    verify.add_argument("folder", type=Path, metavar="DIR", help="what `pack` has written")
    verify.add_argument(
        "--workers", type=options.count, default=available_cpus(), help="threads (default: as many as CPUs allotted)"
    )
    verify.set_defaults(run=_verify)


def _pack(arguments: argparse.Namespace) -> None:
    """Packs the training and validation images of a config. Interrupted, the same command continues."""
    config = loading.load(arguments.config or options.DEMO, arguments.set, arguments.data)
    from bandsplit.data.store import pack

    pack.run(config, arguments)


def _verify(arguments: argparse.Namespace) -> None:
    """Reads all of packed data and compares it with its checksums; names every file that is damaged or missing."""
    from bandsplit.data.store import verify

    found = verify.verify(arguments.folder, arguments.workers)
    print(f"{arguments.folder}: {found.files} files, {found.bytes / 1e9:,.3f} GB: all as they were packed")
    if found.absent:
        print(f"not here: bands {', '.join(map(str, found.absent))}")


def _quality(text: str) -> int:
    value = options.count(text)
    if value > 100:
        raise argparse.ArgumentTypeError(f"{text!r} given, expected a number from 1 to 100")
    return value
