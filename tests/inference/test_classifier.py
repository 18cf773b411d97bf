"""A trained model without DALI: same bands and logits as in validation, whatever the image comes as."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from loguru import logger
from PIL import Image

import bandsplit
from bandsplit.data.loader import ValidationLoader
from bandsplit.data.pipeline import Shard
from bandsplit.errors import UserError
from bandsplit.inference import preparation, weights
from bandsplit.inference.classifier import Classifier
from bandsplit.inference.resizing import resized_center
from bandsplit.models.fusion import Fusion
from bandsplit.runs.directory import RunDirectory
from bandsplit.runs.fitted import FILE, Fitted, HeldOut
from bandsplit.runs.fitted import preparation as preparation_of
from tests.conftest import image_files
from tests.inference.models import classifier, restored

SPLITS = [
    ["split.block=1"],
    ["split.block=2", "split.transform=hadamard", "model.stem=small"],
    ["split.block=4", "split.transform=dct1d", "split.norm=none", "split.branches=[[3, 0], [15, 3, 7]]"],
    ["split.block=2", "split.scale=0.5", "split.sigma=[8, 1, 0.5, 0.25]", "split.branches=all", "split.only=[0]"],
]


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth random colors, as resizing filters differ in noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("overrides", SPLITS, ids=" ".join)
def test_bands_and_logits_are_those_of_validation(config_file: Path, tmp_path: Path, overrides: list[str]) -> None:
    """On images whose shorter side is data.resize_size already, so that neither resizes."""
    for i, (height, width) in enumerate([(40, 40), (40, 53), (71, 40)]):
        path = tmp_path / "val" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(height, width, i).save(path)
    run, model = restored(config_file, *overrides), classifier(config_file, *overrides)
    files = image_files(tmp_path / "val")
    (batch,) = ValidationLoader(run.config, files, Shard(0, 1, 3, threads=1, device_id=None))
    crops = torch.stack([preparation.prepared(path, model.description) for path in files.paths])
    assert crops.dtype == torch.uint8
    for ours, theirs in zip(model.inputs(crops), batch.inputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    with torch.no_grad():
        logits = run.ensemble(batch.inputs)
        torch.testing.assert_close(model.branch_logits(crops / 255), logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(crops), logits.mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
def test_resized_images_are_those_of_validation(config_file: Path, tmp_path: Path, filter: str) -> None:
    """Also where the longer side and the place of the crop are rounded, and for images that are enlarged."""
    keys = ["split.block=1", "data.mean=[0, 0, 0]", "data.std=[1, 1, 1]", f"data.interpolation={filter}"]
    keys += ["data.image_size=40"]  # as large as the shorter side, so that edges are seen
    model, run = classifier(config_file, *keys), restored(config_file, *keys)
    for i, (height, width) in enumerate([(53, 91), (91, 53), (200, 151), (23, 30), (150, 151), (2, 900)]):
        path = tmp_path / "val" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    files = image_files(tmp_path / "val")
    (batch,) = ValidationLoader(run.config, files, Shard(0, 1, 6, threads=1, device_id=None))
    ours = torch.stack([preparation.prepared(path, model.description) for path in files.paths]).float()
    difference = (ours - batch.inputs[0]).abs()
    assert difference.max() <= 1
    assert difference.mean() < 0.02


@pytest.mark.parametrize("shape", [(2**40, 1), (3, 2**40)])
def test_how_long_an_image_is_does_not_matter(shape: tuple[int, int]) -> None:
    endless = torch.tensor(7, dtype=torch.uint8).expand(3, *shape)
    assert torch.equal(resized_center(endless, 40, 32, "bicubic"), torch.full((3, 32, 32), 7.0))


def test_whatever_an_image_comes_as(config_file: Path, tmp_path: Path) -> None:
    model = classifier(config_file)
    image = photograph(50, 70)
    path = tmp_path / "image.png"
    image.save(path)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).movedim(-1, 0)
    wanted = model.predict(image)
    assert [model.predict(each) for each in (path, str(path), array, tensor)] == [wanted] * 4
    of_float, of_gray = model.predict(tensor / 255), model.predict(image.convert("L"))
    assert of_float == wanted
    assert of_gray == model.predict(np.asarray(image.convert("L")))
    assert [each.top[0].label for each in model.predict([tensor / 255, image])] == [wanted.top[0].label] * 2
    sixteen = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    sixteen.save(tmp_path / "sixteen.pgm")
    twelve = (np.asarray(sixteen) >> 4).astype(">u2").tobytes()
    (tmp_path / "twelve.pgm").write_bytes(b"P5 70 50 4095\n" + twelve)
    for each in (sixteen, tmp_path / "sixteen.pgm", tmp_path / "twelve.pgm"):
        assert model.predict(each) == of_gray
    sixteen.save(tmp_path / "signed.tiff", tiffinfo={339: 2})
    image.convert("L").convert("I").save(tmp_path / "long.tiff")
    for name in ("signed", "long"):
        with pytest.raises(UserError, match=rf"{name}\.tiff: cannot be read as an image: gray of 32 bits, or signed, "):
            model.predict(tmp_path / f"{name}.tiff")
    shapes = np.zeros((3, 50, 70, 1)), torch.zeros(4, 5, 5)
    for wrong in (*shapes, np.zeros((50, 70, 3), dtype=np.int64), array.astype(np.float32)):
        with pytest.raises(ValueError, match="^image (of|with)"):
            model.predict(wrong)


def test_confidences_are_those_of_the_softmax(config_file: Path) -> None:
    model = classifier(config_file)
    images = [photograph(48, 60, seed) for seed in range(3)]
    crops = torch.stack([preparation.prepared(image, model.description) for image in images])
    with torch.no_grad():
        logits = model.branch_logits(crops)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(crops).dtype == torch.float32
    for i, prediction in enumerate(model.predict(images, k=99)):
        assert len(prediction.top) == len(model.classes) == 10
        assert sum(guess.confidence for guess in prediction.top) == pytest.approx(1)
        assert [guess.label for guess in prediction.top] == logits.mean(0)[i].argsort(descending=True).tolist()
        assert [vote.label for vote in prediction.votes] == logits[:, i].argmax(-1).tolist()
        assert prediction.votes[0].confidence == pytest.approx(logits[0, i].softmax(-1).max().item(), rel=1e-5)
        assert prediction.top[0].name == model.names[prediction.top[0].label]


def test_of_equal_logits_the_first_class_is_predicted(config_file: Path) -> None:
    """As in an evaluation."""
    logits = torch.randn(4, 500, 10, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    logits[1:] = logits[0]
    found = classifier(config_file).predictions(logits, k=3)
    assert [prediction.top[0].label for prediction in found] == logits[0].argmax(-1).tolist()
    assert [prediction.votes[2].label for prediction in found] == logits[0].argmax(-1).tolist()


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "model.arch=resnet50",
            "split.branches=[[0, 1]]",
            'model.tweaks=["b", "c", "d"]',
            "model.drop_path=0.1",
            "model.zero_gamma=true",
        ],
        [
            "model.arch=alexnet",
            "split.branches=[[3]]",
            "model.width=1",
            "data.image_size=128",
            "data.resize_size=128",
            "model.dropout=0.2",
        ],
        ["model.arch=mobilenet_v3_small", "split.branches=[[0, 1, 2, 3], [0]]", "train.precision=fp32"],
        [
            "model.source=timm",
            "split.branches=[[0], [1]]",
            "model.arch=test_vit",
            "model.width=1",
            "data.image_size=64",
            "data.resize_size=64",
        ],
    ],
    ids=lambda overrides: overrides[0] if "timm" not in overrides[0] else overrides[2],
)
def test_an_exported_file_is_the_model(config_file: Path, tmp_path: Path, overrides: list[str]) -> None:
    """The same weights, with float16 but for its rounding. Random numbers of the process are not touched."""
    model, path = classifier(config_file, *overrides), tmp_path / "model.safetensors"
    images = torch.rand(2, 3, model.description.val_size, model.description.val_size)
    weights.write(model, path)
    state = torch.get_rng_state()
    again = bandsplit.load(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.description == model.description
    assert all(torch.equal(x, model.state_dict()[key]) for key, x in again.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(again(images), model(images), rtol=1e-5, atol=1e-6)
    half = tmp_path / "half.safetensors"
    weights.write(model, half, torch.float16)
    assert half.stat().st_size < 0.6 * path.stat().st_size
    for key, x in bandsplit.load(half).state_dict().items():
        assert x.dtype == model.state_dict()[key].dtype
        torch.testing.assert_close(x, model.state_dict()[key], rtol=1e-3, atol=1e-7)
    before = half.read_bytes()
    next(model.parameters()).data.view(-1)[0] = 65520  # rounded to infinity in float16
    with pytest.raises(UserError, match=r"half\.safetensors: not written: .*: its values exceed float16"):
        weights.write(model, half, torch.float16)
    assert half.read_bytes() == before


def test_some_branches_are_where_the_model_is(config_file: Path) -> None:
    """They share its memory, in its dtype; the meta device stands for any other than the CPU."""
    model = classifier(config_file)
    model.branches.half()
    some = model.only([2, 0])
    shared = zip(some.branches, (model.branches[2], model.branches[0]), strict=True)
    for a, b in ((x.state_dict(), y.state_dict()) for x, y in shared):
        assert {key: (x.dtype, x.data_ptr()) for key, x in a.items()} == {
            key: (x.dtype, x.data_ptr()) for key, x in b.items()
        }
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(some.branch_logits(images), model.branch_logits(images)[[2, 0]])
    on_meta = model.to("meta").only([1])
    assert {x.device.type for x in (*on_meta.parameters(), *on_meta.buffers(), on_meta(images.to("meta")))} == {"meta"}


def test_the_fusion_of_a_run(config_file: Path) -> None:
    run = restored(config_file)
    fusions = {"learned": Fusion([0.5, 0.25, 0.0, 2.0], 1.0, 50.0)}
    Fitted(run.fitted_branches, HeldOut(1, 1, 1, 0, ""), fusions).write(run.checkpoint / FILE)
    from bandsplit.inference.of_run import describe

    model = Classifier(describe(run, "learned"), run.ensemble.state_dict())
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        z = model.branch_logits(images)
        torch.testing.assert_close(model(images), 0.5 * z[0] + 0.25 * z[1] + 2 * z[3])
    some = model.description.only([3, 0])
    assert (some.weights, [branch.bands for branch in some.branches]) == ((2.0, 0.5), [(3,), (0,)])
    assert classifier(config_file).description.only([1, 2]).weights == (0.5, 0.5)
    for numbers in ([], [4], [1, 1], [2]):
        with pytest.raises(UserError, match="--branches"):
            model.description.only(numbers)
    otherwise = HeldOut(1, 1, 1, 0, "", {**preparation_of(run.config.data), "resize_size": 99})
    Fitted(run.fitted_branches, otherwise, fusions).write(run.checkpoint / FILE)
    told = list[str]()
    sink = logger.add(told.append, format="{message}", level="WARNING")
    assert describe(run, "learned") == model.description
    classifier(config_file, "distillation.teacher=runs/teacher", "distillation.residual=true")
    logger.remove(sink)
    assert "fusion was fitted on images prepared with {'val_image_size': 32, 'resize_size': 99, " in told[0]
    assert told[1].endswith(f" evaluate runs/teacher {run.run_dir}\n")
    assert len(told) == 2
    directory = RunDirectory(run.run_dir)
    lines = [{"event": "validation", "step": run.step, "epoch": 1.0, "top1": top1} for top1 in (50.0, 60.0)]
    directory.metrics.write_text("\n".join(map(json.dumps, lines))[:-5])
    directory.environment.write_text("[{")  # both cut off, as by a full disk
    assert describe(run, "mean").training.top1 == 50
    with pytest.raises(UserError, match="fusion 'rank'.*--fit-fusion"):
        describe(run, "rank")


def test_what_is_no_model_is_named(config_file: Path, tmp_path: Path) -> None:
    path, text = tmp_path / "model.safetensors", tmp_path / "notes.txt"
    weights.write(classifier(config_file), path)
    text.write_text("no model")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-100])
    graph = Path(shutil.copy(text, tmp_path / "model.onnx"))
    for where, what in [
        (tmp_path / "nowhere", "no such model"),
        (tmp_path / ("x" * 300), "cannot be read: File name too long"),
        (text, "not a safetensors file"),
        (graph, "a graph for other tools; expected a run directory or a safetensors file of"),
        (cut, "damaged"),
    ]:
        with pytest.raises(UserError, match=f"{where}.*{what}"):
            bandsplit.load(where)
    with pytest.raises(UserError, match="exported model has one checkpoint"):
        bandsplit.load(path, checkpoint="last")
    with pytest.raises(UserError, match=r"notes\.txt: cannot be read as an image"):
        bandsplit.load(path).predict([photograph(40, 40), text])


def test_an_exported_model_needs_neither_dali_nor_the_config(config_file: Path, tmp_path: Path) -> None:
    path, image = tmp_path / "model.safetensors", tmp_path / "image.jpg"
    model = classifier(config_file)
    weights.write(model, path)
    photograph(50, 60).save(image)
    program = f"""
import sys
import bandsplit
assert "torch" not in sys.modules  # `import bandsplit` alone is light
model = bandsplit.load({str(path)!r})
print([(guess.name, guess.confidence) for guess in model.predict({str(image)!r}).top])
left_out = {{"nvidia.dali", "pydantic", "tomli", "tomli_w", "loguru", "pandas", "pyarrow", "scipy"}}
print(sorted(left_out & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    guesses, left_out = done.stdout.splitlines()
    assert_same(guesses, model, image)
    assert left_out == "[]"


def assert_same(printed: str, model: Classifier, image: Path) -> None:
    """Names and confidences that another process has printed."""
    guesses = ast.literal_eval(printed)
    assert guesses == [(guess.name, pytest.approx(guess.confidence, rel=1e-5)) for guess in model.predict(image).top]


@pytest.mark.slow
def test_four_packages_suffice(config_file: Path, tmp_path: Path) -> None:
    """An environment with torch, torchvision, einops, safetensors and what these need themselves."""
    from importlib import metadata

    from packaging.requirements import Requirement

    site = tmp_path / "site"
    site.mkdir()
    wanted, seen = ["torch", "torchvision", "einops", "safetensors"], set[str]()
    while wanted:
        name = wanted.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        distribution = metadata.distribution(name)
        needs = [Requirement(text) for text in distribution.requires or []]
        wanted += [each.name for each in needs if each.marker is None or each.marker.evaluate({"extra": ""})]
        for top in {Path(str(file)).parts[0] for file in distribution.files or []} - {".."}:
            link(Path(str(distribution.locate_file(top))), site / top)
    (site / "bandsplit").symlink_to(Path(bandsplit.__file__).parent)
    assert not {"pydantic", "nvidia-dali-cuda120", "pandas", "pyarrow", "loguru", "tomli", "scipy", "tqdm"} & seen
    path, image = tmp_path / "model.safetensors", tmp_path / "image.jpg"
    model = classifier(config_file)
    weights.write(model, path)
    photograph(50, 60).save(image)
    program = f"""
import sys
sys.path.insert(0, {str(site)!r})
import bandsplit
print([(guess.name, guess.confidence) for guess in bandsplit.load({str(path)!r}).predict({str(image)!r}).top])
for name in ("pydantic", "nvidia.dali"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{{name}} is there")
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same(done.stdout, model, image)


def link(source: Path, place: Path) -> None:
    """Links a package into a folder; `nvidia` is one folder of many distributions, of which DALI is none of these."""
    if source.name == "nvidia":
        place.mkdir(exist_ok=True)
        for part in source.iterdir():
            if part.name != "dali" and not (place / part.name).exists():
                (place / part.name).symlink_to(part)
    elif source.exists() and not place.exists():
        place.symlink_to(source)


def test_the_folder_of_the_hub(config_file: Path, tmp_path: Path) -> None:
    """Without a network: saved and loaded as a folder, also with `load`, where huggingface_hub need not be there."""
    pytest.importorskip("huggingface_hub", reason="the extra `hub` is not installed")
    from bandsplit.inference.hub import HubClassifier

    plain = tmp_path / "model.safetensors"
    model = classifier(config_file)
    weights.write(model, plain)
    HubClassifier.load(plain).save_pretrained(tmp_path / "saved")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        for again in (HubClassifier.from_pretrained(tmp_path / "saved"), bandsplit.load(tmp_path / "saved")):
            torch.testing.assert_close(again(images), model(images), rtol=1e-5, atol=1e-6)
            assert again.description == model.description
