"""Look after data sets: python src/data.py COMMAND, with --help for each command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from bandsplit.cli import data_pack, data_prepare, data_scan

Commands = Any  # what add_subparsers returns; argparse keeps its type private


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    arguments = parser.parse_args()
    arguments.run(arguments)


COMMANDS: tuple[Callable[[Commands], None], ...] = (data_scan.add, data_prepare.add, data_pack.add)
"""One function a command: adds its parser, whose default `run` takes the parsed arguments."""
