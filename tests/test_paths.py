"""Paths in a config: variables, home folders, and errors of the file system."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from bandsplit.errors import UserError
from bandsplit.paths import expanded, reading_from, replace_bytes, writing_to


def test_variables_and_homes_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "/data")
    assert expanded("~/x", "data.root") == tmp_path / "x"
    assert expanded("${DATA}/$DATA/x", "data.root") == Path("/data/data/x")
    assert expanded("x", "data.root") == Path("x")


def test_what_cannot_be_expanded_is_reported_with_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"data.root: '\$NOWHERE/x' given, but the variable is not set"):
        expanded("$NOWHERE/x", "data.root")
    with pytest.raises(UserError, match="distillation.teacher: '~nobodyknows/x' given, but ~nobodyknows has no home"):
        expanded("~nobodyknows/x", "distillation.teacher")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # a container's user that the system does not know
    with pytest.raises(UserError, match="data.root: '~/x' given, but ~ has no home folder here"):
        expanded("~/x", "data.root")


def test_errors_of_the_file_system_name_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=f"^{tmp_path}/x: cannot be read: No such file or directory$"),
        reading_from(tmp_path),
    ):
        (tmp_path / "x").read_text()
    with pytest.raises(UserError, match=f"^{tmp_path}: cannot be written: .*No such file"), writing_to(tmp_path):
        (tmp_path / "x" / "y").write_text("")


def test_a_file_may_have_a_name_of_any_length(tmp_path: Path) -> None:
    """While it is written, too; and two have two names then."""
    files = [tmp_path / (255 * letter) for letter in "ab"]
    with replace_bytes(files[0]) as first, replace_bytes(files[1]) as second:
        first.write(b"a")
        second.write(b"b")
    assert sorted(tmp_path.iterdir()) == files
    assert [file.read_bytes() for file in files] == [b"a", b"b"]
