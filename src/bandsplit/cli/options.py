"""Options that several commands share, each with one help text."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]


def add_config(parser: ArgumentParser) -> None:
    """CONFIG, --data and --set: which config a command reads."""
    parser.add_argument(
        "config",
        nargs="?",
        type=Path,
        default=REPOSITORY / "config/train/demo.toml",
        help="train config (default: the demo)",
    )
    parser.add_argument("--data", type=Path, help="data config to use instead of the one named by the train config")
    add_set(parser)


def add_set(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a config key, for example optim.lr=0.02; may be repeated",
    )
