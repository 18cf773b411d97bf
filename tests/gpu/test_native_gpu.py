"""The GPU kernel of the operator against its CPU kernel, which tests/spectral compares with scipy and torch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from nvidia.dali import fn, pipeline_def, types

from bandsplit.spectral import native, transforms

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

MEAN, STD = [123.675, 116.28, 103.53, 99.0], [58.395, 57.12, 57.375, 50.0]
# 120: divided by 1..6 and 8; unequal, so that each image is a launch of its own
SIZES = [(120, 120), (240, 360), (120, 1200), (360, 120), (120, 240)]

Groups = Sequence[Sequence[int]] | None
Outputs = list[list[npt.NDArray[Any]]]


@pytest.fixture(scope="module", autouse=True)
def operator() -> None:
    if not native.has_gpu_kernel():
        pytest.skip("the plugin has no GPU kernel: no nvcc")


def images_of(sizes: Sequence[tuple[int, int]], channels: int = 3, seed: int = 0) -> list[npt.NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*size, channels), dtype=np.uint8) for size in sizes]


def both_backends(
    images: Sequence[npt.NDArray[np.uint8]],
    block: int,
    kind: transforms.Kind = "dct2d",
    groups: Groups = None,
    **arguments: Any,
) -> tuple[Outputs, Outputs]:
    """The outputs, [group][sample], of both operators in one pipeline; every second image is flipped."""
    channels = images[0].shape[2]
    arguments |= {"block": block, "matrix": transforms.transform_matrix(kind, block).ravel().tolist()}
    arguments |= {"mean": MEAN[:channels], "std": STD[:channels]}
    if groups is not None:
        arguments["groups"] = [band for group in groups for band in group]
        arguments["group_sizes"] = [len(group) for group in groups]

    @pipeline_def(batch_size=len(images), num_threads=2, device_id=0)
    def pipeline() -> Any:
        source = fn.external_source(lambda: images, layout="HWC")
        mirror = fn.external_source(lambda: [np.int32(i % 2) for i in range(len(images))])
        cpu = fn.spectral_split(source, mirror=mirror, **arguments)
        gpu = fn.spectral_split(source.gpu(), mirror=mirror, **arguments)
        return (*cpu, *gpu) if isinstance(cpu, list) else (cpu, gpu)

    built = pipeline()
    built.build()
    outputs = [[np.array(sample) for sample in output.as_cpu()] for output in built.run()]
    half = len(outputs) // 2
    return outputs[:half], outputs[half:]


def assert_same(cpu: Outputs, gpu: Outputs) -> None:
    """Within 1e-5 of the range, since the summation order differs. float16: within one unit in the last place."""
    assert len(cpu) == len(gpu)
    for expected, got in zip(cpu, gpu, strict=True):
        for want, have in zip(expected, got, strict=True):
            assert have.dtype == want.dtype
            rounding = 2**-10 if want.dtype == np.float16 else 0
            want, have = want.astype(np.float64), have.astype(np.float64)
            np.testing.assert_allclose(have, want, atol=1e-5 * np.ptp(want), rtol=rounding)


@pytest.mark.parametrize("output_layout", ["HWC", "CHW"])
@pytest.mark.parametrize("dtype", [types.FLOAT, types.FLOAT16], ids=["float32", "float16"])
@pytest.mark.parametrize("kind", ["dct2d", "dct1d", "hadamard", "identity"])
@pytest.mark.parametrize("block", [1, 2, 4, 6])
def test_every_transform_type_and_layout(block: int, kind: transforms.Kind, dtype: Any, output_layout: str) -> None:
    if kind == "hadamard" and block == 6:
        pytest.skip("6 is no power of 2")
    assert_same(*both_backends(images_of(SIZES), block, kind, dtype=dtype, output_layout=output_layout))


@pytest.mark.parametrize("output_layout", ["HWC", "CHW"])
@pytest.mark.parametrize("block", [3, 5, 8])
def test_block_sizes_without_a_specialized_kernel(block: int, output_layout: str) -> None:
    assert_same(*both_backends(images_of(SIZES[:3]), block, "dct1d", output_layout=output_layout))


@pytest.mark.parametrize("output_layout", ["HWC", "CHW"])
@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("block", [2, 3])
def test_any_number_of_color_channels(block: int, channels: int, output_layout: str) -> None:
    images = images_of(SIZES[:3], channels)
    assert_same(*both_backends(images, block, groups=[[0, 3], [1], [2, 3, 0]], output_layout=output_layout))


@pytest.mark.parametrize("output_layout", ["HWC", "CHW"])
@pytest.mark.parametrize("groups", [[[0], [0, 1], [0, 2, 3]], [[3, 1]], [[2], [2], [2]], [[1, 1]]], ids=str)
def test_groups_lie_side_by_side(groups: list[list[int]], output_layout: str) -> None:
    assert_same(*both_backends(images_of(SIZES), 2, groups=groups, output_layout=output_layout))


@pytest.mark.parametrize("block", [4, 6])
def test_all_bands_in_one_output_and_some_in_odd_order(block: int) -> None:
    bands = list(range(block * block))
    assert_same(*both_backends(images_of(SIZES), block, groups=[bands, bands[1::7], bands[:3:-4]]))


@pytest.mark.parametrize("dtype", [types.FLOAT, types.FLOAT16], ids=["float32", "float16"])
@pytest.mark.parametrize(("block", "side"), [(1, 224), (2, 224), (4, 224), (6, 228), (6, 336), (8, 224)])
def test_a_batch_of_equal_images_is_one_launch(block: int, side: int, dtype: Any) -> None:
    """As in training; at 228, the outputs of odd samples are not word-aligned."""
    assert_same(*both_backends(images_of([(side, side)] * 33), block, dtype=dtype))


def test_equal_images_between_others() -> None:
    sizes = [SIZES[i] for i in (0, 0, 0, 1, 1, 0, 2, 2, 2, 2)]
    assert_same(*both_backends(images_of(sizes), 4, groups=[[0], [1, 2], range(3, 16)]))


@pytest.mark.parametrize(("block", "size"), [(6, (12, 2400)), (32, (64, 64))], ids=str)
def test_images_that_shared_memory_does_not_hold(block: int, size: tuple[int, int]) -> None:
    bands = range(0, block * block, block)
    assert_same(*both_backends(images_of([size] * 3), block, groups=[list(bands)]))


@pytest.mark.parametrize("batch", [1, 7, 128])
def test_batches(batch: int) -> None:
    images = images_of([SIZES[i % 2] for i in range(batch)])
    assert_same(*both_backends(images, 4, groups=[range(16)], dtype=types.FLOAT16))


def test_many_batches_in_flight_keep_their_own_arguments() -> None:
    """The host runs ahead of the stream: what a kernel reads must outlive the call that launched it."""
    batches = [images_of([(240, 240)] * 32, seed=seed) for seed in range(4)]
    matrix, mean, std = transforms.transform_matrix("dct2d", 4), MEAN[:3], STD[:3]

    @pipeline_def(batch_size=32, num_threads=2, device_id=0, prefetch_queue_depth=4)
    def pipeline() -> Any:
        source = fn.external_source(lambda step: batches[step % 4], layout="HWC")
        arguments = {"groups": list(range(16)), "group_sizes": [16], "mean": mean, "std": std}
        return fn.spectral_split(source.gpu(), block=4, matrix=matrix.ravel().tolist(), **arguments)

    expected = [
        transforms.split_images(torch.from_numpy(np.stack(batch)), matrix, 4, mean, std, groups=[range(16)])[0]
        for batch in batches
    ]
    built = pipeline()
    built.build()
    for step in range(40):
        (output,) = built.run()
        got = torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)
        torch.testing.assert_close(got.cpu(), expected[step % 4], atol=1e-4, rtol=1e-4)


def test_torch_receives_channels_last_on_the_device_without_a_copy() -> None:
    images, matrix = images_of([(64, 96)] * 3), transforms.transform_matrix("dct2d", 2)

    @pipeline_def(batch_size=3, num_threads=2, device_id=0)
    def pipeline() -> Any:
        source = fn.external_source(lambda: images, layout="HWC").gpu()
        arguments = {"mean": MEAN[:3], "std": STD[:3], "groups": [0, 1, 2, 3], "group_sizes": [4]}
        return fn.spectral_split(source, block=2, matrix=matrix.ravel().tolist(), dtype=types.FLOAT16, **arguments)

    built = pipeline()
    built.build()
    (output,) = built.run()
    tensor = output.as_tensor()
    branch = torch.from_dlpack(tensor).permute(0, 3, 1, 2)
    assert branch.is_cuda
    assert branch.is_contiguous(memory_format=torch.channels_last)
    assert branch.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("flags", [[True] * 3, [False] * 3, [True, False, True]], ids=str)
def test_an_empty_batch_passes(flags: list[bool]) -> None:
    images, matrix = images_of([(8, 12)] * 3), transforms.transform_matrix("dct2d", 2)
    arguments = {"block": 2, "matrix": matrix.ravel().tolist(), "mean": MEAN[:3], "std": STD[:3]}
    every = {"groups": [0, 1, 2, 3], "group_sizes": [4]}

    @pipeline_def(batch_size=3, num_threads=2, device_id=0, enable_conditionals=True)
    def pipeline() -> Any:
        source = fn.external_source(lambda: images, layout="HWC").gpu()
        flip = fn.external_source(lambda: [np.array(flag) for flag in flags])
        if flip:
            bands = fn.spectral_split(source, mirror=1, **arguments, **every)
        else:
            bands = fn.spectral_split(source, mirror=0, **arguments, **every)
        return bands

    built = pipeline()
    built.build()
    (output,) = built.run()
    batch = torch.from_numpy(np.stack(images))
    (expected,) = transforms.split_images(batch, matrix, 2, MEAN[:3], STD[:3], torch.tensor(flags), [range(4)])
    got = torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2).cpu()
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
