"""Exported graphs are the model at any batch size, know its classes, and are written whole or not at all."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bandsplit
from bandsplit.cli import export
from bandsplit.errors import UserError
from bandsplit.inference import graphs, weights
from bandsplit.inference.classifier import Classifier
from bandsplit.inference.description import Description
from tests.inference.models import classifier

OVERLAPPING = ["split.block=4", "split.transform=dct1d", "split.branches=[[3, 0], [1], [15, 3]]"]


@pytest.fixture
def exported(config_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    weights.write(classifier(config_file, *OVERLAPPING), path)
    return path


def test_onnx(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of three branches, with the weights in a file of their own, as beyond 2 GB."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    model, path = bandsplit.load(exported).only([2, 1]), tmp_path / "out" / "model.onnx"
    size = sum(x.nbytes for x in model.state_dict().values() if x.is_floating_point())
    path.parent.mkdir()
    graphs.write_onnx(model, path, torch.float32, in_one_file=size - 1)
    assert [each.name for each in sorted(path.parent.iterdir())] == ["model.onnx", "model.onnx.data"]
    assert path.stat().st_size < size < path.with_name("model.onnx.data").stat().st_size * 1.2
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == list(model.classes)
    assert Description.from_json(about["bandsplit"], "") == model.description
    assert_same(lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), model, 1e-4)


def test_torch(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A graph whose logits differ is not written, and an earlier file stays."""
    model, path, files = bandsplit.load(exported).only([1]), tmp_path / "out" / "model.pt2", {"bandsplit": ""}
    path.parent.mkdir()
    options = [str(exported), "--format", "torch", "--branches", "1", "--output", str(path)]
    export.main(options)
    assert "1 branch, float32" in capsys.readouterr().out
    before = path.read_bytes()
    assert_same(torch.export.load(path, extra_files=files).module(), model, 1e-4)
    assert Description.from_json(files["bandsplit"], "") == model.description
    monkeypatch.setitem(graphs.TOLERANCE, torch.float16, 1e-9)
    with pytest.raises(UserError, match=r"model\.pt2: not written: with 1 images its logits differ"):
        export.main([*options, "--dtype", "float16"])
    assert [each.read_bytes() for each in path.parent.iterdir()] == [before]


def test_graphs_may_have_names_of_any_length(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    (tmp_path / "out").mkdir()
    paths = [tmp_path / "out" / f"{'x' * (255 - len(suffix))}{suffix}" for suffix in (".onnx", ".pt2")]
    for kind, path in zip(("onnx", "torch"), paths, strict=True):
        export.main([str(exported), "--format", kind, "--branches", "1", "--output", str(path)])
    assert sorted((tmp_path / "out").iterdir()) == sorted(paths)


def test_circular_links(exported: Path, tmp_path: Path) -> None:
    """One in place of the model is named; one in place of the file is replaced."""
    link = tmp_path / "link"
    link.symlink_to(link)
    with pytest.raises(UserError, match=f"{link}: no such model"):
        export.main([str(link), "--output", str(tmp_path / "model.safetensors")])
    export.main([str(exported), "--output", str(link)])
    assert link.is_file()


def test_without_output_the_file_has_the_name_of_the_run(
    exported: Path, finished: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, also after a dot; a file loses its suffix."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("sub16-lr0.05-seed0", "sub16-lr0.1-seed0"):
        shutil.copytree(finished(1), tmp_path / name)
        export.main([str(tmp_path / name)])
    export.main([str(exported.rename(tmp_path / "model-lr0.1.safetensors")), "--format", "torch", "--branches", "1"])
    assert sorted(path.name for path in Path.cwd().iterdir()) == [
        "model-lr0.1.pt2", "sub16-lr0.05-seed0.safetensors", "sub16-lr0.1-seed0.safetensors"
    ]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("kind", ["onnx", "torch"])
@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        *itertools.product(["resnet50", "mobilenet_v3_small", "vgg16_bn"], ["float32", "float16"]),
        ("inception_v3", "float32"),  # untrained, its values exceed float16
    ],
)
def test_architectures(config_file: Path, tmp_path: Path, arch: str, kind: str, dtype: str) -> None:
    """The command itself compares the logits."""
    keys = ["split.branches=[[3, 0]]", "data.image_size=150", "data.resize_size=150"]
    keys += ["model.width=1"] * (arch in ("inception_v3", "vgg16_bn"))
    path = tmp_path / "model.safetensors"
    weights.write(classifier(config_file, f"model.arch={arch}", *keys), path)
    output = tmp_path / f"model{export.SUFFIXES[kind]}"
    earlier = tmp_path / "model.onnx.data"
    earlier.touch()
    export.main([str(path), "--format", kind, "--dtype", dtype, "--output", str(output)])
    assert earlier.exists() == (kind == "torch")
    assert output.stat().st_size > 0.9 * path.stat().st_size / (1 if dtype == "float32" else 2)


def assert_same(graph: Callable[[Tensor], Tensor], model: Classifier, close: float) -> None:
    """On other images than those that the command itself compares."""
    for batch in (1, 2, 7):
        images = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(10 + batch))
        with torch.no_grad():
            torch.testing.assert_close(graph(images), model(images), rtol=close, atol=close)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "nowhere/model.onnx"], "--output nowhere/model.onnx: there is no folder nowhere"),
        (["--format", "torch", "--output", "model.bin"], "end in .pt2"),
        (["--branches", "3"], "--branches 3: allowed are 0,1,2, each at most once"),
        (["--output", "MODEL"], "this is the model itself"),
    ],
)
def test_mistakes(exported: Path, options: list[str], message: str) -> None:
    before = exported.read_bytes()
    with pytest.raises(UserError, match=message):
        export.main([str(exported), *(str(exported) if word == "MODEL" else word for word in options)])
    assert exported.read_bytes() == before
