"""A page in the browser on which to try a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bandsplit.cli import options

EXAMPLES = """
bandsplit app runs/demo-seed0
bandsplit app demo.safetensors --port 8080
"""


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = options.parser(prog, __doc__, EXAMPLES)
    parser.add_argument("model", type=Path, help="run directory, or a safetensors file of `bandsplit export`")
    options.add_checkpoint(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to serve at (default: 127.0.0.1, which other machines cannot reach)",
    )
    parser.add_argument("--port", type=options.port, default=7860, help="port to serve at (default: 7860)")
    given = parser.parse_args(arguments)

    from bandsplit.app.server import Request, serve

    serve(Request(**vars(given)))
