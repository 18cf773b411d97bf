"""Find a learning rate: a curve and a suggestion for each branch, and one for all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bandsplit.cli import options
from bandsplit.config import loading

EXAMPLES = """
bandsplit find-lr
bandsplit find-lr resnet34_sub16 --steps 200 --output runs/lr
"""


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = options.parser(prog, __doc__, EXAMPLES)
    options.add_config(parser)
    parser.add_argument("--from", dest="low", type=float, default=1e-5, help="first value of optim.lr (default: 1e-5)")
    parser.add_argument("--to", dest="high", type=float, default=10.0, help="last value (default: 10)")
    parser.add_argument("--steps", type=int, default=100, help="number of learning rates, one step each (default: 100)")
    parser.add_argument("--output", type=Path, help="folder for the figure and its data (default: runs/NAME-find-lr)")
    given = parser.parse_args(arguments)
    if not 0 < given.low < given.high < float("inf"):
        parser.error("--from and --to: expected 0 < from < to, both finite")
    if given.steps < 10:
        parser.error("--steps: expected at least 10")

    config = loading.load(given.config or options.DEMO, given.set, given.data)
    from bandsplit.training import lr_finder

    output = given.output or Path("runs") / f"{config.name}-find-lr"
    lr_finder.find_lr(config, given.low, given.high, given.steps, output)
