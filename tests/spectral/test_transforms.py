"""The reference against scipy, against a loop in float64, and against properties of any transform."""

from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch
from einops import rearrange
from torch import Tensor

from bandsplit.config import loading
from bandsplit.models import networks
from bandsplit.spectral import transforms
from bandsplit.spectral.view import View
from bandsplit.training import losses, optimizers

BLOCKS = [1, 2, 4, 6]
KINDS = ["dct2d", "dct1d", "hadamard", "identity", "random"]
ALL = [(kind, block) for kind in KINDS for block in BLOCKS if (kind, block) != ("hadamard", 6)]


@pytest.fixture
def images() -> Tensor:
    """(2, 3, 24, 36) float64, seeded; every block size of the tests divides both sides."""
    return torch.randn(2, 3, 24, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def blocks_of(images: Tensor, block: int) -> np.ndarray:
    """(h, w, s, s, B, C): every block of pixels, cut out by slicing."""
    height, width = images.shape[2:]
    cut = [
        [images[:, :, y : y + block, x : x + block].permute(2, 3, 0, 1).numpy() for x in range(0, width, block)]
        for y in range(0, height, block)
    ]
    return np.array(cut)


@pytest.mark.parametrize("norm", ["ortho", "none"])
@pytest.mark.parametrize("block", BLOCKS)
def test_dct2d_is_scipys_dctn_of_every_block(images: Tensor, block: int, norm: transforms.Norm) -> None:
    expected = scipy.fft.dctn(blocks_of(images, block), axes=(2, 3), norm="ortho" if norm == "ortho" else None)
    bands = transforms.split(images, transforms.transform_matrix("dct2d", block, norm), block)
    for u in range(block):
        for v in range(block):
            got = bands[u * block + v].permute(2, 3, 0, 1).numpy()
            np.testing.assert_allclose(got, expected[:, :, u, v], atol=1e-12)


@pytest.mark.parametrize("norm", ["ortho", "none"])
@pytest.mark.parametrize("block", BLOCKS)
def test_dct1d_is_scipys_dct_of_every_flattened_block(images: Tensor, block: int, norm: transforms.Norm) -> None:
    blocks = blocks_of(images, block)
    flat = blocks.reshape(*blocks.shape[:2], block * block, *blocks.shape[4:])
    expected = scipy.fft.dct(flat, axis=2, norm="ortho" if norm == "ortho" else None)
    bands = transforms.split(images, transforms.transform_matrix("dct1d", block, norm), block)
    np.testing.assert_allclose(bands.permute(3, 4, 0, 1, 2).numpy(), expected, atol=1e-11)


@pytest.mark.parametrize("block", BLOCKS)
def test_unnormalized_dct1d_is_the_formula_of_the_method(block: int) -> None:
    count = block * block
    matrix = transforms.transform_matrix("dct1d", block, "none")
    for k in range(count):
        for n in range(count):
            assert matrix[k, n] == pytest.approx(2 * np.cos(np.pi * k * (2 * n + 1) / (2 * count)), abs=1e-12)


@pytest.mark.parametrize("block", [1, 2, 4, 8])
def test_hadamard_has_scipys_rows_in_order_of_sign_changes(block: int) -> None:
    matrix = transforms.transform_matrix("hadamard", block, "none")
    assert {tuple(row) for row in matrix} == {tuple(row) for row in scipy.linalg.hadamard(block * block)}
    for k, row in enumerate(matrix.reshape(-1, block, block)):
        downwards, across = row[:, 0], row[0]
        changes = [np.count_nonzero(np.diff(line)) for line in (downwards, across)]
        assert changes == [k // block, k % block]  # band k of the Hadamard lies where band k of the DCT does
    np.testing.assert_allclose(transforms.transform_matrix("hadamard", block), matrix / block)


def test_hadamard_of_block_2_is_sylvesters_and_the_dcts() -> None:
    matrix = transforms.transform_matrix("hadamard", 2, "none")
    np.testing.assert_array_equal(matrix, scipy.linalg.hadamard(4))
    np.testing.assert_allclose(transforms.transform_matrix("hadamard", 2), transforms.transform_matrix("dct2d", 2))


@pytest.mark.parametrize("block", BLOCKS)
def test_identity_keeps_the_polyphase_components(images: Tensor, block: int) -> None:
    bands = transforms.split(images, transforms.transform_matrix("identity", block), block)
    for n in range(block * block):
        assert torch.equal(bands[n], images[:, :, n // block :: block, n % block :: block])


@pytest.mark.parametrize(("kind", "block"), ALL)
def test_orthonormal_transforms_keep_the_energy(images: Tensor, kind: transforms.Kind, block: int) -> None:
    matrix = transforms.transform_matrix(kind, block)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(block * block), atol=1e-12)
    bands = transforms.split(images, matrix, block)
    assert bands.square().sum().item() == pytest.approx(images.square().sum().item(), rel=1e-12)


@pytest.mark.parametrize("norm", ["ortho", "none"])
@pytest.mark.parametrize(("kind", "block"), ALL)
def test_merge_undoes_split(images: Tensor, kind: transforms.Kind, block: int, norm: transforms.Norm) -> None:
    matrix = transforms.transform_matrix(kind, block, norm)
    single = images.float()
    torch.testing.assert_close(
        transforms.merge(transforms.split(single, matrix, block), matrix, block), single, atol=1e-5, rtol=0
    )


def test_autocast_rounds_no_band(images: Tensor) -> None:
    matrix, single = transforms.transform_matrix("dct2d", 4), images.float()
    bands = transforms.split(single, matrix, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transforms.split(single, matrix, 4), bands)
        assert transforms.merge(bands, matrix, 4).dtype == torch.float32


@pytest.mark.parametrize(("kind", "block"), ALL)
def test_split_is_a_sum_over_the_pixels_of_a_block(kind: transforms.Kind, block: int) -> None:
    images = torch.randn(1, 2, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    matrix = transforms.transform_matrix(kind, block, "none")
    bands = transforms.split(images, torch.from_numpy(matrix), block)  # a tensor serves as well as an array
    for c in range(2):
        for i in range(12 // block):
            for j in range(12 // block):
                for k in range(block * block):
                    total = 0.0
                    for r in range(block):
                        for s in range(block):
                            total += matrix[k, r * block + s] * images[0, c, i * block + r, j * block + s].item()
                    assert bands[k, 0, c, i, j].item() == pytest.approx(total, abs=1e-11)


@pytest.mark.parametrize("kind", ["dct2d", "hadamard"])
@pytest.mark.parametrize("block", [2, 4])
def test_flip_commutes_with_a_known_sign(images: Tensor, kind: transforms.Kind, block: int) -> None:
    """A cosine of frequency v is even or odd about the middle of the block, so a flip only adds the sign (-1)^v."""
    matrix = transforms.transform_matrix(kind, block)
    flipped = transforms.split(images.flip(3), matrix, block)
    signs = torch.tensor([(-1.0) ** (k % block) for k in range(block * block)]).double().reshape(-1, 1, 1, 1, 1)
    torch.testing.assert_close(flipped, signs * transforms.split(images, matrix, block).flip(4))


def test_gradient_of_an_orthonormal_split_is_its_inverse(images: Tensor) -> None:
    matrix = transforms.transform_matrix("dct2d", 4)
    weights = torch.randn(16, 2, 3, 6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    images = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((transforms.split(images, matrix, 4) * weights).sum(), images)
    torch.testing.assert_close(gradient, transforms.merge(weights, matrix, 4))


def test_stack_lays_bands_side_by_side(images: Tensor) -> None:
    bands = transforms.split(images, transforms.transform_matrix("dct2d", 2), 2)
    groups = [[0], [0, 1], [3, 0, 2]]
    stacked = transforms.stack(bands, groups)
    assert [tuple(branch.shape) for branch in stacked] == [(2, 3 * len(group), 12, 18) for group in groups]
    for group, branch in zip(groups, stacked, strict=True):
        for i, band in enumerate(group):
            for color in range(3):
                assert torch.equal(branch[:, i * 3 + color], bands[band, :, color])


def test_split_images_is_the_chain_of_its_steps() -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (3, 12, 8, 3), dtype=torch.uint8, generator=generator)
    mean, std = [123.7, 116.3, 103.5], [58.4, 57.1, 57.4]
    matrix, groups = transforms.transform_matrix("dct2d", 4), [[0, 5], [15]]
    got = transforms.split_images(images, matrix, 4, mean, std, torch.tensor([0, 1, 0]), groups, torch.float64)
    for sample in range(3):
        pixels = images[sample].numpy().astype(np.float64)
        pixels = pixels[:, ::-1] if sample == 1 else pixels
        image = torch.from_numpy(((pixels - mean) / std).transpose(2, 0, 1).copy())[None]
        expected = transforms.stack(transforms.split(image, matrix, 4), groups)
        for branch, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(branch[sample], wanted[0])
    assert all(branch.is_contiguous(memory_format=torch.channels_last) for branch in got)


def test_split_images_in_each_type() -> None:
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    matrix = transforms.transform_matrix("dct2d", 2)
    double, single, half = (
        transforms.split_images(images, matrix, 2, [128] * 3, [64] * 3, dtype=dtype)
        for dtype in (torch.float64, torch.float32, torch.float16)
    )
    assert len(double) == 4  # without groups, each band is its own
    for exact, close, near in zip(double, single, half, strict=True):
        torch.testing.assert_close(close.double(), exact, atol=1e-5, rtol=0)
        assert torch.equal(near, close.half())


def test_errors_say_what_is_allowed(images: Tensor) -> None:
    matrix = transforms.transform_matrix("identity", 5)
    with pytest.raises(ValueError, match="block = 5 does not divide images of 24 x 36"):
        transforms.split(images, matrix, 5)
    with pytest.raises(ValueError, match=r"matrix of shape \(25, 25\): block = 4 needs \(16, 16\)"):
        transforms.split(images, matrix, 4)
    with pytest.raises(ValueError, match=r"matrix of shape \(25, 25\): block = 4 needs \(16, 16\)"):
        transforms.merge(images[None], matrix, 4)
    with pytest.raises(ValueError, match="1 bands given: block = 5 has 25"):
        transforms.merge(images[None], matrix, 5)
    with pytest.raises(ValueError, match="must be floating point"):
        transforms.split(images.to(torch.uint8), np.eye(4), 2)
    with pytest.raises(ValueError, match="group 1 names band 4: allowed are 0..3"):
        transforms.stack(torch.zeros(4, 1, 3, 2, 2), [[0], [1, 4]])
    with pytest.raises(ValueError, match="group 0 names band -1"):
        transforms.stack(torch.zeros(4, 1, 3, 2, 2), [[-1]])
    with pytest.raises(ValueError, match="group 1 has no band"):
        transforms.stack(torch.zeros(4, 1, 3, 2, 2), [[0], []])
    with pytest.raises(ValueError, match=r"must be uint8 \(B, H, W, C\)"):
        transforms.split_images(images, np.eye(4), 2, [0] * 3, [1] * 3)
    with pytest.raises(ValueError, match="mean has 1 and std 3 entries: images have 3"):
        transforms.split_images(torch.zeros(1, 4, 4, 3, dtype=torch.uint8), np.eye(4), 2, [0], [1] * 3)


@pytest.mark.parametrize("block", [3, 6, 7])
def test_hadamard_needs_a_power_of_2(block: int) -> None:
    with pytest.raises(ValueError, match=f"block = {block}: the hadamard transform needs a power of 2"):
        transforms.transform_matrix("hadamard", block)


def test_transform_matrix_names_what_is_wrong() -> None:
    with pytest.raises(
        ValueError, match="kind = 'dct': allowed are 'dct2d', 'dct1d', 'hadamard', 'identity' and 'random'"
    ):
        transforms.transform_matrix("dct", 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="norm = 'l2': allowed are 'ortho' and 'none'"):
        transforms.transform_matrix("dct2d", 2, "l2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block = 0: must be at least 1"):
        transforms.transform_matrix("dct2d", 0)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_only_the_scale_of_the_bands_tells_dct2d_from_pixels(config_file: Path, gamma: float) -> None:
    """Bands as channels, in float64: with first weights that are rotated by the matrix, both have the same losses.

    SGD with momentum and weight decay commutes with a rotation, so that they stay equal: by induction over the steps,
    the first weights of one are those of the other, rotated, and all others are equal.
    """
    scaled = [f"split.scale={gamma}", "split.sigma=[2.0, 0.5, 0.4, 0.2]", 'split.branches="all"']
    config = loading.load(config_file, [*scaled, "optim.weight_decay=0.01"])
    matrix, generator = View.of(config).matrix, torch.Generator().manual_seed(0)
    images = torch.randn(10, 8, 3, 16, 16, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 10, (10, 8), generator=generator)
    found = []
    for own in (np.eye(4), matrix):
        torch.manual_seed(0)
        network = networks.build(config.model, 12, 10, 8).double()
        first: torch.nn.Conv2d = network.conv1
        with torch.no_grad():  # x = M⁻¹ X, so that W x = (W M⁻¹) X
            weights = rearrange(first.weight, "o (n c) h w -> o n c h w", c=3)
            rotated = torch.einsum("nk,onchw->okchw", torch.from_numpy(np.linalg.inv(own)), weights)
            first.weight.copy_(rearrange(rotated, "o k c h w -> o (k c) h w"))
        optimizer = optimizers.optimizer(network, config)
        steps = []
        for x, y in zip(images, labels, strict=True):
            (bands,) = transforms.stack(transforms.split(x, own, 2), [[0, 1, 2, 3]])
            loss = losses.loss(network(bands), y, config.loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.append(float(loss.detach()))
        found.append(steps)
    if gamma:
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
        assert abs(found[0][9] - found[1][9]) > 1e-3
    else:
        np.testing.assert_allclose(found[0], found[1], rtol=1e-9)
        assert len(set(found[0])) == 10
