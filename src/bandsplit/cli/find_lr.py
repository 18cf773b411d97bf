"""Find a learning rate: python src/find_lr.py [CONFIG] [--set KEY=VALUE …]"""

from __future__ import annotations

import argparse
from pathlib import Path

from bandsplit.cli import options
from bandsplit.config import loading


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    options.add_config(parser)
    parser.add_argument("--from", dest="low", type=float, default=1e-5, help="first learning rate (default: 1e-5)")
    parser.add_argument("--to", dest="high", type=float, default=10.0, help="last learning rate (default: 10)")
    parser.add_argument("--steps", type=int, default=100, help="number of learning rates, one step each (default: 100)")
    parser.add_argument("--output", type=Path, help="folder for the figure and its data (default: runs/NAME-find-lr)")
    arguments = parser.parse_args()
    if not 0 < arguments.low < arguments.high < float("inf"):
        parser.error("--from and --to: expected 0 < from < to, both finite")
    if arguments.steps < 10:
        parser.error("--steps: expected at least 10")

    config = loading.load(arguments.config or options.DEMO, arguments.set, arguments.data)
    from bandsplit.training import lr_finder

    output = arguments.output or Path("runs") / f"{config.name}-find-lr"
    lr_finder.find_lr(config, arguments.low, arguments.high, arguments.steps, output)
