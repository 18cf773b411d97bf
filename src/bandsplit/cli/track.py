"""Pass the metrics of a run on to TensorBoard or Weights & Biases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bandsplit.cli import entry, options
from bandsplit.tracking.tracker import TRACKERS

EXAMPLES = """
bandsplit track runs/demo-seed0 --to tensorboard
bandsplit track runs/demo-seed0 --to wandb --follow
"""


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = options.parser(prog, __doc__, EXAMPLES)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--to",
        choices=TRACKERS,
        required=True,
        help="tensorboard: events in RUN/tensorboard; wandb: Weights & Biases, offline with WANDB_MODE=offline",
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="go on until the run ends; without it, pass on what is there. Weights & Biases gets only what was not "
        "passed on before; TensorBoard gets every event again, in a new file",
    )
    given = parser.parse_args(arguments)

    from bandsplit.tracking import follower

    print(follower.follow(given.run, given.to, given.follow))


if __name__ == "__main__":
    entry.run(main)
