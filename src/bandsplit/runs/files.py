"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from bandsplit.paths import writing_to


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing_to(path):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
