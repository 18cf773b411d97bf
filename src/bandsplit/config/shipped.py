"""The configs that come with the package: the folder config/ of the repository, in the package as `configs`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Literal

FOLDER = (Path(__file__).parents[1] / "configs").resolve()

Kind = Literal["train", "data"]


def file_of(config: str | Path, kind: Kind) -> Path:
    """The shipped config that a bare name such as `resnet34_sub16` stands for, unless there is a file of that name."""
    path = Path(config)
    shipped = FOLDER / kind / f"{path}.toml"
    return shipped if path.name == str(path) and not path.is_file() and shipped.is_file() else path


def files(kind: Kind) -> list[Path]:
    return sorted((FOLDER / kind).glob("*.toml"))


def summary(path: Path) -> str:
    """The first sentence of the comment that a config begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("# "), path.read_text(encoding="utf-8").splitlines())
    return " ".join(line.removeprefix("# ") for line in lines).partition(". ")[0].rstrip(".")
