"""What is imported is declared in pyproject.toml."""

from __future__ import annotations

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
import tomli

from bandsplit import __version__
from tests.conftest import REPOSITORY

PROJECT = tomli.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = {"bandsplit", "script", "tests", *(path.stem for path in (REPOSITORY / "bench").glob("*.py"))}
PART_OF = {"pydantic-core": "pydantic"}  # which pins it
NOT_ON_PYPI = {"ffcv"}  # the benchmark of the data pipeline uses it if it is installed


def imported(folder: Path) -> set[str]:
    """Top-level modules that the files of a folder import, other than the standard library and our own."""
    nodes = [node for path in folder.rglob("*.py") for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - OURS - NOT_ON_PYPI


OPTIONAL = ["timm", "tensorboard", "wandb", "onnx", "hub", "app"]


def declared(*extras: str) -> set[str]:
    """Names of the packages that the project needs, with these extras and those that they name."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    own = [re.findall(r"[\w-]+", line.partition("[")[2]) for line in lines if line.startswith("bandsplit[")]
    names = {re.split(r"[^\w.-]", line)[0].lower() for line in lines}
    return names.union(*(declared(*extras) for extras in own))


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("src", OPTIONAL), ("script", []), ("bench", ["bench", "timm"]), ("tests", ["dev"])],
    ids=["src", "script", "bench", "tests"],
)
def test_every_import_is_declared(folder: str, extras: list[str]) -> None:
    distributions = metadata.packages_distributions()
    for module in imported(REPOSITORY / folder):
        names = {name.lower().replace("_", "-") for name in distributions.get(module, [module.replace("_", "-")])}
        names |= {PART_OF[name] for name in names & PART_OF.keys()}
        assert names & declared(*extras), f"{folder} imports {module}, of the package {' or '.join(sorted(names))}"


def test_the_citation_is_of_this_version() -> None:
    text = (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {__version__}\n" in text
    assert re.findall(r"doi: (\S+)", text) == re.findall(r"doi\.org/(\S+?)\)", (REPOSITORY / "README.md").read_text())


@pytest.mark.xdist_group("together")
def test_pytest_xdist_sees_groups(request: pytest.FixtureRequest) -> None:
    """With pytest 9.2 it did not, and tests that share a server ran on several workers."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("not in workers of --dist loadgroup")
    assert request.node.nodeid.endswith("@together")
