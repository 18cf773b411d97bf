"""Log files, one a rank, and the terminal."""

from __future__ import annotations

import sys

from loguru import logger
from tqdm import tqdm

from bandsplit.runs.directory import RunDirectory


def start_logging(directory: RunDirectory, rank: int) -> None:
    """A file a rank; rank 0 also to the terminal, above the progress bar, or with its figures where there is none."""
    logger.remove()
    path = str(directory.logs / f"rank{rank}.log").replace("{", "{{").replace("}", "}}")  # loguru fills in braces
    logger.add(path, format="{time:YYYY-MM-DD HH:mm:ss} {level: <7} {message}")
    if rank == 0:
        level = "INFO" if sys.stderr.isatty() else "DEBUG"
        logger.add(
            lambda text: tqdm.write(text, end="", file=sys.stderr), format="{time:HH:mm:ss} {message}", level=level
        )
    else:
        logger.add(sys.stderr, format=f"{{time:HH:mm:ss}} rank {rank}: {{message}}", level="ERROR")
