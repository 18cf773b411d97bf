"""`bandsplit data scan`: examine every image of a data set and summarize it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bandsplit.cli import options
from bandsplit.config import loading
from bandsplit.paths import require_file, writing_to

ABOUT = """
Decodes every image that is new or has changed since the last scan, and prints a summary: images per class, formats,
sizes, duplicates within and across training and validation images, bad files.
"""
EXAMPLES = """
bandsplit data scan
bandsplit data scan resnet34_sub16 --output bad_images.csv
bandsplit data scan --data imagenette --set data.root=/data/imagenette
"""


def add(commands: Any) -> None:
    about = "examine every image and summarize the data set"
    parser = commands.add_parser("scan", help=about, **options.texts(ABOUT, EXAMPLES))
    options.add_config(parser)
    parser.add_argument("--output", type=Path, metavar="CSV", help="write all files that are left out to this file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    if arguments.output is not None:
        require_file("--output", arguments.output)
    data = loading.load(arguments.config or options.DEMO, arguments.set, arguments.data).data
    from bandsplit.data import images, summary

    indexes = images.scan(data)
    print(summary.summary(indexes, data))
    if arguments.output is not None:
        with writing_to(arguments.output):
            summary.bad_files(indexes).to_csv(arguments.output, index=False, errors="surrogateescape")
