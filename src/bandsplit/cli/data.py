"""Prepare, scan, pack and verify data sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bandsplit.cli import data_pack, data_prepare, data_scan, options

Commands = Any  # what add_subparsers returns; argparse keeps its type private

EXAMPLES = """
bandsplit data prepare imagenet1k --archives /data/archives --to /data/imagenet
bandsplit data scan resnet34_sub16 --output bad_images.csv
bandsplit data pack resnet34_sub16 --to /data/bands
bandsplit data COMMAND --help                      each command has its own help
"""


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = options.parser(prog, __doc__, EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    given = parser.parse_args(arguments)
    given.run(given)


COMMANDS: tuple[Callable[[Commands], None], ...] = (data_scan.add, data_prepare.add, data_pack.add)
"""One function a command: adds its parser, whose default `run` takes the parsed arguments."""
