"""The command `bandsplit`, whose first argument names a command of this folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from bandsplit import __version__
from bandsplit.cli import entry, options

COMMANDS = {
    "train": ("train", "train an ensemble, or resume a run"),
    "evaluate": ("evaluate", "validate a checkpoint, or the ensemble of several runs' branches"),
    "predict": ("predict", "classify images with a trained model"),
    "export": ("export", "write a trained model as one file: safetensors, ONNX or torch.export"),
    "app": ("app", "a page in the browser on which to try a trained model"),
    "report": ("report", "plot and tabulate runs or saved predictions, or compare runs"),
    "track": ("track", "pass the metrics of a run on to TensorBoard or Weights & Biases"),
    "find-lr": ("find_lr", "find a learning rate"),
    "data": ("data", "prepare, scan, pack and verify data sets"),
    "config": ("config", "list the configs and their keys, show a resolved config"),
}
"""Name of a command -> its module in this folder, and one line about it. A module is imported when its command runs."""

ABOUT = "Train image classifiers on the spectral sub-bands of images."
EXAMPLES = """
bandsplit train                          train the demo
bandsplit train resnet34_sub16 --dry-run
torchrun --nproc-per-node 8 -m bandsplit train resnet34_sub16
bandsplit train --help                   each command has its own help
"""


def run() -> None:
    """The console script: `main`, with the exit codes of all entry points."""
    entry.run(main)


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = options.parser(prog or "bandsplit", ABOUT, EXAMPLES)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, (_, about) in COMMANDS.items():
        commands.add_parser(name, help=about)
    name = parser.parse_args(given[:1]).command  # what follows is for the command to parse
    module, _ = COMMANDS[name]
    import_module(f"bandsplit.cli.{module}").main(given[1:], f"{parser.prog} {name}")
