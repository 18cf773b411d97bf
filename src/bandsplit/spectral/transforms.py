"""Transform matrices, and the spectral split in plain torch: the reference for the DALI operator.

An image is divided into blocks of s x s pixels. Pixel n = r * s + c of a block is at row r, column c (row-major). A
transform is an N x N matrix, N = s², that maps the N pixels of a block to N coefficients. Band k is the image of
H/s x W/s that holds coefficient k of every block.

Shapes: B images, C color channels, H x W pixels, N bands of h x w, with h = H/s and w = W/s.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor

Kind = Literal["dct2d", "dct1d", "hadamard", "identity", "random"]
Norm = Literal["ortho", "none"]
Matrix = npt.NDArray[np.floating] | Tensor


def transform_matrix(kind: Kind, block: int, norm: Norm = "ortho") -> npt.NDArray[np.float64]:
    """The transform of a block as a matrix: row k holds the weights of coefficient k, column n those of pixel n.

    | kind | row k | with norm "none" |
    |---|---|---|
    | dct2d | separable DCT-II, k = u * block + v: vertical frequency u, horizontal v | factor 2 per axis, as in scipy |
    | dct1d | DCT-II of the flattened block, as in the authors' code | X_k = 2 Σ x_n cos(πk(2n+1) / 2N) |
    | hadamard | separable Walsh-Hadamard, k = u * block + v: u vertical sign changes, v horizontal | entries ±1 |
    | identity | pixel k (polyphase components) | no difference |
    | random | of one random rotation or reflection for each block size: the control without structure | no difference |

    Hadamard rows are in sequency (Walsh) order, by the number of sign changes per axis, so that band k covers the same
    part of the spectrum as band k of dct2d. Up to order they are the rows of `scipy.linalg.hadamard(N)`, which uses
    Sylvester's order; at block 2 the two orders agree.

    Args:
        kind: the transform.
        block: side s of the pixel block, at least 1.
        norm: "ortho" makes the matrix orthonormal: it preserves energy, and its inverse is its transpose.

    Returns:
        (N, N) float64, N = block².

    Raises:
        ValueError: unknown kind or norm, block below 1, or hadamard with a block that is not a power of 2.

    Sources: DCT-II: Ahmed, Natarajan and Rao (1974), scaled as in `scipy.fft.dct`; sequency order: Walsh (1923);
    random: uniform over all orthonormal matrices, by QR with signs (Mezzadri, *How to Generate Random Matrices from
    the Classical Compact Groups*, 2007).
    """
    if block < 1:
        raise ValueError(f"block = {block}: must be at least 1")
    if norm not in ("ortho", "none"):
        raise ValueError(f"norm = {norm!r}: allowed are 'ortho' and 'none'")
    if kind == "dct2d":
        return _on_both_axes(_dct_matrix(block, norm))
    if kind == "dct1d":
        return _dct_matrix(block * block, norm)
    if kind == "hadamard":
        return _on_both_axes(_walsh_matrix(block, norm))
    if kind == "identity":
        return np.eye(block * block)
    if kind == "random":
        return _random_matrix(block * block)
    raise ValueError(f"kind = {kind!r}: allowed are 'dct2d', 'dct1d', 'hadamard', 'identity' and 'random'")


def flip_matrix(matrix: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """A horizontal flip in the domain of the bands: band k of the flipped image is Σ_j F[k, j] · flipped band j.

    F = M P M⁻¹, where P puts the pixels of each row of a block into reverse order.  For dct2d and hadamard it is
    diagonal, (-1)^v with v = k mod block; for identity it swaps bands; for dct1d most bands need several others.

    Args:
        matrix: M, (N, N), invertible.

    Returns:
        (N, N), in which entries that are zero but for rounding are exactly zero.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    block = math.isqrt(len(matrix))
    reverse = np.arange(len(matrix)).reshape(block, block)[:, ::-1].ravel()
    flip = np.linalg.solve(matrix.T, matrix[:, reverse].T).T
    return np.where(np.abs(flip) < 1e-9, 0.0, flip)


def _on_both_axes(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(s, s) -> (s², s²): entry (u * s + v, r * s + c) is matrix[u, r] * matrix[v, c]."""
    return np.asarray(np.kron(matrix, matrix), dtype=np.float64)


def _dct_matrix(length: int, norm: Norm) -> npt.NDArray[np.float64]:
    """DCT-II matrix (L, L), L = length: X_k = 2 Σ x_n cos(πk(2n+1) / 2L).

    "ortho" multiplies row 0 by √(1/4L) and all other rows by √(1/2L).
    """
    n = np.arange(length, dtype=np.float64)
    matrix = 2 * np.cos(np.pi / (2 * length) * np.outer(n, 2 * n + 1))
    if norm == "ortho":
        matrix *= np.sqrt(1 / (2 * length))
        matrix[0] *= np.sqrt(1 / 2)
    return matrix


def _random_matrix(length: int) -> npt.NDArray[np.float64]:
    """An orthonormal matrix (length, length), always the same for this length."""
    q, r = np.linalg.qr(np.random.default_rng(0).standard_normal((length, length)))
    return np.asarray(q * np.sign(np.diag(r)))


def _walsh_matrix(length: int, norm: Norm) -> npt.NDArray[np.float64]:
    """Hadamard matrix (length, length) whose row k has k sign changes; "ortho" divides it by √length."""
    if length & (length - 1):
        raise ValueError(f"block = {length}: the hadamard transform needs a power of 2 (1, 2, 4, 8, ...)")
    matrix = np.ones((1, 1))
    while len(matrix) < length:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    sign_changes = np.count_nonzero(np.diff(matrix, axis=1), axis=1)
    matrix = matrix[np.argsort(sign_changes)]
    return matrix / np.sqrt(length) if norm == "ortho" else matrix


def split(images: Tensor, matrix: Matrix, block: int) -> Tensor:
    """Splits images into bands: band k at block (i, j) is Σ_n matrix[k, n] x_n over the pixels n of that block.

    Differentiable with respect to `images`.

    Args:
        images: (B, C, H, W), floating point; H and W are multiples of `block`.
        matrix: (N, N), N = block², as returned by `transform_matrix`.
        block: side of the pixel block.

    Returns:
        (N, B, C, H/block, W/block), with the dtype and device of `images`.

    Raises:
        ValueError: H or W is not a multiple of `block`, `matrix` is not N x N, or `images` has an integer dtype.
    """
    _check_matrix(matrix, block)
    height, width = images.shape[-2:]
    if height % block or width % block:
        raise ValueError(f"block = {block} does not divide images of {height} x {width} (height x width)")
    if not images.is_floating_point():
        raise ValueError(f"images have dtype {images.dtype}: must be floating point; normalize them first")
    pixels = rearrange(images, "b c (h r) (w s) -> (r s) b c h w", r=block, s=block)
    with _without_autocast(images.device):
        return torch.einsum("kn,nbchw->kbchw", torch.as_tensor(matrix).to(pixels), pixels)


def merge(bands: Tensor, matrix: Matrix, block: int) -> Tensor:
    """Inverts `split`: multiplies the coefficients of each block by the inverse of `matrix`, computed in float64.

    Differentiable with respect to `bands`.

    Args:
        bands: (N, B, C, h, w), floating point, N = block².
        matrix: (N, N), the matrix given to `split`.
        block: side of the pixel block.

    Returns:
        (B, C, h * block, w * block), with the dtype and device of `bands`.

    Raises:
        ValueError: `matrix` is not N x N, or the number of bands is not N.
        torch.linalg.LinAlgError: `matrix` is singular.
    """
    _check_matrix(matrix, block)
    if len(bands) != block * block:
        raise ValueError(f"{len(bands)} bands given: block = {block} has {block * block}")
    inverse = torch.linalg.inv(torch.as_tensor(matrix, dtype=torch.float64))
    with _without_autocast(bands.device):
        pixels = torch.einsum("nk,kbchw->nbchw", inverse.to(bands), bands)
    return rearrange(pixels, "(r s) b c h w -> b c (h r) (w s)", r=block, s=block)


def stack(bands: Tensor, groups: Sequence[Sequence[int]]) -> list[Tensor]:
    """Stacks the bands of each group as channels: channel i * C + c is color c of the group's i-th band.

    Args:
        bands: (N, B, C, h, w).
        groups: the bands that each branch reads; groups may overlap, and a band may repeat.

    Returns:
        one (B, C * len(group), h, w) per group.

    Raises:
        ValueError: a group is empty, or a band is outside 0..N-1.
    """
    for index, group in enumerate(groups):
        if not group:
            raise ValueError(f"group {index} has no band")
        if outside := [band for band in group if not 0 <= band < len(bands)]:
            raise ValueError(f"group {index} names band {outside[0]}: allowed are 0..{len(bands) - 1}")
    return [rearrange(bands[list(group)], "i b c h w -> b (i c) h w") for group in groups]


def split_images(
    images: Tensor,
    matrix: Matrix,
    block: int,
    mean: Sequence[float],
    std: Sequence[float],
    mirror: Tensor | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Turns decoded images into branch inputs: the DALI operator `spectral_split` in plain torch.

    Flips, normalizes to (x - mean) / std, splits, stacks and converts. It is the reference in the operator's tests, and
    the fallback where the operator cannot be built.

    Args:
        images: (B, H, W, C), uint8.
        matrix: (N, N), N = block².
        block: side of the pixel block.
        mean: mean of each color channel, on the 0..255 scale of the pixels.
        std: standard deviation of each color channel, on the same scale.
        mirror: (B,), nonzero for images to flip horizontally; None flips no image.
        groups: the bands that each branch reads; None means one branch per band.
        dtype: dtype of the results. Computed in float64 if it is float64, otherwise in float32.

    Returns:
        one (B, C * len(group), H/block, W/block) per group, in channels_last memory format.

    Raises:
        ValueError: `images` is not uint8 of shape (B, H, W, C), `mean` or `std` does not have C entries, or as raised
            by `split` and `stack`.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}: must be uint8 (B, H, W, C)")
    channels = images.shape[-1]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"mean has {len(mean)} and std {len(std)} entries: images have {channels} color channels")
    if mirror is not None:
        flip = rearrange(mirror.to(images.device) != 0, "b -> b 1 1 1")
        images = torch.where(flip, images.flip(2), images)
    images = images.to(torch.float64 if dtype == torch.float64 else torch.float32)
    images = (images - images.new_tensor(mean)) / images.new_tensor(std)
    bands = split(rearrange(images, "b h w c -> b c h w"), matrix, block)
    stacked = stack(bands, [[band] for band in range(len(bands))] if groups is None else groups)
    return [branch.to(dtype).contiguous(memory_format=torch.channels_last) for branch in stacked]


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """For products in the dtype of their factors; nothing where autocast is off, as it would be exported."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def _check_matrix(matrix: Matrix, block: int) -> None:
    count = block * block
    if tuple(matrix.shape) != (count, count):
        raise ValueError(f"matrix of shape {tuple(matrix.shape)}: block = {block} needs ({count}, {count})")
