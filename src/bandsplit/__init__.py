"""Bandsplit: train image classifiers on the spectral sub-bands of JPEG images."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bandsplit.inference.loading import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`load`, imported with torch when it is first used."""
    if name == "load":
        return importlib.import_module("bandsplit.inference.loading").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
