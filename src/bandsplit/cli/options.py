"""Command-line options that several commands share."""

from __future__ import annotations

import math
import shutil
import textwrap
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from bandsplit.config import shipped

DEMO = shipped.FOLDER / "train/demo.toml"

FILE_OR_NAME = "a file, or the name of one that `bandsplit config list` shows"


def parser(prog: str | None, about: str | None, examples: str) -> ArgumentParser:
    """A parser whose help begins with `about` and ends with examples, one a line."""
    return ArgumentParser(prog=prog, **texts(about, examples))


def texts(about: str | None, examples: str) -> dict[str, Any]:
    """The arguments of `parser` for the parser of a subcommand."""
    return {
        "description": textwrap.fill(" ".join((about or "").split()), width()),
        "epilog": f"Examples:\n{textwrap.indent(examples.strip(), '  ')}",
        "formatter_class": RawDescriptionHelpFormatter,
    }


def width() -> int:
    """Columns of text that fit the terminal, as in argparse's help."""
    return shutil.get_terminal_size().columns - 2


def add_config(parser: ArgumentParser, default: str = "the demo") -> None:
    """Adds CONFIG, --data and --set. CONFIG is None if not given; `default` only describes its default in the help."""
    parser.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG", help=f"train config: {FILE_OR_NAME} (default: {default})"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="CONFIG",
        help=f"data config, instead of the one that the train config names: {FILE_OR_NAME}",
    )
    add_set(parser)


def add_set(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a config key, for example optim.lr=0.02; may be repeated",
    )


def add_checkpoint(parser: ArgumentParser) -> None:
    """Adds --checkpoint and --fusion, of a run that a model is loaded from."""
    parser.add_argument("--checkpoint", default="best", help="of a run: best, last or a step number (default: best)")
    parser.add_argument(
        "--fusion",
        choices=["mean", "rank", "learned", "temperature", "drop"],
        help="of a run: how logits are fused; all but mean must be fitted (default: fusion.method of its config)",
    )


def count(text: str) -> int:
    """The type of an option that takes a positive integer."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ArgumentTypeError(f"{text!r} given, expected a positive integer")
    return int(text)


def seed(text: str) -> int:
    """The type of an option that takes a seed, as a config does."""
    if not (text.isascii() and text.isdigit() and int(text) < 2**31):
        raise ArgumentTypeError(f"{text!r} given, expected an integer from 0 to {2**31 - 1}")
    return int(text)


def port(text: str) -> int:
    """The type of an option that takes a TCP port."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**16):
        raise ArgumentTypeError(f"{text!r} given, expected a port, 1 to 65535")
    return int(text)


def seconds(text: str) -> float:
    """The type of an option that takes a time to wait."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.1 <= value <= 86400:
        raise ArgumentTypeError(f"{text!r} given, expected seconds from 0.1 to 86400; run directories come before it")
    return value


def percent(text: str) -> float:
    """The type of an option that takes a number between 0 and 100, both excluded."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 100:
        raise ArgumentTypeError(f"{text!r} given, expected a number between 0 and 100, such as 0.5")
    return value
