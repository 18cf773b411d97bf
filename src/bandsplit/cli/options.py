"""Options that several commands share, each with one help text."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

DEMO = Path(__file__).resolve().parents[3] / "config/train/demo.toml"


def add_config(parser: ArgumentParser, default: str = "the demo") -> None:
    """CONFIG (None: not given), --data and --set: which config a command reads."""
    parser.add_argument("config", nargs="?", type=Path, help=f"train config (default: {default})")
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
