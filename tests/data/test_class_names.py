"""Readable names of classes, from every form of file, against one map."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loguru import logger

from bandsplit.config import loading
from bandsplit.config.schema import Data
from bandsplit.data import class_names, images
from bandsplit.errors import UserError
from bandsplit.runs import checkpoint
from tests.conftest import Done

NAMES = {
    "n01440764": "tench, Tinca tinca",
    "n02012849": "crane",
    "n03126707": "crane",
    "n04141975": "scale, weighing machine",
}
CLASSES = list(NAMES)


def data_in(folder: Path, given: str | None = None) -> Data:
    return Data(name="photos", root=str(folder), class_names=given)


def lines(separator: str) -> str:
    return "".join(f"{known_as}{separator}{name}\n" for known_as, name in NAMES.items())


FORMS: dict[str, str] = {
    "LOC_synset_mapping.txt": lines(" "),
    "tabs.txt": "\ufeff" + lines("\t").replace("\n", "\r\n\r\n"),
    "in_order.txt": "".join(f"{name}\n" for name in NAMES.values()),
    "more.txt": "n00000001 another class\n" + lines("  "),
    "quoted.csv": "id,name\n" + "".join(f'{known_as},"{name}"\n' for known_as, name in NAMES.items()),
    "keras.json": json.dumps({str(n): pair for n, pair in enumerate(NAMES.items())}),
    "named.json": json.dumps(NAMES),
    "list.json": json.dumps(list(NAMES.values())),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_names(tmp_path: Path, form: str) -> None:
    (tmp_path / form).write_text(FORMS[form], encoding="utf-8", newline="")
    assert class_names.readable(CLASSES, data_in(tmp_path, form)) == list(NAMES.values())
    assert class_names.readable(CLASSES, data_in(Path("elsewhere"), str(tmp_path / form))) == list(NAMES.values())


def test_torchvisions_file(tmp_path: Path) -> None:
    words = {known_as: tuple(name.split(", ")) for known_as, name in NAMES.items()}
    torch.save((words, CLASSES), tmp_path / "meta.bin")
    assert class_names.readable(CLASSES, data_in(tmp_path, "meta.bin")) == list(NAMES.values())


def test_timm_names_all_classes_of_imagenet() -> None:
    info = pytest.importorskip("timm.data").ImageNetInfo("imagenet-21k-miil")
    names = class_names.readable(info.label_names(), data_in(Path(), "timm"))
    assert names == info.label_descriptions()


def test_without_timm_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(UserError, match=r"^data\.class_names: 'timm' given.*pip install -e \.\[timm\]"):
        class_names.readable(CLASSES, data_in(Path(), "timm"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.txt", None, r"^data\.class_names: .*no\.txt: no such file; expected a class and its name per line"),
        ("a.txt", lines(" ") + "n01440764 carp\n", "'n01440764' is named twice, 'tench, Tinca tinca' and 'carp'"),
        ("a.txt", lines(" ") + "n01443537\n", "a.txt, line 5: 'n01443537' given; expected a class and its name"),
        ("a.txt", "0 tench\n1 crane\n", "none of the 4 classes, such as 'n01440764', is named in it, but '0' is"),
        ("a.txt", "", "none of the 4 classes, such as 'n01440764', is named in it; expected"),
        ("a.txt", b"\xff\xfe", "a.txt: cannot be understood: 'utf-8' codec"),
        ("a.json", '{"n01440764": "tench", "n01440764": "carp"}', "'n01440764' is named twice"),
        ("a.json", '["tench", "crane"]', "a.json: 2 names in it, but there are 4 classes"),
        ("a.json", '{"n01440764": 3}', "a.json: neither {class: name} nor"),
        ("a.json", "{", "a.json: cannot be understood: Expecting"),
        ("a.bin", b"PK", "a.bin: not the meta.bin that torchvision's ImageNet reads, or damaged"),
    ],
)
def test_what_is_no_map_is_told(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message.replace("{", r"\{").replace("}", r"\}")):
        class_names.readable(CLASSES, data_in(tmp_path, name))


@pytest.fixture
def told() -> Any:
    messages: list[str] = []
    handler = logger.add(lambda message: messages.append(message.record["message"]))
    yield messages
    logger.remove(handler)


def test_a_class_without_a_name_keeps_its_own_and_is_told_once(tmp_path: Path, told: list[str]) -> None:
    (tmp_path / class_names.BESIDE).write_text("n01440764 tench, Tinca tinca\nn02012849 crane\n")
    for _ in range(2):
        assert class_names.readable(CLASSES[1:], data_in(tmp_path)) == ["crane", "n03126707", "n04141975"]
    assert told == [
        "data.class_names: class_names.txt: no name for 2 of 3 classes, such as n03126707, which keep those of their "
        "folders"
    ]


def test_a_file_of_another_kind_beside_the_data_ends_nothing(tmp_path: Path, told: list[str]) -> None:
    assert class_names.readable(CLASSES, data_in(tmp_path)) == CLASSES
    assert told == []
    (tmp_path / class_names.BESIDE).write_text("fish\nbird\n")
    assert class_names.readable(CLASSES, data_in(tmp_path)) == CLASSES
    assert len(told) == 1
    assert "fish" in told[0]


@pytest.mark.slow
def test_a_run_keeps_names_which_change_nothing_else(
    config_file: Path, image_root: Path, tmp_path: Path, run_here: Callable[..., Done]
) -> None:
    """They may change when it resumes; classes and digests are those of the same data without names."""
    root = Path(shutil.copytree(image_root, tmp_path / "copy"))
    classes = sorted(folder.name for folder in (root / "train").iterdir())
    next((root / "train" / classes[3]).iterdir()).unlink()
    config = loading.load(config_file, [f"data.root={root}"])
    digests = {part: files.digest for part, files in images.open_here(config.data).items()}

    (root / class_names.BESIDE).write_text("".join(f"{each}\tClass {n}, the\n" for n, each in enumerate(classes)))
    run_dir = tmp_path / "run"
    train = ("train.py", config_file, "--set", f"data.root={root}", "--set", "train.epochs=1", "--run-dir", run_dir)
    done = run_here(*train)
    assert done.returncode == 0, done.stderr
    kept = run_dir / "class_names.json"
    assert json.loads(kept.read_text()) == [f"Class {n}, the" for n in range(10)]
    path = checkpoint.latest(run_dir / "checkpoints")
    assert path is not None
    run = checkpoint.read_run(path)
    assert (run["classes"], run["data"]) == (classes, digests)

    done = run_here(*train, "--resume", "--set", f"data.class_names={kept}")
    assert done.returncode == 0, done.stderr
    done = run_here("data.py", "scan", config_file, "--set", f"data.root={root}")
    assert f"fewest        Class 3 ({classes[3]}) 15, Class 0 ({classes[0]}) 16" in done.stdout
