"""Lists of paths and labels, and walks of many folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from bandsplit.data import folders
from bandsplit.data.folders import MISSING, listed, walk
from bandsplit.errors import UserError


def names(found: folders.Found) -> list[str]:
    return [os.fsdecode(name.as_py()) for name in found.names]


@pytest.mark.parametrize("in_this_process", [10**9, 0], ids=["here", "in workers"])
def test_a_walk_finds_what_torchvision_finds(
    image_root: Path, monkeypatch: pytest.MonkeyPatch, in_this_process: int
) -> None:
    monkeypatch.setattr(folders, "_IN_THIS_PROCESS", in_this_process)
    found, theirs = walk(image_root / "train"), ImageFolder(image_root / "train")
    assert [(f"{found.folder}/{name}", int(label)) for name, label in zip(names(found), found.labels, strict=True)] == [
        (path, label) for path, label in theirs.samples
    ]
    assert found.classes == theirs.classes
    stats = [Path(path).stat() for path, _ in theirs.samples]
    assert found.sizes.tolist() == [about.st_size for about in stats]
    assert found.mtimes.tolist() == [about.st_mtime_ns for about in stats]


LISTS = {
    "text": ("l.txt", "a/x 1.jpg cat\n\n# a comment\nb.jpg\tdog\n"),
    "windows": ("l.txt", "\ufeffa/x 1.jpg cat\r\nb.jpg dog\r\n"),
    "csv": ("l.csv", "a/x 1.jpg,cat\nb.jpg,dog\n"),
    "tabs": ("l.txt", "a/x 1.jpg\tcat\n b.jpg\t\tdog \t0\t32\n"),
    "header of text": ("l.tsv", "# from Kaggle\nImage\tLabel\na/x 1.jpg\tcat\nb.jpg\tdog\n"),
    "other header of text": ("l.txt", "image_id\tspecies\na/x 1.jpg\tcat\nb.jpg\tdog\n"),
    "header": ("l.CSV", 'split,label,path\ntrain,cat,"a/x 1.jpg"\nval, dog,b.jpg\n'),
}


@pytest.mark.parametrize(("name", "text"), LISTS.values(), ids=LISTS)
def test_lists_of_all_kinds(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x 1.jpg").write_bytes(b"12345")
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    found = listed(tmp_path / name, tmp_path)
    assert names(found) == ["a/x 1.jpg", "b.jpg"]
    assert found.labels.tolist() == [0, 1]
    assert found.classes == ["cat", "dog"]
    assert found.sizes.tolist() == [5, MISSING]


@pytest.mark.parametrize(
    "header",
    ["image_id,label", "filename,labels", "image,species", "path,class_name", "id_code,diagnosis", "Class,id_code"],
)
def test_a_header_is_known_by_its_words_or_since_it_names_no_file(tmp_path: Path, header: str) -> None:
    """The list is the one without it: numbers stay numbers."""
    (tmp_path / "x").touch()
    swapped = header.startswith("Class")
    rows = "".join(",".join([name, str(n)][:: -1 if swapped else 1]) + "\n" for n, name in enumerate(["x", *"ab" * 5]))
    (tmp_path / "l.csv").write_text(f"{header}\r\n\n{rows}")
    found = listed(tmp_path / "l.csv", tmp_path)
    assert names(found) == ["x", *"ab" * 5]
    assert (found.labels.tolist(), found.classes) == ([*range(11)], [*map(str, range(11))])
    (tmp_path / "l.csv").write_text("gone.jpg,1\nx,0\n")  # a name with such a suffix is an image that is not there
    assert listed(tmp_path / "l.csv", tmp_path).sizes.tolist() == [MISSING, 0]


@pytest.mark.parametrize("name", ["l.csv", "l.txt"])
@pytest.mark.parametrize("labels", ["cat dog cat", "y n y", "3 1 2", "n01 n02 n03"])
def test_a_first_row_labeled_as_others_are_is_an_image_that_is_missing(tmp_path: Path, name: str, labels: str) -> None:
    files, separator = ["img_0001", "a", "b"], "," if name == "l.csv" else " "
    for file in files[1:]:
        (tmp_path / file).touch()
    rows = [separator.join(row) for row in zip(files, labels.split(), strict=True)]
    (tmp_path / name).write_text("\n".join(rows))
    found = listed(tmp_path / name, tmp_path)
    assert (names(found), found.sizes.tolist()) == (files, [MISSING, 0, 0])
    for header in ("image label", "id_code diagnosis", "filename class"):
        (tmp_path / name).write_text("\n".join([header.replace(" ", separator), *rows[1:]]))
        assert names(listed(tmp_path / name, tmp_path)) == files[1:]


def test_an_image_whose_name_begins_like_a_comment(tmp_path: Path) -> None:
    (tmp_path / "#1.jpg").touch()
    (tmp_path / "l.txt").write_text("#1.jpg cat\n#2.jpg cat\n#\n3.jpg dog\n")
    assert names(listed(tmp_path / "l.txt", tmp_path)) == ["#1.jpg", "3.jpg"]


def test_links_to_what_holds_the_part_are_not_entered(tmp_path: Path) -> None:
    """Also where the part is a link itself, so that its folder is in two others."""
    real = tmp_path / "disk/train"
    for name in ("cat/1.jpg", "dog/2.jpg", "../val/cat/3.jpg"):
        (real / name).parent.mkdir(parents=True, exist_ok=True)
        (real / name).touch()
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train").symlink_to(real)
    for name, to in (("all", "../.."), ("set", tmp_path / "set"), ("self", "..")):
        (real / "cat" / name).symlink_to(to)
    (real / "everything").symlink_to("..")
    found = walk(tmp_path / "set/train")
    assert (names(found), found.classes) == (["cat/1.jpg", "dog/2.jpg"], ["cat", "dog"])
    (told,) = found.passed_over
    assert told.startswith("4 links to a folder above, such as ")


def test_links_that_lead_nowhere_and_files_beside_the_classes_are_counted(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    for name in ("cat/1.jpg", "2.jpg", "notes.txt"):
        (tmp_path / name).touch()
    for above in (tmp_path, tmp_path / "cat"):
        (above / "dog").symlink_to("/disk2/dog")
        (above / "me").symlink_to("me")
        (above / "through").symlink_to(tmp_path / "2.jpg/x")
    found = walk(tmp_path)
    assert (names(found), found.classes) == (["cat/1.jpg"], ["cat"])
    assert [told.partition(", ")[0] for told in found.passed_over] == [
        "6 broken links or special files", "1 of another type", "1 outside of the class folders"
    ]  # fmt: skip


def test_a_label_may_have_blanks_where_a_tab_is_before_it(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("my x.jpg\tgolden retriever\ny.jpg cat\n")
    found = listed(tmp_path / "l.txt", tmp_path)
    assert (names(found), found.classes) == (["my x.jpg", "y.jpg"], ["cat", "golden retriever"])


def test_labels_that_are_indices_count_from_0_and_names_of_digits_do_not(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("a 10\nb 2\n")
    found = listed(tmp_path / "l.txt", tmp_path)
    assert (found.classes, found.labels.tolist()) == ([str(i) for i in range(11)], [10, 2])
    (tmp_path / "l.txt").write_text("a 02084071\nb 02\n")
    found = listed(tmp_path / "l.txt", tmp_path)
    assert (found.classes, found.labels.tolist()) == (["02", "02084071"], [1, 0])


def test_labels_of_validation_mean_those_of_training(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("a zebra\n")
    assert listed(tmp_path / "l.txt", tmp_path, ["ape", "zebra"]).labels.tolist() == [1]
    with pytest.raises(UserError, match=r"l.txt, line 1: 'zebra' given, .* no class of the training list: ape, bear"):
        listed(tmp_path / "l.txt", tmp_path, ["ape", "bear"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.txt", "", "no images in this list"),
        ("l.txt", "a 1\nb\n", r"line 2: 'b' given; expected a path, a blank or tab, and a label"),
        ("l.txt", "\tcat\n", r"line 1: '\\tcat' given; expected a path, a blank or tab, and a label"),
        ("l.csv", "a.jpg,1\nb\n", r"line 2: 'b' given; expected a path and a label"),
        ("l.csv", "image_uid,species\nb,1\n", r"line 1: 'image_uid,species' given, and .*image_uid is no file"),
        ("l.csv", "a.jpg,1\n" + '"b.jpg,1\nc.jpg,2\n', r"line 2: a cell goes on in the next line; is a quote not"),
        pytest.param(
            "l.csv",
            "a.jpg,1\n" + '"b.jpg,1\n' + "c.jpg,2\n" * 20_000,
            "line 2: field larger than field limit",
            id="long",
        ),
        ("l.csv", "a,b,c\n", r"line 1: 3 columns given; expected two, a path and a label, or a header"),
        ("none", None, "no such list; expected CSV or text"),
    ],
)
def test_lists_that_cannot_be_understood(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        listed(tmp_path / name, tmp_path)
