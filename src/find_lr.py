"""Learning-rate range test: python src/find_lr.py [CONFIG] [--set key=value …]"""

from __future__ import annotations

import argparse
from pathlib import Path

from bandsplit import cli, configuration

REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?", type=Path, default=REPOSITORY / "config/train/demo.toml")
    parser.add_argument("--data", type=Path, help="data config to use instead of the one that the train config names")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override any key")
    parser.add_argument("--from", dest="low", type=float, default=1e-5, help="first learning rate (default: 1e-5)")
    parser.add_argument("--to", dest="high", type=float, default=10.0, help="last learning rate (default: 10)")
    parser.add_argument("--steps", type=int, default=100, help="steps between them (default: 100)")
    parser.add_argument("--output", type=Path, help="folder of the figure and its numbers (default: runs/NAME-find-lr)")
    arguments = parser.parse_args()
    if not 0 < arguments.low < arguments.high:
        parser.error("--from and --to: expected 0 < from < to")
    if arguments.steps < 10:
        parser.error("--steps: expected 10 at least")

    config = configuration.load(arguments.config, arguments.set, arguments.data)
    from bandsplit import lr_range

    output = arguments.output or Path("runs") / f"{config.name}-find-lr"
    lr_range.find_lr(config, arguments.low, arguments.high, arguments.steps, output)


if __name__ == "__main__":
    cli.run(main)
