"""The DALI operator in real pipelines, against `transforms.split_images` and scipy; its build and its errors."""

import io
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.fft
import scipy.linalg
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from bandsplit.spectral import native, transforms
from tests.conftest import REPOSITORY

PHOTOGRAPHS = REPOSITORY.parent / "shared" / "data" / "imagenette224.tar"

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
BLOCKS = [1, 2, 4, 6]
KINDS = ["dct2d", "dct1d", "hadamard", "identity"]
ALL = [(kind, block) for kind in KINDS for block in BLOCKS if (kind, block) != ("hadamard", 6)]
SIZES = [(24, 36), (12, 12), (48, 12), (36, 60), (12, 132)]  # divided by 4 and by 6; wide enough for odd vector ends

compiles = pytest.mark.xdist_group("compilation")  # complete builds, one after the other

Groups = Sequence[Sequence[int]] | None
ImageSpec = npt.NDArray[np.uint8]


@pytest.fixture(scope="module", autouse=True)
def operator() -> None:
    native.load()


def images_of(sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[ImageSpec]:
    """Images like decoded JPEGs: smooth shades and edges with a little noise, over the full range 0..255."""
    rng = np.random.default_rng(seed)
    images = []
    for height, width in sizes:
        y, x = np.mgrid[:height, :width] / 12
        waves = [np.sin(a * x + b * y + c) for a, b, c in rng.uniform(0, 3, (3, 3))]
        edges = (x > rng.uniform(0, width / 12))[..., None] * rng.uniform(-80, 80, 3)
        noise = rng.normal(0, 4, (height, width, 3))
        images.append(np.clip(128 + 110 * np.stack(waves, -1) + edges + noise, 0, 255).astype(np.uint8))
    return images


def run_operator(
    images: Sequence[npt.NDArray[Any]],
    matrix: npt.NDArray[np.float64],
    block: int,
    groups: Groups = None,
    mirror: Sequence[int] | int | None = None,
    threads: int = 2,
    layout: str | None = "HWC",
    **arguments: Any,
) -> list[list[npt.NDArray[Any]]]:
    """The outputs of one run of a CPU pipeline: [group][sample]. `mirror`: one value for all samples, or one each."""
    arguments = {"mean": MEAN, "std": STD} | arguments
    if groups is not None:
        arguments["groups"] = [band for group in groups for band in group]
        arguments["group_sizes"] = [len(group) for group in groups]

    @pipeline_def(batch_size=len(images), num_threads=threads, device_id=None)
    def pipeline() -> Any:
        source = fn.external_source(lambda: [np.ascontiguousarray(image) for image in images], layout=layout)
        if isinstance(mirror, int):
            arguments["mirror"] = mirror
        elif mirror is not None:
            arguments["mirror"] = fn.external_source(lambda: [np.int32(flip) for flip in mirror])
        outputs = fn.spectral_split(source, block=block, matrix=matrix.ravel().tolist(), **arguments)
        return tuple(outputs) if isinstance(outputs, list) else outputs

    built = pipeline()
    built.build()
    return [[np.array(output[i]) for i in range(len(images))] for output in built.run()]


def reference(
    images: Sequence[ImageSpec],
    matrix: npt.NDArray[np.float64],
    block: int,
    groups: Groups = None,
    mirror: Sequence[int] | int | None = None,
    output_layout: str = "HWC",
) -> list[list[npt.NDArray[np.float64]]]:
    """The same with `split_images` in float64, one image at a time since their sizes differ."""
    flips = mirror if isinstance(mirror, Sequence) else [mirror or 0] * len(images)
    samples = [
        transforms.split_images(
            torch.from_numpy(image)[None], matrix, block, MEAN, STD, torch.tensor([flip]), groups, torch.float64
        )
        for image, flip in zip(images, flips, strict=True)
    ]
    axes = (1, 2, 0) if output_layout == "HWC" else (0, 1, 2)
    return [[branch[0].permute(axes).numpy() for branch in group] for group in zip(*samples, strict=True)]


def assert_equal_bands(got: Sequence[Sequence[Any]], expected: Sequence[Sequence[Any]]) -> None:
    """float32: within 1e-4 of the range of the values; float16: within that plus the rounding to 11 bits."""
    assert len(got) == len(expected)
    span = max(np.ptp(sample) for group in expected for sample in group)
    for outputs, wanted in zip(got, expected, strict=True):
        for output, want in zip(outputs, wanted, strict=True):
            assert output.shape == want.shape
            rounding = 2**-11 if output.dtype == np.float16 else 0
            np.testing.assert_allclose(output.astype(np.float64), want, atol=1e-4 * span, rtol=rounding)


@pytest.mark.parametrize("output_layout", ["HWC", "CHW"])
@pytest.mark.parametrize("dtype", [types.FLOAT, types.FLOAT16], ids=["float32", "float16"])
@pytest.mark.parametrize(("kind", "block"), ALL)
def test_every_transform_type_and_layout(kind: transforms.Kind, block: int, dtype: Any, output_layout: str) -> None:
    """With different image sizes, an odd batch size, and flips for some samples only."""
    images, mirror = images_of(SIZES), [0, 1, 0, 1, 1]
    matrix = transforms.transform_matrix(kind, block)
    got = run_operator(images, matrix, block, mirror=mirror, dtype=dtype, output_layout=output_layout)
    assert {sample.dtype for group in got for sample in group} == {np.dtype("f4" if dtype == types.FLOAT else "f2")}
    assert_equal_bands(got, reference(images, matrix, block, mirror=mirror, output_layout=output_layout))


@pytest.mark.parametrize("block", BLOCKS)
def test_unnormalized_dct1d_of_the_method(block: int) -> None:
    images, matrix = images_of(SIZES), transforms.transform_matrix("dct1d", block, "none")
    assert_equal_bands(run_operator(images, matrix, block), reference(images, matrix, block))


def scipy_coefficients(kind: str, squares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(..., s, s) -> (..., s²), orthonormal, without this project's matrices."""
    block = squares.shape[-1]
    flat = (*squares.shape[:-2], block * block)
    if kind == "dct2d":
        return np.asarray(scipy.fft.dctn(squares, axes=(-2, -1), norm="ortho")).reshape(flat)
    if kind == "dct1d":
        return np.asarray(scipy.fft.dct(squares.reshape(flat), norm="ortho"))
    if kind == "hadamard":
        walsh = np.array(sorted(scipy.linalg.hadamard(block), key=lambda row: np.count_nonzero(np.diff(row))))
        return (walsh @ squares @ walsh.T / block).reshape(flat)
    return squares.reshape(flat)


@pytest.mark.parametrize(("kind", "block"), ALL)
def test_bands_are_scipys_coefficients_of_the_normalized_pixels(kind: transforms.Kind, block: int) -> None:
    images = images_of(SIZES, seed=1)
    got = run_operator(images, transforms.transform_matrix(kind, block), block)
    for sample, image in enumerate(images):
        height, width = (side // block for side in image.shape[:2])
        normalized = (image.astype(np.float64) - MEAN) / STD
        squares = normalized.reshape(height, block, width, block, 3).transpose(0, 2, 4, 1, 3)
        expected = scipy_coefficients(kind, squares)
        bands = np.stack([got[band][sample] for band in range(block * block)], axis=-1)
        np.testing.assert_allclose(bands, expected, atol=1e-4 * np.ptp(expected))


@pytest.mark.parametrize("output_layout", ["HWC", "CHW"])
@pytest.mark.parametrize("dtype", [types.FLOAT, types.FLOAT16], ids=["float32", "float16"])
@pytest.mark.parametrize(
    "groups",
    [[[0], [0, 1], [0, 2, 3]], [[3, 1]], [[2], [2], [2]], [[1, 1]], "all of 2", "all of 4", "all of 6", "odd of 6"],
    ids=str,
)
def test_groups_lie_side_by_side(groups: Any, dtype: Any, output_layout: str) -> None:
    """Overlapping, repeated, out of order, all bands; for 6 x 6, a number of bands that fills no vector evenly."""
    block = int(groups[-1]) if isinstance(groups, str) else 2
    if isinstance(groups, str):
        bands = list(range(block * block))
        groups = [bands] if groups.startswith("all") else [bands[1::7], [35], bands[30:3:-4]]
    images, mirror = images_of(SIZES[:3]), [1, 0, 1]
    matrix = transforms.transform_matrix("dct2d", block)
    got = run_operator(images, matrix, block, groups, mirror, dtype=dtype, output_layout=output_layout)
    assert_equal_bands(got, reference(images, matrix, block, groups, mirror, output_layout))


@pytest.mark.parametrize("mirror", [0, 1])
def test_one_mirror_for_all(mirror: int) -> None:
    images, matrix = images_of(SIZES), transforms.transform_matrix("dct2d", 4)
    assert_equal_bands(run_operator(images, matrix, 4, mirror=mirror), reference(images, matrix, 4, mirror=mirror))


@pytest.mark.parametrize("batch", [1, 3, 7, 13])
def test_threads_do_not_change_a_bit(batch: int) -> None:
    images, matrix = images_of([SIZES[i % len(SIZES)] for i in range(batch)]), transforms.transform_matrix("dct2d", 6)
    mirror = [i % 2 for i in range(batch)]
    one, two, five = (run_operator(images, matrix, 6, mirror=mirror, threads=threads) for threads in (1, 2, 5))
    assert_equal_bands(one, reference(images, matrix, 6, mirror=mirror))
    for group in zip(one, two, five, strict=True):
        for a, b, c in zip(*group, strict=True):
            assert np.array_equal(a, b)
            assert np.array_equal(a, c)


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("output_layout", ["HWC", "CHW"])
@pytest.mark.parametrize("groups", [None, [[0, 3], [1]]], ids=str)
def test_any_number_of_color_channels(channels: int, output_layout: str, groups: Groups) -> None:
    image = np.random.default_rng(2).integers(0, 256, (6, 10, channels), dtype=np.uint8)
    mean, std = [100.0, 110.0, 120.0, 130.0][:channels], [50.0, 60.0, 70.0, 80.0][:channels]
    matrix = transforms.transform_matrix("dct2d", 2)
    got = run_operator([image], matrix, 2, groups, 1, mean=mean, std=std, output_layout=output_layout)
    tensor, flip = torch.from_numpy(image)[None], torch.tensor([1])
    expected = transforms.split_images(tensor, matrix, 2, mean, std, flip, groups, torch.float64)
    axes = (1, 2, 0) if output_layout == "HWC" else (0, 1, 2)
    assert_equal_bands(got, [[branch[0].permute(axes).numpy()] for branch in expected])


def test_block_1_is_dalis_crop_mirror_normalize() -> None:
    """The RGB classifier uses the same operator, so DALI's own operator is an independent reference."""
    images = images_of([(20, 31)] * 4)

    @pipeline_def(batch_size=4, num_threads=2, device_id=None)
    def pipeline() -> Any:
        source = fn.external_source(lambda: images, layout="HWC")
        mirror = fn.external_source(lambda: [np.int32(flip) for flip in (0, 1, 1, 0)])
        common = {"mean": MEAN, "std": STD, "mirror": mirror, "output_layout": "CHW"}
        ours = fn.spectral_split(source, block=1, matrix=[1.0], **common)
        return ours, fn.crop_mirror_normalize(source, dtype=types.FLOAT, **common)

    built = pipeline()
    built.build()
    ours, theirs = built.run()
    np.testing.assert_allclose(ours.as_array(), theirs.as_array(), atol=1e-5)


@pytest.mark.parametrize("groups", [[[0], [0, 1], [0, 2, 3]], [[0], [1], [2], [3]]], ids=str)
def test_torch_receives_channels_last_without_a_copy(groups: list[list[int]]) -> None:
    images, matrix = images_of([(16, 24)] * 3), transforms.transform_matrix("dct2d", 2)

    @pipeline_def(batch_size=3, num_threads=2, device_id=None)
    def pipeline() -> Any:
        source = fn.external_source(lambda: images, layout="HWC")
        flat, sizes = [band for group in groups for band in group], [len(group) for group in groups]
        arguments = {"mean": MEAN, "std": STD, "groups": flat, "group_sizes": sizes, "dtype": types.FLOAT16}
        return tuple(fn.spectral_split(source, block=2, matrix=matrix.ravel().tolist(), **arguments))

    built = pipeline()
    built.build()
    outputs = [output.as_tensor() for output in built.run()]
    branches = [torch.from_dlpack(output).permute(0, 3, 1, 2) for output in outputs]
    for output, branch in zip(outputs, branches, strict=True):
        assert branch.is_contiguous(memory_format=torch.channels_last)
        assert branch.data_ptr() == output.data_ptr()
    batch = torch.from_numpy(np.stack(images))
    expected = transforms.split_images(batch, matrix, 2, MEAN, STD, groups=groups, dtype=torch.float16)
    for branch, want in zip(branches, expected, strict=True):
        assert branch.stride() == want.stride()
        torch.testing.assert_close(branch, want, atol=1e-3, rtol=1e-3)


def test_a_pipeline_resumes_from_its_checkpoint() -> None:
    @pipeline_def(batch_size=2, num_threads=2, device_id=None, enable_checkpointing=True, seed=5)
    def pipeline() -> Any:
        noise = fn.random.uniform(range=[0, 255], shape=[8, 12, 3], dtype=types.UINT8)
        matrix = transforms.transform_matrix("dct2d", 4).ravel().tolist()
        images, mirror = fn.reshape(noise, layout="HWC"), fn.random.coin_flip(dtype=types.INT32)
        return tuple(fn.spectral_split(images, block=4, matrix=matrix, mean=MEAN, std=STD, mirror=mirror))

    uninterrupted = pipeline()
    uninterrupted.build()
    uninterrupted.run()
    resumed = pipeline(checkpoint=uninterrupted.checkpoint())
    resumed.build()
    for _ in range(2):
        for a, b in zip(uninterrupted.run(), resumed.run(), strict=True):
            np.testing.assert_array_equal(a.as_array(), b.as_array())


@pytest.mark.parametrize("flags", [[True] * 3, [False] * 3, [True, False, True]], ids=str)
def test_an_empty_batch_passes(flags: list[bool]) -> None:
    """If a DALI conditional sends all samples into one branch, the operator in the other gets an empty batch."""
    images, matrix = images_of([(8, 12)] * 3), transforms.transform_matrix("dct2d", 2)
    arguments = {"block": 2, "matrix": matrix.ravel().tolist(), "mean": MEAN, "std": STD}
    every = {"groups": [0, 1, 2, 3], "group_sizes": [4]}

    @pipeline_def(batch_size=3, num_threads=2, device_id=None, enable_conditionals=True)
    def pipeline() -> Any:
        source = fn.external_source(lambda: images, layout="HWC")
        flip = fn.external_source(lambda: [np.array(flag) for flag in flags])
        if flip:
            bands = fn.spectral_split(source, mirror=1, **arguments, **every)
        else:
            bands = fn.spectral_split(source, mirror=0, **arguments, **every)
        return bands

    built = pipeline()
    built.build()
    (output,) = built.run()
    expected = reference(images, matrix, 2, [[0, 1, 2, 3]], [int(flag) for flag in flags])
    assert_equal_bands([[np.array(output[i]) for i in range(3)]], expected)


@pytest.mark.skipif(not PHOTOGRAPHS.exists(), reason=f"needs the photographs of {PHOTOGRAPHS}")
@pytest.mark.parametrize(("kind", "block"), [("dct2d", 2), ("dct1d", 4), ("hadamard", 4), ("dct2d", 6)])
def test_photographs(kind: transforms.Kind, block: int) -> None:
    images: list[ImageSpec] = []
    with tarfile.open(PHOTOGRAPHS) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".JPEG"):
                jpeg = archive.extractfile(member)
                assert jpeg is not None
                side = 224 // block * block
                images.append(np.array(Image.open(io.BytesIO(jpeg.read())).convert("RGB"))[:side, :side])
            if len(images) == 8:
                break
    matrix, mirror = transforms.transform_matrix(kind, block), [0, 1] * 4
    groups = [[0], [0, 1], list(range(block * block))]
    for dtype in (types.FLOAT, types.FLOAT16):
        got = run_operator(images, matrix, block, groups, mirror, dtype=dtype)
        assert_equal_bands(got, reference(images, matrix, block, groups, mirror))


@pytest.mark.long
@compiles
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_random_calls_with_sanitizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build with AddressSanitizer and UBSan, with random shapes, blocks, bands, batches and threads."""
    monkeypatch.setenv("BANDSPLIT_CACHE", str(tmp_path))
    # DALI's headers bind references to the first entry of empty vectors: not null
    sanitizers = "-fsanitize=address,undefined -fno-sanitize=null -fno-sanitize-recover=all"
    monkeypatch.setenv("CXX", f"g++ {sanitizers} -g")
    monkeypatch.setattr(native, "CXX_FLAGS", ["-O1" if flag == "-O3" else flag for flag in native.CXX_FLAGS])
    plugin = native.build(cuda=False)
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], stdout=subprocess.PIPE, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    # Python and DALI never free some of what they allocate
    env = environment(LD_PRELOAD=":".join(runtimes), ASAN_OPTIONS="detect_leaks=0", UBSAN_OPTIONS="print_stacktrace=1")
    script = REPOSITORY / "tests/spectral/random_splits.py"
    output, errors = python(str(script), str(plugin), "120", env=env).communicate()
    assert output.endswith("all equal\n"), output[-500:] + errors[-3000:]


IDENTITY = np.eye(4)
PICTURE = np.zeros((4, 6, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "arguments", "message"),
    [
        ([PICTURE.astype(np.float32)], {}, "the images are float: must be uint8"),
        ([PICTURE[..., 0]], {"layout": None}, "number of dimensions 2 does not match any of the allowed"),
        ([PICTURE], {"layout": "CHW"}, 'layout "CHW" does not match any of the allowed'),
        ([PICTURE, PICTURE[..., :2]], {}, "sample 1 of shape 4 x 6 x 2 has 2 channels: mean and std have 3 entries"),
        ([PICTURE, PICTURE[:, :5]], {}, "sample 1 of shape 4 x 5 x 3: block = 2 does not divide its height and width"),
        ([PICTURE], {"matrix": np.eye(9)}, "matrix has 81 entries: block = 2 needs 4 x 4 = 16"),
        ([PICTURE], {"mean": [0.0]}, "mean has 1 and std 3 entries: both need one per color channel"),
        ([PICTURE], {"std": [1.0, 0.0, 1.0]}, "std[1] = 0: must be positive"),
        ([PICTURE], {"groups": [[0], [1, 4]]}, "groups[2] = 4: the bands of block = 2 are 0 to 3"),
        ([PICTURE], {"groups": [[0], [-1]]}, "groups[1] = -1: the bands of block = 2 are 0 to 3"),
        ([PICTURE], {"groups": [[0], []]}, "group_sizes[1] = 0: a group has at least one band"),
        ([PICTURE], {"group_sizes": [2]}, "group_sizes sum to 2, but groups names 0 bands"),
        ([PICTURE], {"block": 0}, "block = 0: allowed are 1 to 32"),
        ([PICTURE], {"block": 33}, "block = 33: allowed are 1 to 32"),
        ([PICTURE], {"dtype": types.UINT8}, "dtype = uint8: allowed are FLOAT and FLOAT16"),
        ([PICTURE], {"output_layout": "NHWC"}, 'output_layout = "NHWC": allowed are "HWC" and "CHW"'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_name_the_argument(images: Any, arguments: dict[str, Any], message: str) -> None:
    arguments = {"matrix": IDENTITY, "block": 2} | arguments
    with pytest.raises((RuntimeError, ValueError)) as error:
        run_operator(images, **arguments)
    assert message in str(error.value)
    assert "spectral_split" in str(error.value)


# The build -----------------------------------------------------------------------------------------------------------

CHECK = """
import sys
import numpy as np, torch
from nvidia.dali import fn, pipeline_def, plugin_manager
from bandsplit.spectral import native
from bandsplit.spectral import transforms
if len(sys.argv) > 1:
    plugin_manager.load_library(sys.argv[1])
else:
    native.load()
matrix = transforms.transform_matrix("dct2d", 4)
image = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
@pipeline_def(batch_size=1, num_threads=1, device_id=None)
def pipeline():
    source = fn.external_source(lambda: [image], layout="HWC")
    arguments = {"mean": [99.0] * 3, "std": [44.0] * 3, "groups": list(range(16)), "group_sizes": [16]}
    return fn.spectral_split(source, block=4, matrix=matrix.ravel().tolist(), **arguments)
built = pipeline()
built.build()
(got,) = built.run()
batch = torch.from_numpy(image)[None]
(expected,) = transforms.split_images(batch, matrix, 4, [99.0] * 3, [44.0] * 3, groups=[range(16)])
np.testing.assert_allclose(got.as_array(), expected.permute(0, 2, 3, 1).numpy(), atol=1e-4)
print("equal")
"""


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "CXX"}
    return kept | {"PYTHONPATH": str(REPOSITORY / "src")} | changes


def python(*arguments: str, env: dict[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def write_compiler(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


KEEPING = """
echo "$*" >> "$0.log"
case " $* " in *" -c "*) ;; *) exec {cxx} "$@" ;; esac
for target; do :; done
kept={objects}/${{target##*/}}
[ -f "$kept" ] || {cxx} "$@" -o "$kept" || exit
cp "$kept" "$target"
"""


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("objects")


@pytest.fixture
def cxx(objects: Path, tmp_path: Path) -> str:
    """The compiler, which logs its commands to a file beside it and compiles a source once in all tests."""
    compiler = native._find_cxx()
    if compiler is None:
        pytest.skip("no C++ compiler")
    return write_compiler(tmp_path / "cxx", KEEPING.format(cxx=" ".join(compiler), objects=objects))


@pytest.mark.slow
@compiles
def test_two_processes_build_one_plugin_that_a_third_without_a_compiler_loads(cxx: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    env = environment(BANDSPLIT_CACHE=str(cache), CXX=cxx)
    builders = [python("-m", "bandsplit.spectral.native", "--no-cuda", env=env) for _ in range(2)]
    answers = [(*builder.communicate(), builder.returncode) for builder in builders]
    assert [code for _, _, code in answers] == [0, 0], answers
    (plugin,) = cache.glob("*.so")
    assert {output.strip() for output, _, _ in answers} == {str(plugin)}
    assert sum(" -c " in command for command in Path(f"{cxx}.log").read_text().splitlines()) == len(native.CPU_SOURCES)
    assert not list(cache.glob("building-*"))

    (tmp_path / "empty").mkdir()
    third = python("-c", CHECK, env=environment(BANDSPLIT_CACHE=str(cache), PATH=str(tmp_path / "empty")))
    output, errors = third.communicate()
    assert output.strip() == "equal", errors


@pytest.fixture(scope="module")
def built() -> Path:
    """A plugin in the usual cache, which a test may copy."""
    return native.build(cuda=False)


@pytest.mark.parametrize("size", [0, 100_000])
def test_a_plugin_that_was_cut_off_is_not_loaded(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """After a node failure, a full quota or a broken copy; loading it would end the process with a bus error."""
    copy = tmp_path / built.name
    shutil.copyfile(built, copy)
    monkeypatch.setenv("BANDSPLIT_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert native.build(cuda=False) == copy
    os.truncate(copy, size)
    with pytest.raises(native.BuildError, match=r"needs a C\+\+ compiler"):
        native.build(cuda=False)


@pytest.mark.slow
@compiles
def test_a_plugin_that_was_cut_off_is_built_again(cxx: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANDSPLIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", cxx)
    whole = native.build(cuda=False)
    os.truncate(whole, 100_000)
    process = python("-c", CHECK, env=environment(CXX=cxx))
    output, errors = process.communicate()
    assert output.strip() == "equal", errors
    (plugin,) = whole.parent.glob("*.so")
    assert plugin.stem.endswith(f"-{native._digest(plugin)}")


def test_a_plugin_that_cannot_be_loaded_is_a_build_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system mounted noexec."""
    text = tmp_path / "text"
    text.write_text("no library")
    plugin = text.rename(tmp_path / f"{native._stem(cuda=False)}-0-{native._digest(text)}.so")
    monkeypatch.setenv("BANDSPLIT_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(native.BuildError, match=f"cannot load {plugin}: "):
        native._loaded.__wrapped__()


def test_a_missing_compiler_is_a_build_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANDSPLIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(native.BuildError, match="CXX = 'no-such-compiler' is not installed"):
        native.build(cuda=False)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(native.BuildError, match=r"needs a C\+\+ compiler .*python -m bandsplit.spectral.native"):
        native.build(cuda=False)


def test_a_failed_build_ends_with_the_compilers_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = 'case "$*" in *--version*) echo refusing 1.0;; *) echo "fatal error: no such luck"; exit 3;; esac'
    monkeypatch.setenv("CXX", write_compiler(tmp_path / "refusing-cxx", refusing))
    monkeypatch.setenv("BANDSPLIT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(native.BuildError, match=r"exit code 3\):\n.*spectral_split.cc.*\nfatal error: no such luck"):
        native.build(cuda=False)
    assert not list((tmp_path / "cache").glob("*.so"))
    assert not list((tmp_path / "cache").glob("building-*"))


def test_a_cache_that_cannot_be_written_is_a_build_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BANDSPLIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        native.BuildError, match="cannot write to the cache .*: set BANDSPLIT_CACHE to a writable folder"
    ):
        native.build(cuda=False)


def test_the_command_prints_a_build_error_and_ends_with_2(tmp_path: Path) -> None:
    env = environment(BANDSPLIT_CACHE=str(tmp_path), CXX="no-such-compiler")
    command = python("-m", "bandsplit.spectral.native", "--no-cuda", env=env)
    output, errors = command.communicate()
    assert command.returncode == 2
    assert output == ""
    assert errors.startswith("building spectral_split: CXX = 'no-such-compiler'")
    assert "Traceback" not in errors


def test_a_plugin_is_kept_for_one_kind_of_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a cache in a home folder that different kinds of nodes share."""
    monkeypatch.setattr(native, "_cpu_features", lambda: "avx2 fma")
    older = native._stem(cuda=False)
    monkeypatch.setattr(native, "_cpu_features", lambda: "avx2 avx512f fma")
    assert native._stem(cuda=False) != older


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("BANDSPLIT_CACHE", str(tmp_path / "own"))
    assert native._cache_folder() == tmp_path / "own"
    monkeypatch.delenv("BANDSPLIT_CACHE")
    assert native._cache_folder() == tmp_path / "xdg" / "bandsplit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert native._cache_folder() == tmp_path / ".cache" / "bandsplit"


def test_without_a_home_the_cache_lies_among_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with an unknown user."""
    for name in ("BANDSPLIT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"bandsplit-{os.getuid()}"
    assert native._cache_folder() == native._cache_folder() == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    refused = pytest.raises(native.BuildError, match=f"{folder} is not a folder that only this user can write to")
    folder.chmod(0o777)
    with refused:  # somebody else may have put a plugin there
        native.build(cuda=False)
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with refused:
        native.build(cuda=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(native.BuildError, match="cannot create a cache folder .*set BANDSPLIT_CACHE"):
        native.build(cuda=False)


def test_the_gpu_kernel_has_machine_code_for_the_gpus_of_torch(tmp_path: Path) -> None:
    """Also where nvcc is older than some of them, or newer."""
    assert {f"sm_{n}" for n in native.CAPABILITIES} >= set(torch.cuda.get_arch_list())
    nvcc = write_compiler(tmp_path / "nvcc", 'case "$*" in --list-gpu-code) echo sm_70; echo sm_75; echo sm_90;; esac')
    assert native._machine_code(nvcc) == [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (75, 90)]


@pytest.mark.slow
@compiles
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_nvcc_of_the_python_packages_builds_the_gpu_kernel_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a driver but no CUDA toolkit.  The CPU operator of that plugin needs no GPU.

    Uses the default cache, so that it compiles when the sources change, not in every test run.
    """
    if not any((folder / "bin" / "nvcc").exists() for folder in native._toolkits_of_wheels()):
        pytest.skip("the package nvidia-cuda-nvcc is not installed (pip install -e .[nvcc])")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    without = [folder for folder in os.environ["PATH"].split(":") if not Path(folder, "nvcc").exists()]
    monkeypatch.setenv("PATH", ":".join(without))
    nvcc = native._find_nvcc()
    assert nvcc is not None
    toolkit = Path(nvcc).parents[1]
    assert toolkit in native._toolkits_of_wheels()
    assert native._cuda_headers(nvcc) == toolkit.resolve() / "include"

    monkeypatch.setattr(native, "CAPABILITIES", (90,))  # all of them take twice as long
    plugin = native.build(cuda=True)
    assert "cuda" in plugin.name
    check = python("-c", CHECK, str(plugin), env=environment(CUDA_VISIBLE_DEVICES=""))
    output, errors = check.communicate()
    assert output.strip() == "equal", errors
