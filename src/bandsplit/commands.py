"""How the commands of this project are written, in the way in which this process was started."""

from __future__ import annotations

import sys
from pathlib import Path


def command(name: str) -> str:
    """`bandsplit report`, `python -m bandsplit report`, or `python src/report.py` where a script of its folder runs."""
    script = _script(name)
    return f"python {script}" if script else f"{'python -m ' * _as_module()}bandsplit {name}"


def launch(name: str) -> str:
    """The same, on any number of ranks: `torchrun src/train.py`, or `torchrun -m bandsplit train`."""
    return f"torchrun {_script(name) or f'-m bandsplit {name}'}"


def _script(name: str) -> Path | None:
    started = Path(sys.argv[0])
    script = started.with_name(f"{name.replace('-', '_')}.py")
    return script if started.suffix == ".py" and not _as_module() and script.is_file() else None


def _as_module() -> bool:
    return Path(sys.argv[0]).name == "__main__.py"
