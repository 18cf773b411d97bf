"""The CUDA kernels, thread by thread on the CPU, against `transforms.split_images`. tests/gpu runs the real ones."""

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bandsplit.spectral import native, transforms
from tests.conftest import Shared

MEAN, STD = [123.675, 116.28, 103.53, 99.0], [58.395, 57.12, 57.375, 50.0]
Array = npt.NDArray[Any]


@pytest.fixture(scope="module")
def library(shared: Shared) -> ctypes.CDLL:
    compiler = native._find_cxx()
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = Path(__file__).parent / "tiles_on_cpu.cc"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-w", f"-I{native.HERE}"]

    def compile_to(built: Path) -> None:
        subprocess.run([*compiler, *flags, str(source), "-o", str(built)], check=True)

    return ctypes.CDLL(str(shared.once("tiles.so", compile_to)))


def pointer(array: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def colors(channels: int) -> tuple[Array, Array]:
    mean, std = np.float32(MEAN[:channels]), np.float32(STD[:channels])
    return 1 / std, -mean / std


def factors_of_dct2d(block: int) -> Array:
    """(2, block, block): with A[u, r] = T[(u, 0), (r, 0)] / sqrt(T[0, 0]), the matrix T is A x A."""
    matrix = transforms.transform_matrix("dct2d", block)
    one = matrix.reshape(block, block, block, block)[:, 0, :, 0] / np.sqrt(matrix[0, 0])
    return np.stack([one, one]).astype(np.float32)


def run_tiles(
    library: ctypes.CDLL, images: Array, block: int, kind: transforms.Kind, groups: Sequence[Sequence[int]],
    mirror: Array, channels_last: bool, dense: bool,
) -> list[Array] | None:  # fmt: skip
    samples, height, width = images.shape[0], images.shape[1] // block, images.shape[2] // block
    matrix = transforms.transform_matrix(kind, block).astype(np.float32)
    scale, shift = colors(3)
    factors = None if dense else factors_of_dct2d(block)
    shapes = [(height, width, 3 * len(g)) if channels_last else (3 * len(g), height, width) for g in groups]
    outputs = [np.full((samples, *shape), np.nan, np.float32) for shape in shapes]
    sizes, bands = np.int32([len(g) for g in groups]), np.int32([k for g in groups for k in g])
    done = library.split(
        pointer(images), samples, height, width, block, pointer(mirror), pointer(scale), pointer(shift),
        pointer(matrix), factors if factors is None else pointer(factors), len(groups), pointer(sizes), pointer(bands),
        int(channels_last), (ctypes.c_void_p * len(groups))(*[output.ctypes.data for output in outputs]),
    )  # fmt: skip
    assert done != -1, "wrote past its shared memory"
    return outputs if done else None


def expected(
    images: Array, block: int, kind: transforms.Kind, groups: Sequence[Sequence[int]], mirror: Array
) -> list[Array]:
    channels = images.shape[3]
    bands = transforms.split_images(
        torch.from_numpy(images), transforms.transform_matrix(kind, block), block, MEAN[:channels], STD[:channels],
        torch.from_numpy(mirror.astype(np.int32)), groups,
    )  # fmt: skip
    return [band.numpy() for band in bands]  # (samples, 3·bands, h, w)


def assert_same(outputs: Sequence[Array], wanted: Sequence[Array], channels_last: bool) -> None:
    for output, want in zip(outputs, wanted, strict=True):
        got = output.transpose(0, 3, 1, 2) if channels_last else output
        np.testing.assert_allclose(got, want, atol=1e-5 * np.ptp(want))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_tiles_of_any_images(library: ctypes.CDLL, data: st.DataObject) -> None:
    block = data.draw(st.sampled_from([1, 2, 4, 6, 8]), "block")
    dense = data.draw(st.booleans(), "dense")
    kind: transforms.Kind = data.draw(st.sampled_from(["dct2d", "dct1d"])) if dense else "dct2d"
    samples, height = data.draw(st.integers(1, 3), "samples"), data.draw(st.integers(1, 9), "height")
    width = data.draw(st.integers(1, 40), "width")
    wanted = data.draw(st.lists(st.integers(0, block * block - 1), min_size=1, unique=True), "bands")
    cuts = sorted(data.draw(st.sets(st.integers(1, len(wanted) - 1), max_size=5), "cuts")) if len(wanted) > 1 else []
    groups = [wanted[a:b] for a, b in zip([0, *cuts], [*cuts, len(wanted)], strict=True)]
    channels_last = data.draw(st.booleans(), "channels_last")
    rng = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    images = rng.integers(0, 256, (samples, height * block, width * block, 3), dtype=np.uint8)
    mirror = rng.integers(0, 2, samples, dtype=np.uint8)
    outputs = run_tiles(library, images, block, kind, groups, mirror, channels_last, dense)
    assert outputs is not None
    assert_same(outputs, expected(images, block, kind, groups, mirror), channels_last)


@pytest.mark.parametrize(("block", "side"), [(2, 224), (4, 224), (6, 336)])
@pytest.mark.parametrize("one_output", [False, True])
def test_tiles_of_the_published_splits(library: ctypes.CDLL, block: int, side: int, one_output: bool) -> None:
    bands = list(range(block * block))
    groups = [bands] if one_output else [[band] for band in bands]
    images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    mirror = np.array([0, 1], np.uint8)
    outputs = run_tiles(library, images, block, "dct2d", groups, mirror, channels_last=True, dense=False)
    assert outputs is not None
    assert_same(outputs, expected(images, block, "dct2d", groups, mirror), channels_last=True)


def test_a_row_that_does_not_fit_into_shared_memory_is_refused(library: ctypes.CDLL) -> None:
    images = np.zeros((1, 6, 1200, 3), np.uint8)
    assert run_tiles(library, images, 6, "dct2d", [range(36)], np.zeros(1, np.uint8), True, True) is None


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("block", [1, 2, 3, 5])
def test_any_block_colors_and_bands(library: ctypes.CDLL, block: int, channels: int, channels_last: bool) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 2 * block, 5 * block, channels), dtype=np.uint8)
    matrix, mirror = transforms.transform_matrix("dct1d", block).astype(np.float32), np.array([1, 0, 1], np.uint8)
    group = np.int32([block * block - 1, 0, 0])  # twice the same band too
    scale, shift = colors(channels)
    output = np.full((3, 2, 5, 3 * channels) if channels_last else (3, 3 * channels, 2, 5), np.nan, np.float32)
    library.split_any(
        pointer(images), 3, 2, 5, block, channels, pointer(mirror), pointer(scale), pointer(shift), pointer(matrix),
        len(group), pointer(group), int(channels_last), pointer(output),
    )  # fmt: skip
    assert_same([output], expected(images, block, "dct1d", [group.tolist()], mirror), channels_last)
