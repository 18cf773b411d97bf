"""Data sets from their archives: miniatures of the real ones, nested as they are, whole and damaged."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from string import Template

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision.datasets import imagenet

from bandsplit import progress
from bandsplit.cli import options
from bandsplit.config import loading, schema, shipped
from bandsplit.data import class_names
from bandsplit.data import folders as class_folders
from bandsplit.data.prepare import checksums, destination, held_out, imagenet21k, synsets
from bandsplit.data.prepare.flat import _Names
from bandsplit.errors import UserError
from tests.conftest import REPOSITORY, Done
from tests.doc.test_readme import PAGES, README, commands

WNIDS = ["n01440764", "n01443537", "n01484850", "n01491361", "n01494475"]
WORDS = ["tench, Tinca tinca", "goldfish, Carassius auratus", "great white shark", "tiger shark", "hammerhead"]
PER_CLASS, VAL = 12, 15

Run = Callable[..., Done]


@dataclass(frozen=True)
class Scanned:
    """What is in class folders: paths in order, their labels, and the classes."""

    paths: list[str]
    labels: list[int]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.paths)


def scan(folder: Path) -> Scanned:
    found = class_folders.walk(folder)
    paths = [str(folder / os.fsdecode(name)) for name in found.names.to_pylist()]
    return Scanned(paths, found.labels.tolist(), found.classes)


# ---------------------------------------------------------------------------------------------------------- miniatures


def jpeg(*key: object) -> bytes:
    """A small photograph of noise, another one for each key."""
    rng = np.random.default_rng(list(repr(key).encode()))
    encoded = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)).save(encoded, "JPEG")
    return encoded.getvalue()


def tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    """A tar archive of these files, in this order."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return written.getvalue()


def class_tar(wnid: str, images: int = PER_CLASS) -> bytes:
    return tar({f"{wnid}_{number}.JPEG": jpeg(wnid, number) for number in range(images)})


def devkit() -> bytes:
    """As the real one: ids in another order than the WordNet ids, and synsets above the classes."""
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(number, WNIDS[index], WORDS[index], "…", 0) for number, index in enumerate([3, 0, 4, 1, 2], 1)]
    rows.append((6, "n00001740", "entity", "…", 5))
    meta = io.BytesIO()
    synsets = np.array([tuple(row) for row in rows], dtype=fields).reshape(-1, 1)
    scipy.io.savemat(meta, {"synsets": synsets})
    labels = "".join(f"{number % 5 + 1}\n" for number in range(VAL))
    root = "ILSVRC2012_devkit_t12"
    return tar(
        {
            f"{root}/readme.txt": b"read me",
            f"{root}/data/meta.mat": meta.getvalue(),
            f"{root}/data/ILSVRC2012_validation_ground_truth.txt": labels.encode(),
        },
        "w:gz",
    )


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    """The three archives of ILSVRC 2012 with five synsets."""
    folder = tmp_path / "archives"
    folder.mkdir()
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar({f"{wnid}.tar": class_tar(wnid) for wnid in WNIDS}))
    val = {f"ILSVRC2012_val_{number:08d}.JPEG": jpeg("val", number) for number in range(1, VAL + 1)}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar(dict(sorted(val.items(), reverse=True))))
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit())
    return folder


def tree(root: Path) -> dict[str, str]:
    """Name and hash of every file, and every empty folder."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(root.rglob("*"))
        if path.is_file() or not any(path.iterdir())
    }


def prepare_1k(run_here: Run, archives: Path, to: Path, *more: object) -> Done:
    done = run_here("data.py", "prepare", "imagenet1k", "--archives", archives, "--to", to, "--skip-checksum", *more)
    assert "Traceback" not in done.stderr
    return done


# --------------------------------------------------------------------------------------------------------- imagenet1k


def test_imagenet1k_is_what_torchvision_makes_of_the_archives(
    run_here: Run, archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, labels and meta.bin, and torchvision's ImageNet opens the folder."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    done = prepare_1k(run_here, archives, ours)
    assert done.returncode == 0, done.stderr
    assert f"{ours}: 5 classes, 60 images in train/, 15 images in val/" in done.stdout
    assert next_data(done, ours).classes == 1000
    assert sorted(path.name for path in ours.iterdir()) == [
        "class_names.txt", "dev", "meta.bin", "prepare.json", "train", "val"
    ]  # fmt: skip

    shutil.copytree(archives, theirs)
    unchecked = {part: (name, None) for part, (name, _) in imagenet.ARCHIVE_META.items()}
    monkeypatch.setattr(imagenet, "ARCHIVE_META", unchecked)
    for part in ("train", "val"):
        reference = imagenet.ImageNet(theirs, part)
        opened = imagenet.ImageNet(ours, part)
        assert opened.wnids == reference.wnids == WNIDS
        assert opened.classes == reference.classes
        assert opened.classes[0] == ("tench", "Tinca tinca")
        assert opened.targets == reference.targets
        assert tree(ours / part) == tree(theirs / part)
        assert opened[0][0].size == (9, 8)
    meta = [torch.load(root / "meta.bin", weights_only=True) for root in (ours, theirs)]
    assert meta[0] == meta[1]
    for given in (None, "meta.bin"):
        data = schema.Data(name="imagenet1k", root=str(ours), class_names=given)
        assert class_names.readable(WNIDS, data) == [", ".join(words) for words in opened.classes]
    assert (ours / "dev/data/meta.mat").is_file()
    assert scan(ours / "train").classes == scan(ours / "val").classes == WNIDS


def test_it_is_not_done_twice(run_here: Run, archives: Path, tmp_path: Path) -> None:
    first = prepare_1k(run_here, archives, tmp_path / "to")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "to").rglob("*")}
    again = prepare_1k(run_here, archives, tmp_path / "to")
    assert again.stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "to").rglob("*")} == before


def test_archives_may_lie_in_the_destination_as_torchvision_has_them(run_here: Run, archives: Path) -> None:
    assert prepare_1k(run_here, archives, archives).returncode == 0
    assert len(scan(archives / "train")) == 5 * PER_CLASS


def test_validation_alone(run_here: Run, archives: Path, tmp_path: Path) -> None:
    (archives / "ILSVRC2012_img_train.tar").unlink()
    done = prepare_1k(run_here, archives, tmp_path / "to")
    assert done.returncode == 2
    assert f"--archives: {archives}: no ILSVRC2012_img_train.tar in it, but ILSVRC2012_devkit" in done.stderr
    assert not (tmp_path / "to").exists()
    assert prepare_1k(run_here, archives, tmp_path / "to", "--parts", "val").returncode == 0
    assert len(scan(tmp_path / "to/val")) == VAL


# Killed -------------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
root, left = sys.argv[1], int(sys.argv[2])

def watch(event, arguments):
    "Counts what changes the destination, and ends this process without warning before one of these changes."
    global left
    path = str(arguments[0]) if arguments else ""
    if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") or event == "open" and arguments[1] in ("wb", "w"):
        if path.startswith(root):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
from bandsplit.cli import data, entry
sys.argv = ["data.py", *sys.argv[3:]]
entry.run(data.main)
print("changes:", int(os.environ["LIMIT"]) - left, file=sys.stderr)
"""


def killed_at(change: int, root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`data.py` with these arguments, ended by SIGKILL before its change of this number."""
    return subprocess.run(
        [sys.executable, "-c", KILLED, str(root), str(change), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"LIMIT": str(change), "OMP_NUM_THREADS": "1"},
    )


def resumes_after_kills(run_here: Run, tmp_path: Path, kills: int, *arguments: object) -> None:
    """The same tree from an undisturbed run, from runs killed once, and from one killed again and again."""
    undisturbed = tmp_path / "undisturbed"
    done = killed_at(1_000_000, undisturbed, *arguments, "--to", undisturbed)
    assert done.returncode == 0, done.stderr
    changes = int(done.stderr.rpartition("changes:")[2])
    assert changes > 60
    expected = tree(undisturbed)
    for number in range(kills):
        root = tmp_path / f"killed{number}"
        moment = changes * (2 * number + 1) // (2 * kills)
        assert killed_at(moment, root, *arguments, "--to", root).returncode == -signal.SIGKILL
        assert tree(root) != expected
        done = run_here("data.py", *arguments, "--to", root)
        assert done.returncode == 0, done.stderr
        assert tree(root) == expected, f"killed at {moment} of {changes}"
    root = tmp_path / "often"
    deaths = 0
    while killed_at(changes // 3, root, *arguments, "--to", root).returncode:
        deaths += 1
        assert deaths < 10, "no progress"
    assert deaths >= 2
    assert tree(root) == expected


@pytest.mark.slow
def test_imagenet1k_killed_at_three_moments(run_here: Run, archives: Path, tmp_path: Path) -> None:
    arguments = ("prepare", "imagenet1k", "--archives", archives, "--skip-checksum")
    resumes_after_kills(run_here, tmp_path, 3, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["winter21_whole.tar.gz", pytest.param("fall11_whole.tar", marks=pytest.mark.long)])
def test_imagenet21k_killed_at_three_moments(run_here: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(whole(gzipped=name.endswith("gz")))
    sizes = ("--min-images", 10, "--val-images", 3)
    resumes_after_kills(
        run_here, tmp_path, 3, "prepare", "imagenet21k", "--archives", tmp_path / name, "--skip-checksum", *sizes
    )


def test_a_file_that_was_cut_by_a_kill_is_written_again(run_here: Run, archives: Path, tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    arguments = ("prepare", "imagenet1k", "--archives", archives, "--skip-checksum", "--threads", "1")
    assert run_here("data.py", *arguments, "--to", undisturbed).returncode == 0
    assert killed_at(40, killed, *arguments, "--to", killed).returncode == -signal.SIGKILL
    written = [path for path in (killed / destination.STATE / "work").rglob("*.JPEG") if path.stat().st_size > 100]
    written[0].write_bytes(written[0].read_bytes()[:100])
    assert run_here("data.py", *arguments, "--to", killed).returncode == 0
    assert tree(killed) == tree(undisturbed)


# --------------------------------------------------------------------------------------------------------- refused


def refused(done: Done, *told: str) -> None:
    assert done.returncode == 2, done.stderr
    message = done.stderr.rpartition("error: ")[2]
    assert message.count("\n") == 1, message
    for part in told:
        assert part in message


CLIMBING = {
    "absolute": ("/etc/n01440764_0.JPEG", None, tarfile.REGTYPE),
    "above": ("../n01440764_0.JPEG", None, tarfile.REGTYPE),
    "hidden above": ("a/../../.x.JPEG", None, tarfile.REGTYPE),
    "symbolic link": ("n01440764_0.JPEG", "../../../etc/passwd", tarfile.SYMTYPE),
    "hard link": ("n01440764_0.JPEG", "/etc/passwd", tarfile.LNKTYPE),
    "link within": ("n01440764_0.JPEG", "n01440764_1.JPEG", tarfile.SYMTYPE),
    "device": ("n01440764_0.JPEG", None, tarfile.CHRTYPE),
}


@pytest.mark.parametrize("level", ["outer", "inner"])
@pytest.mark.parametrize("case", CLIMBING)
def test_names_that_climb_out_are_refused(run_here: Run, archives: Path, tmp_path: Path, case: str, level: str) -> None:
    name, link, kind = CLIMBING[case]
    odd = tarfile.TarInfo(name)
    odd.type = kind
    odd.linkname = link or ""
    written = io.BytesIO(class_tar(WNIDS[0]) if level == "inner" else tar({f"{w}.tar": class_tar(w) for w in WNIDS}))
    with tarfile.open(fileobj=written, mode="a") as archive:
        archive.addfile(odd)
    path = archives / "ILSVRC2012_img_train.tar"
    inner = {f"{w}.tar": class_tar(w) for w in WNIDS} | {f"{WNIDS[0]}.tar": written.getvalue()}
    path.write_bytes(tar(inner) if level == "inner" else written.getvalue())
    outside = set(tmp_path.iterdir())
    done = prepare_1k(run_here, archives, tmp_path / "to")
    refused(done, f"{path}: " + f"{WNIDS[0]}.tar: " * (level == "inner") + f"{name!r} in it is refused: ")
    assert set(tmp_path.iterdir()) - outside <= {tmp_path / "to"}
    assert not list((tmp_path / "to").glob("train/n01440764"))


def test_what_is_no_image_is_refused_and_hidden_files_are_left_out(
    run_here: Run, archives: Path, tmp_path: Path
) -> None:
    path = archives / "ILSVRC2012_img_train.tar"
    inner = {f"{wnid}.tar": class_tar(wnid) for wnid in WNIDS}
    images = {f"{WNIDS[2]}_{number}.JPEG": jpeg(number) for number in range(3)}
    path.write_bytes(tar(inner | {f"{WNIDS[2]}.tar": tar(images | {"notes.txt": b"no image"})}))
    refused(prepare_1k(run_here, archives, tmp_path / "to"), f"{path}: {WNIDS[2]}.tar: 'notes.txt' in it is refused")
    hidden = {f"._{WNIDS[2]}_0.JPEG": b"\0\5\26\7", ".DS_Store": b"", "__MACOSX/x.JPEG": b""}
    path.write_bytes(tar(inner | {f"{WNIDS[2]}.tar": tar({**hidden, **images}), f"._{WNIDS[2]}.tar": b"\0\5\26\7"}))
    done = prepare_1k(run_here, archives, tmp_path / "to")
    assert done.returncode == 0, done.stderr
    assert "51 images in train/" in done.stdout
    assert "3 hidden files of the archives are left out" in done.stdout
    path.write_bytes(tar(inner | {f"{WNIDS[2]}.tar": tar(images) * 0 + tar({})}))
    refused(prepare_1k(run_here, archives, tmp_path / "other"), f"{path}: {WNIDS[2]}.tar in it has no images")


@pytest.mark.parametrize("cut", ["header", "boundary", "data", "end", "nothing left"])
def test_a_truncated_archive_is_told_and_replaced(run_here: Run, archives: Path, tmp_path: Path, cut: str) -> None:
    """Also where it ends between two members, which tarfile takes for the end."""
    path = archives / "ILSVRC2012_img_train.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        last = archive.getmembers()[3]
    end = {
        "header": last.offset + 100,
        "boundary": last.offset,
        "data": last.offset_data + 700,
        "end": last.offset_data + last.size - 600,
        "nothing left": 0,
    }[cut]
    path.write_bytes(whole[:end])
    done = prepare_1k(run_here, archives, tmp_path / "to")
    refused(done, str(path), "not a tar archive" if cut == "nothing left" else f"truncated: its {end:,} bytes end")
    path.write_bytes(whole)
    assert prepare_1k(run_here, archives, tmp_path / "to").returncode == 0
    assert len(scan(tmp_path / "to/train")) == 5 * PER_CLASS


def test_a_damaged_header_is_not_the_end(run_here: Run, archives: Path, tmp_path: Path) -> None:
    """tarfile stops there without a word."""
    path = archives / "ILSVRC2012_img_val.tar"
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        content[archive.getmembers()[7].offset + 5] ^= 1
    path.write_bytes(content)
    with tarfile.open(path) as archive:
        assert len(archive.getmembers()) == 7
    refused(prepare_1k(run_here, archives, tmp_path / "to"), f"{path}: damaged: bad checksum")


def test_an_inner_archive_that_is_cut_or_none(run_here: Run, archives: Path, tmp_path: Path) -> None:
    path = archives / "ILSVRC2012_img_train.tar"
    inner = {f"{wnid}.tar": class_tar(wnid) for wnid in WNIDS}
    for bad, told in (
        (class_tar(WNIDS[1])[:1700], "is truncated"),
        (b"<!DOCTYPE html>" * 100, "is not a tar archive"),
    ):
        path.write_bytes(tar(inner | {f"{WNIDS[1]}.tar": bad}))
        refused(prepare_1k(run_here, archives, tmp_path / "to"), f"{path}: '{WNIDS[1]}.tar' in it {told}")
    ends_at_the_last_image = class_tar(WNIDS[1]).rstrip(b"\0")
    ends_at_the_last_image += bytes(-len(ends_at_the_last_image) % 512)
    path.write_bytes(tar(inner | {f"{WNIDS[1]}.tar": ends_at_the_last_image}))
    done = prepare_1k(run_here, archives, tmp_path / "to")
    assert done.returncode == 0, done.stderr
    assert len(scan(tmp_path / "to/train")) == 5 * PER_CLASS


def test_what_a_replaced_archive_does_not_hold_is_gone(run_here: Run, archives: Path, tmp_path: Path) -> None:
    path = archives / "ILSVRC2012_img_train.tar"
    inner = {f"{wnid}.tar": class_tar(wnid) for wnid in WNIDS}
    path.write_bytes(tar(inner | {f"{WNIDS[4]}.tar": tar({"of_another.JPEG": jpeg(1), "notes.txt": b""})}))
    assert prepare_1k(run_here, archives, tmp_path / "to").returncode == 2
    path.write_bytes(tar(inner))
    assert prepare_1k(run_here, archives, tmp_path / "to").returncode == 0
    assert len(scan(tmp_path / "to/train")) == 5 * PER_CLASS


def test_wrong_files_are_told(run_here: Run, archives: Path, tmp_path: Path) -> None:
    train, val, kit = (
        archives / f"ILSVRC2012_{name}" for name in ("img_train.tar", "img_val.tar", "devkit_t12.tar.gz")
    )
    contents = {path: path.read_bytes() for path in (train, val, kit)}

    def with_file(path: Path, content: bytes, *told: str) -> None:
        path.write_bytes(content)
        to = tmp_path / ("another" if path == kit else "to")  # the devkit is unpacked first, and kept
        refused(prepare_1k(run_here, archives, to), f"{path}: ", *told)
        path.write_bytes(contents[path])

    with_file(train, contents[kit], "'ILSVRC2012_devkit_t12/readme.txt' in it is not the archive of a class")
    with_file(train, contents[val], "ILSVRC2012_val_00000015.JPEG' in it is not the archive of a class", "right file?")
    with_file(train, b"<!DOCTYPE html><html>", "not a tar archive; it begins with b'<!DOCTYPE ht'")
    with_file(train, tar({}), "no archives of classes in it")
    with_file(train, tar({f"{wnid}.tar": class_tar(wnid) for wnid in WNIDS[1:]}), f"4 classes, without {WNIDS[0]}")
    more = {f"{wnid}.tar": class_tar(wnid) for wnid in [*WNIDS, "n99999999"]}
    with_file(train, tar(more), "6 classes, with the unknown n99999999; the devkit lists 5 classes")
    with_file(val, contents[train], f"'{WNIDS[0]}.tar' in it is refused: not an image")
    with_file(val, tar({"ILSVRC2012_val_00000001.JPEG": jpeg(1)}), "1 images in it, but the devkit has labels of 15")
    with_file(kit, contents[val], "no data/meta.mat in it; expected the devkit")
    with_file(
        kit,
        tar({"x/data/meta.mat": b"no", f"x/{'data/ILSVRC2012_validation_ground_truth.txt'}": b"1\n"}),
        "cannot be parsed",
    )
    assert prepare_1k(run_here, archives, tmp_path / "to").returncode == 0


def test_a_destination_that_holds_something_else_is_left_alone(run_here: Run, archives: Path, tmp_path: Path) -> None:
    to = tmp_path / "to"
    to.mkdir()
    (to / "thesis.txt").write_text("mine")
    refused(prepare_1k(run_here, archives, to), f"{to}: contains other files (thesis.txt)")
    assert [path.name for path in to.iterdir()] == ["thesis.txt"]
    refused(prepare_1k(run_here, archives, to / "thesis.txt"), "not a folder")
    (to / "thesis.txt").unlink()
    assert prepare_1k(run_here, archives, to, "--parts", "val").returncode == 0
    before = tree(to)
    refused(prepare_1k(run_here, archives, to), "was prepared with 'imagenet1k parts=['val']', not with")
    assert tree(to) == before


def test_two_processes_do_not_share_a_destination(run_here: Run, archives: Path, tmp_path: Path) -> None:
    job = destination.Job("imagenet1k", {"parts": ["train", "val"]})
    with destination.opened(tmp_path / "to", job):
        refused(
            prepare_1k(run_here, archives, tmp_path / "to"), "another process is preparing a data set in this folder"
        )
    assert prepare_1k(run_here, archives, tmp_path / "to").returncode == 0


def test_a_lock_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    """As that of another user; a folder stands for it, since tests may run as root."""
    (tmp_path / ".prepare/lock").mkdir(parents=True)
    with (
        pytest.raises(UserError, match=f"^{tmp_path}: cannot be written: .*lock"),
        destination.opened(tmp_path, destination.Job("flat")),
    ):
        pass


# --------------------------------------------------------------------------------------------------- space, checksums


def test_free_space_is_checked_first(run_here: Run, archives: Path, tmp_path: Path) -> None:
    """A training archive of 8 TB, of which nearly all is a hole."""
    path = archives / "ILSVRC2012_img_train.tar"
    with path.open("r+b") as file:
        file.truncate(8 * 10**12)
    refused(prepare_1k(run_here, archives, tmp_path / "to"), f"{tmp_path}/to: 8.2 TB needed, ", " free on this disk")
    assert not (tmp_path / "to").exists()


def test_what_is_done_needs_no_space_any_more(tmp_path: Path) -> None:
    with destination.opened(tmp_path / "to", destination.Job("imagenet1k")) as target:
        with pytest.raises(UserError, match="8.2 TB needed"):
            target.require_space(8 * 10**12)
        target.commit("train", {"train": target.work("train")}, {}, 5 * 10**12)
        with pytest.raises(UserError, match="3.1 TB needed"):
            target.require_space(8 * 10**12)
        with (target.work("val") / "x").open("wb") as file:
            file.truncate(3 * 10**12)
        target.require_space(8 * 10**12)


def test_a_disk_that_fills_up_in_between(run_here: Run, archives: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for it: the same error comes from the same call."""
    arguments = ["prepare", "imagenet1k", "--archives", str(archives), "--to", str(tmp_path / "to"), "--skip-checksum"]
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "src/data.py"), *arguments],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)),
    )
    refused(Done(done.returncode, done.stdout, done.stderr), "cannot be written: [Errno 27] File too large")
    assert prepare_1k(run_here, archives, tmp_path / "to").returncode == 0
    assert len(scan(tmp_path / "to/train")) == 5 * PER_CLASS


def test_published_checksums_are_torchvisions() -> None:
    assert {name: checksums.MD5[name] for name, _ in imagenet.ARCHIVE_META.values()} == dict(
        imagenet.ARCHIVE_META.values()
    )


def test_checksums_are_compared_once(
    run_here: Run, archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "to"
    arguments = ("data.py", "prepare", "imagenet1k", "--archives", archives, "--to", to)
    refused(run_here(*arguments), "ILSVRC2012_devkit_t12.tar.gz: its MD5 is ", "published", "--skip-checksum")
    for path in archives.iterdir():
        listed = subprocess.run(["md5sum", path], capture_output=True, text=True, check=True).stdout
        monkeypatch.setitem(checksums.MD5, path.name, listed.split()[0])
    path = archives / "ILSVRC2012_img_val.tar"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"JFIF", b"JFIX", 1))
    refused(run_here(*arguments), f"{path}: its MD5 is ")
    path.write_bytes(content)
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    done = run_here(*arguments)
    assert done.returncode == 0, done.stderr
    assert "checksum of ILSVRC2012_img_val.tar" in done.stderr
    assert "checksum of ILSVRC2012_img_train.tar" not in done.stderr  # the run before has compared it


# --------------------------------------------------------------------------------------------------------- imagenet21k

SIZES = [9, 10, 11, 12, 30]


def whole(gzipped: bool = False) -> bytes:
    """winter21 has its archives in a folder."""
    folder = "winter21_whole/" * gzipped
    inner = {f"{folder}{wnid}.tar": class_tar(wnid, images) for wnid, images in zip(WNIDS, SIZES, strict=True)}
    return gzip.compress(tar(inner), mtime=0) if gzipped else tar(inner)


def prepare_21k(run_here: Run, archive: Path, to: Path, *more: object) -> Done:
    few = ("--min-images", 10, "--val-images", 3, "--skip-checksum")
    done = run_here("data.py", "prepare", "imagenet21k", "--archives", archive, "--to", to, *few, *more)
    assert "Traceback" not in done.stderr
    return done


def test_imagenet21k_leaves_small_classes_out_and_holds_images_out(run_here: Run, tmp_path: Path) -> None:
    winter, fall = tmp_path / "winter21_whole.tar.gz", tmp_path / "fall11_whole.tar"
    winter.write_bytes(whole(gzipped=True))
    fall.write_bytes(whole())
    for archive in (winter, fall):
        to = tmp_path / archive.stem
        done = prepare_21k(run_here, archive, to)
        assert done.returncode == 0, done.stderr
        assert f"{to}: 4 classes, 51 images in train/, 12 images in val/" in done.stdout
        assert "1 classes with fewer than 10 images are left out (9 images)" in done.stdout
        assert next_data(done, to).classes == 4
        train, val = scan(to / "train"), scan(to / "val")
        assert train.classes == val.classes == WNIDS[1:]
        assert [val.labels.count(label) for label in range(4)] == [3] * 4
        names = sorted(Path(path).name for path in train.paths + val.paths)
        assert names == sorted(f"{w}_{n}.JPEG" for w, size in zip(WNIDS, SIZES, strict=True) for n in range(size))[9:]
        for path in train.paths + val.paths:
            wnid, number = Path(path).stem.split("_")
            assert Path(path).read_bytes() == jpeg(wnid, int(number))
    assert tree(tmp_path / "winter21_whole.tar/val") == tree(tmp_path / "fall11_whole/val")
    refused(prepare_21k(run_here, tmp_path, tmp_path / "to"), "both winter21_whole.tar.gz and fall11_whole.tar in it")
    assert prepare_21k(run_here, tmp_path, tmp_path / "seed", "--release", "fall11", "--seed", 1).returncode == 0
    assert tree(tmp_path / "seed/val") != tree(tmp_path / "fall11_whole/val")


def test_held_out_images_do_not_depend_on_the_order_of_the_archive() -> None:
    names = [f"{number}.JPEG" for number in range(600)]
    shuffled = random.Random(1).sample(names, len(names))
    chosen = held_out.chosen(names, 50, 0, WNIDS[0])
    assert chosen == held_out.chosen(shuffled, 50, 0, WNIDS[0])
    assert len(chosen) == 50
    assert chosen <= set(names)
    assert chosen != held_out.chosen(names, 50, 1, WNIDS[0])
    assert chosen != held_out.chosen(names, 50, 0, WNIDS[1])


def test_imagenet21k_truncated_keeps_what_is_finished(run_here: Run, tmp_path: Path) -> None:
    archive, to = tmp_path / "winter21_whole.tar.gz", tmp_path / "to"
    content = whole(gzipped=True)
    archive.write_bytes(content[: len(content) * 3 // 5])
    done = prepare_21k(run_here, archive, to)
    refused(done, f"{archive}: truncated: its {len(content) * 3 // 5:,} bytes end inside 'winter21_whole/n0")
    finished = {path: path.stat().st_mtime_ns for path in (to / "train").rglob("*.JPEG")}
    assert finished
    archive.write_bytes(content[:-4])  # of gzip's own end
    refused(prepare_21k(run_here, archive, to), f"{archive}: truncated")
    padded = gzip.compress(gzip.decompress(content) + bytes(1 << 20), mtime=0)  # its checksum is far behind the images
    archive.write_bytes(padded[:-8] + bytes(4) + padded[-4:])
    refused(prepare_21k(run_here, archive, to), f"{archive}: damaged: CRC check failed", "into another folder")
    archive.write_bytes(content)
    assert prepare_21k(run_here, archive, to).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert len(scan(to / "train")) == 51


def test_imagenet21k_mistakes(run_here: Run, tmp_path: Path) -> None:
    other = tmp_path / "mine.tar"
    other.write_bytes(whole())
    refused(prepare_21k(run_here, tmp_path, tmp_path / "to"), "no winter21_whole.tar.gz and no fall11_whole.tar in it")
    refused(prepare_21k(run_here, other, tmp_path / "to"), "--release: mine.tar does not tell which release")
    done = prepare_21k(run_here, other, tmp_path / "to", "--release", "fall11", "--min-images", 500)
    refused(done, f"{other}: no class in it has 500 images; lower --min-images")
    done = prepare_21k(run_here, other, tmp_path / "to", "--val-images", 10)
    refused(done, "--val-images: 10 given, expected less than --min-images")


def test_classes_are_compared_with_timms() -> None:
    info = pytest.importorskip("timm.data").ImageNetInfo("imagenet-21k-miil")
    fall = set(info.label_names())
    assert len(fall) == 11_221
    assert imagenet21k.compared(fall, {}, "fall11") == (
        "the 11,221 classes are those of timm's imagenet21k_miil_synsets.txt"
    )
    gone, few = sorted(fall)[:2]
    told = imagenet21k.compared((fall - {gone, few}) | {"n99999999"}, {few: 499, "n88888888": 3}, "fall11")
    assert told == (
        "compared with the 11,221 classes of timm's imagenet21k_miil_synsets.txt: 1 classes that it does not have "
        f"(n99999999); 1 of its classes left out for too few images ({few} with 499 images); "
        f"1 of its classes are not in the archive ({gone})"
    )
    assert "10,450 classes of timm's imagenet21k_miil_w21_synsets.txt" in imagenet21k.compared(set(), {}, "winter21")


# ------------------------------------------------------------------------------------------------------- tiny imagenet


def tiny(path: Path, **changed: bytes | None) -> None:
    files: dict[str, bytes | None] = {
        "wnids.txt": "\n".join(WNIDS).encode() + b"\n",
        "words.txt": b"n01440764\ttench\n",
    }
    for wnid in WNIDS:
        files |= {f"train/{wnid}/images/{wnid}_{n}.JPEG": jpeg(wnid, n) for n in range(4)}
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"n01440764_0.JPEG\t0\t0\t62\t63\n"
    files |= {f"val/images/val_{n}.JPEG": jpeg("val", n) for n in range(10)}
    files["val/val_annotations.txt"] = "".join(
        f"val_{n}.JPEG\t{WNIDS[n % 5]}\t0\t32\t44\t62\n" for n in range(10)
    ).encode()
    files["test/images/test_0.JPEG"] = jpeg("test")
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (files | changed).items():
            if content is not None:
                archive.writestr(name if name.startswith("..") else f"tiny-imagenet-200/{name}", content)


def prepare_tiny(run_here: Run, source: Path, to: Path) -> Done:
    done = run_here("data.py", "prepare", "tiny-imagenet", "--archives", source, "--to", to, "--skip-checksum")
    assert "Traceback" not in done.stderr
    return done


def test_tiny_imagenet_from_the_zip_file_and_from_the_folder(run_here: Run, tmp_path: Path) -> None:
    path = tmp_path / "tiny-imagenet-200.zip"
    tiny(path)
    done = prepare_tiny(run_here, path, tmp_path / "zip")
    assert done.returncode == 0, done.stderr
    assert "5 classes, 20 images in train/, 10 images in val/" in done.stdout
    assert next_data(done, tmp_path / "zip").classes == 5
    val = scan(tmp_path / "zip/val")
    assert val.classes == WNIDS
    for image, label in zip(val.paths, val.labels, strict=True):
        number = int(Path(image).stem.removeprefix("val_"))
        assert label == number % 5
        assert Path(image).read_bytes() == jpeg("val", number)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    assert prepare_tiny(run_here, tmp_path / "tiny-imagenet-200", tmp_path / "folder").returncode == 0
    assert tree(tmp_path / "folder") == tree(tmp_path / "zip")


def test_tiny_imagenet_mistakes(run_here: Run, tmp_path: Path) -> None:
    path, to = tmp_path / "tiny-imagenet-200.zip", tmp_path / "to"
    refused(prepare_tiny(run_here, tmp_path, to), "neither tiny-imagenet-200.zip nor the unpacked")
    for changed, told in (
        ({"../out.JPEG": b""}, "'../out.JPEG' in it is refused: it points outside of the folder"),
        ({"wnids.txt": None}, "no wnids.txt in it"),
        ({"train/n01440764/images/notes.txt": b""}, "notes.txt' in it is refused: not an image"),
        ({"train/n00000000/images/x.JPEG": b""}, "is of a class that is not in wnids.txt"),
        ({"val/images/val_3.JPEG": None}, "val_3.JPEG in it have no label"),
        ({"val/val_annotations.txt": b"val_0.JPEG n01440764"}, "line 1: 'val_0.JPEG n01440764'"),
    ):
        tiny(path, **changed)
        refused(prepare_tiny(run_here, path, to), f"{path}: ", told)
    tiny(path)
    content = path.read_bytes()
    path.write_bytes(content[:-400])
    refused(prepare_tiny(run_here, path, to), f"{path}: damaged, truncated or not a zip file")
    path.write_bytes(content.replace(jpeg("val", 0)[-9:], b"123456789"))
    refused(
        prepare_tiny(run_here, path, to), f"{path}: damaged, truncated or not a zip file", "Bad CRC-32", "val_0.JPEG"
    )
    path.write_bytes(content)
    assert prepare_tiny(run_here, path, to).returncode == 0
    assert prepare_tiny(run_here, path, tmp_path / "undisturbed").returncode == 0
    assert tree(to) == tree(tmp_path / "undisturbed")


# -------------------------------------------------------------------------------------------------------------- split


def prepare_split(run_here: Run, source: Path, to: Path, *more: object) -> Done:
    done = run_here("data.py", "prepare", "split", "--from", source, "--to", to, *more)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Class folders without a validation part; names that are not easy, and a folder in a class."""
    root = tmp_path / "folders"
    for name, images in (("a cat", 10), ("dög's", 6)):
        (root / name / "deeper").mkdir(parents=True)
        for number in range(images):
            image = ("deeper/" if number % 2 else "") + f"{number}\udce9.jpg"  # a byte that is no UTF-8
            (root / name / image).write_bytes(jpeg(name, number))
    return root


@pytest.mark.parametrize("link", ["hard", "symbolic", "copy"])
def test_split_leaves_the_source_as_it_is(run_here: Run, folders: Path, tmp_path: Path, link: str) -> None:
    before, to = tree(folders), tmp_path / "to"
    done = prepare_split(run_here, folders, to, "--fraction", "0.3", "--seed", 3, "--link", link)
    assert done.returncode == 0, done.stderr
    assert "2 classes, 11 images in train/, 5 images in val/" in done.stdout
    assert next_data(done, to).classes == 2
    assert tree(folders) == before
    val = scan(to / "val")
    assert [val.labels.count(label) for label in (0, 1)] == [3, 2]
    split = [tree(to / "train"), tree(to / "val")]
    assert split[0] | split[1] == before
    assert not split[0].keys() & split[1].keys()
    image = Path(val.paths[0])
    assert image.is_symlink() == (link == "symbolic")
    assert image.samefile(folders / image.relative_to(to / "val")) == (link != "copy")


def test_split_depends_on_the_seed_and_the_names_alone(run_here: Run, folders: Path, tmp_path: Path) -> None:
    trees = []
    for number, seed in enumerate((0, 0, 1)):
        to = tmp_path / f"{number}/to"
        assert prepare_split(run_here, folders, to, "--count", 3, "--seed", seed).returncode == 0
        trees.append(tree(to / "val"))
    assert trees[0] == trees[1] != trees[2]
    assert len(trees[0]) == 6


def test_split_across_disks_makes_symbolic_links(run_here: Run, folders: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == folders.stat().st_dev:
        pytest.skip("no other disk")
    to = other / f"bandsplit{os.getpid()}"
    try:
        done = prepare_split(run_here, folders, to, "--count", 1)
        assert done.returncode == 0, done.stderr
        assert f"symbolic links of {folders}, which is unchanged; hard links are not possible" in done.stdout
        assert Path(scan(to / "val").paths[0]).is_symlink()
    finally:
        shutil.rmtree(to, ignore_errors=True)


def test_split_mistakes(run_here: Run, folders: Path, tmp_path: Path) -> None:
    to = tmp_path / "to"
    refused(prepare_split(run_here, folders, to, "--count", 6), "dög's: 6 images, of which 6 would be held out")
    refused(prepare_split(run_here, folders, folders / "to", "--count", 1), "where it would be a class")
    refused(prepare_split(run_here, tmp_path / "nowhere", to, "--count", 1), "no such folder")
    assert "expected a number between 0 and 1" in prepare_split(run_here, folders, to, "--fraction", 1.5).stderr
    assert not to.exists()
    assert prepare_split(run_here, folders, to, "--count", 1).returncode == 0
    refused(prepare_split(run_here, folders, to, "--count", 2), "was prepared with 'split ")


# --------------------------------------------------------------------------------------------------------------- flat


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    root = tmp_path / "flat"
    root.mkdir()
    for number in range(12):
        (root / f"image {number}.JPEG").write_bytes(jpeg(number))
    (root / "notes.txt").write_text("no image")
    return root


def prepare_flat(run_here: Run, source: Path, listing: str, to: Path, *more: object) -> Done:
    path = source.parent / "list"
    path.write_text(listing)
    done = run_here("data.py", "prepare", "flat", "--from", source, "--list", path, "--to", to, *more)
    assert "Traceback" not in done.stderr
    return done


LISTS: dict[str, Callable[[int, str], str]] = {
    "blanks": lambda number, label: f"image {number}.JPEG {label}",
    "folder": lambda number, label: f"val/image {number}.JPEG   {label}",
    "tabs": lambda number, label: f"image {number}.JPEG\t{label}\t0\t32\t44\t62",
    "csv": lambda number, label: f'"image {number}.JPEG",{label},"more, of it"',
    "no suffix": lambda number, label: f"image {number},{label}",
    "boxes": lambda number, label: f"image {number},{label} 1 2 3 4 {label} 5 6 7 8 ",
}


HEADER = "ImageId,PredictionString\n"


@pytest.mark.parametrize(
    ("form", "header"), [*((form, "") for form in LISTS), *((form, HEADER) for form in ("csv", "no suffix", "boxes"))]
)
def test_flat(run_here: Run, flat: Path, tmp_path: Path, form: str, header: str) -> None:
    before, to = tree(flat), tmp_path / "to"
    listing = header + "\n".join(LISTS[form](number, WNIDS[number % 3]) for number in range(10))
    done = prepare_flat(run_here, flat, listing, to)
    assert done.returncode == 0, done.stderr
    assert f"{to}: 3 classes, 10 images\n" in done.stdout
    assert "2 images are not in " in done.stdout
    assert f"--set data.root={tmp_path} --set data.val=to" in done.stdout
    assert tree(flat) == before
    found = scan(to)
    assert found.classes == WNIDS[:3]
    for path, label in zip(found.paths, found.labels, strict=True):
        number = int(Path(path).stem.removeprefix("image "))
        assert label == number % 3
        assert Path(path).read_bytes() == jpeg(number)


def test_the_command_that_flat_ends_with_is_one_of_a_shell(run_here: Run, flat: Path, tmp_path: Path) -> None:
    to = tmp_path / "my {root} data" / "val {0}'s"
    to.parent.mkdir()
    done = prepare_flat(run_here, flat, "\n".join(f"image {n}.JPEG {n % 2}" for n in range(12)), to)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.rpartition("next: ")[2])
    assert words[-4:] == ["--set", f"data.root={to.parent}", "--set", f"data.val={to.name}"]


def test_flat_with_numbers(run_here: Run, flat: Path, tmp_path: Path) -> None:
    """Folders are sorted by name, numbers are not."""
    listing = "\n".join(f"image {number}.JPEG {number}" for number in range(12))
    assert prepare_flat(run_here, flat, listing, tmp_path / "to").returncode == 0
    assert scan(tmp_path / "to").classes == [f"{number:02d}" for number in range(12)]
    names = tmp_path / "names.txt"
    names.write_text("\n".join(reversed([f"class {number:02d}" for number in range(12)])))
    assert prepare_flat(run_here, flat, listing, tmp_path / "named", "--classes", names).returncode == 0
    assert (tmp_path / "named/class 11/image 0.JPEG").is_file()
    zeros = "\n".join(f"image {number}.JPEG {number:03d}" for number in range(12))
    assert prepare_flat(run_here, flat, zeros, tmp_path / "zeros", "--classes", names).returncode == 0
    assert (tmp_path / "zeros/class 11/image 0.JPEG").is_file()
    names.write_text("one\ntwo")
    done = prepare_flat(run_here, flat, listing, tmp_path / "few", "--classes", names)
    refused(done, f"the labels 10, 11, 2, 3, 4, … are not in {names}; expected 0 to 1")


def test_names_of_a_list_mean_the_image_with_the_same_end(tmp_path: Path) -> None:
    """As paths from elsewhere, of `find`, and without folders; never an image in another folder."""
    found = _Names(["train/cat/1.jpg", "train/dog/1.jpg", "train/dog/2.jpg", "3.jpg", "3.png", "a/4.jpg", "4.jpg"])
    for given, image in {
        "./train/cat/1.jpg": "train/cat/1.jpg",
        "cat/1.jpg": "train/cat/1.jpg",
        "cat/1": "train/cat/1.jpg",
        "set/train/dog/1.jpg": "train/dog/1.jpg",
        "2.jpg": "train/dog/2.jpg",
        "set/3.png": "3.png",
        "4.jpg": "4.jpg",
        "1.jpg": None,
        "3": None,
    }.items():
        assert found.image(PurePosixPath(given)) == image, given
    for given in ("cat/2.jpg", "test/2.jpg"):
        with pytest.raises(KeyError):
            found.image(PurePosixPath(given))


def test_flat_takes_the_paths_that_find_prints(run_here: Run, flat: Path, tmp_path: Path) -> None:
    """Of images whose names are the same in two folders."""
    for number in range(12):
        folder = flat / "ab"[number % 2]
        folder.mkdir(exist_ok=True)
        (flat / f"image {number}.JPEG").rename(folder / f"{number // 2}.JPEG")
    listing = "".join(f"./a/{n}.JPEG,cat\n{flat}/b/{n}.JPEG,dog\n" for n in range(6))
    done = prepare_flat(run_here, flat, listing, tmp_path / "to")
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "to/cat/a") == tree(flat / "a")
    assert tree(tmp_path / "to/dog/b") == tree(flat / "b")


def test_flat_mistakes(run_here: Run, flat: Path, tmp_path: Path) -> None:
    to = tmp_path / "to"
    for name in ("a/twice.png", "b/twice.png"):
        (flat / name).parent.mkdir()
        (flat / name).write_bytes(jpeg(0))
    for listing, told in (
        ("image 0.JPEG a\nimage 99.JPEG a", "list: 1 images that are not there: image 99.JPEG"),
        ("image 99.JPEG a\nimage 0.JPEG a", "list: 1 images that are not there: image 99.JPEG"),
        ("image 99,a\nimage 0,a", "list: 1 images that are not there: image 99\n"),
        ("image 99,5\nimage 0,6", "list: 1 images that are not there: image 99\n"),
        (
            "image 0.JPEG a\ntwice a",
            f"list: 1 names that fit several images each: twice; give them as they are in {flat}",
        ),
        ("twice.png a\nimage 0.JPEG b", "list: 1 names that fit several images each: twice.png"),
        ("image0.JPEG", "line 1: 'image0.JPEG', expected a name and a label"),
        ("image 0.JPEG a\nimage 0.JPEG b", "line 2: 'image 0.JPEG' has the label 'b' and 'a'"),
        ("image 0.JPEG a\n../image 0.JPEG b", "'../image 0.JPEG' in it is refused: it points outside of the folder"),
        ("image 0.JPEG,a/b", "'a/b' cannot be the name of a class folder"),
        ("", "none is listed"),
    ):
        refused(prepare_flat(run_here, flat, listing, to), told)
        assert not to.exists()


# Commands -------------------------------------------------------------------------------------------------------------


PREPARE = sorted({line for page in (README, *PAGES) for line in commands(page) if " prepare " in line})


@pytest.mark.parametrize("command", PREPARE)
def test_commands_of_the_pages_are_understood(run_here: Run, tmp_path: Path, command: str) -> None:
    """There is no such folder here, which is told."""
    done = run_here(*command.removeprefix("python src/").replace("/data/", f"{tmp_path}/").split())
    refused(done, f": {tmp_path}/")
    assert list(tmp_path.iterdir()) == []


def next_data(done: Done, folder: Path) -> schema.Data:
    """The data config of the command that the output ends with."""
    words = shlex.split(done.stdout.rpartition("next: ")[2])
    variables = dict(word.split("=") for word in words[: words.index("torchrun")])
    sets = [word for before, word in itertools.pairwise(words) if before == "--set"]
    named = {path.stem: path for path in shipped.files("train")}
    config = next((named[word] for word in words if word in named), options.DEMO)
    data = loading.load(config, sets).data
    assert Path(Template(data.root).substitute(variables)) == folder
    return data


# Threads and rest -----------------------------------------------------------------------------------------------------


def test_several_threads_make_the_same_tree(run_here: Run, tmp_path: Path) -> None:
    names = [f"n{number:08d}" for number in range(40)]
    random.Random(0).shuffle(names)
    archive = tmp_path / "fall11_whole.tar"
    archive.write_bytes(tar({f"{name}.tar": class_tar(name, 10) for name in names}))
    for threads in (1, 7):
        assert prepare_21k(run_here, archive, tmp_path / str(threads), "--threads", threads).returncode == 0
    assert tree(tmp_path / "1") == tree(tmp_path / "7")


def test_the_first_error_of_several_threads_is_told(run_here: Run, tmp_path: Path) -> None:
    names = [f"n{number:08d}" for number in range(40)]
    archive = tmp_path / "fall11_whole.tar"
    inner = {f"{name}.tar": class_tar(name, 10) for name in names}
    archive.write_bytes(tar(inner | {f"{names[20]}.tar": tar({"x.JPEG": b"1", "y": b"2"})}))
    refused(prepare_21k(run_here, archive, tmp_path / "to", "--threads", 4), f"{names[20]}.tar: 'y' in it is refused")


def test_classes_that_are_there_twice(tmp_path: Path) -> None:
    archive = tmp_path / "fall11_whole.tar"
    archive.write_bytes(tar({f"{folder}/{WNIDS[0]}.tar": class_tar(WNIDS[0]) for folder in "ab"}))
    with pytest.raises(UserError, match=f"{archive}: {WNIDS[0]}.tar is in it twice"):
        synsets.Synsets(archive)
