"""Transforms as matrices, and the split in plain torch: the reference for the DALI operator.

An image is cut into blocks of s x s pixels. Pixel n = r * s + c of a block is its row r, column c; a transform is an
N x N matrix (N = s²) that turns the N pixels of a block into N coefficients. Coefficient k of every block, at the
block's position, forms band k: an image of H/s x W/s.

Shapes: B images, C color channels, H x W pixels, N bands of h x w, with h = H/s and w = W/s.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor

Kind = Literal["dct2d", "dct1d", "hadamard", "identity"]
Norm = Literal["ortho", "none"]
Matrix = npt.NDArray[np.floating] | Tensor


def transform_matrix(kind: Kind, block: int, norm: Norm = "ortho") -> npt.NDArray[np.float64]:
    """The transform of a block as a matrix: row k gives coefficient k, column n = r * block + c is a pixel.

    | kind | row k | "none" instead of "ortho" |
    |---|---|---|
    | dct2d | separable DCT-II, k = u * block + v: vertical frequency u, horizontal v | factor 2 per axis, as scipy's |
    | dct1d | DCT-II over the flattened block: what the authors of the method ran | X_k = 2 Σ x_n cos(πk(2n+1) / 2N) |
    | hadamard | separable Walsh-Hadamard, k = u * block + v: u sign changes downwards, v across | entries ±1 |
    | identity | pixel k (polyphase components) | the same |

    Hadamard rows are ordered by sign changes per axis (sequency, Walsh's order), not by Sylvester's order: band k
    covers the same part of the spectrum as band k of dct2d and a group such as [0, 1] means the same for both. The
    rows are those of `scipy.linalg.hadamard(N)`; at block 2 the order is the same too.

    Args:
        kind: the transform.
        block: side s of the pixel block, at least 1.
        norm: "ortho" makes the matrix orthonormal: energy is kept and the inverse is the transpose.

    Returns:
        (N, N) float64, N = block².

    Raises:
        ValueError: unknown kind or norm, block below 1, or hadamard with a block that is not a power of 2.

    Sources: DCT-II: Ahmed, Natarajan and Rao 1974, in the scaling of `scipy.fft.dct`; sequency order: Walsh 1923.
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
    raise ValueError(f"kind = {kind!r}: allowed are 'dct2d', 'dct1d', 'hadamard' and 'identity'")


def _on_both_axes(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(s, s) -> (s², s²): entry (u * s + v, r * s + c) is matrix[u, r] * matrix[v, c]."""
    return np.asarray(np.kron(matrix, matrix), dtype=np.float64)


def _dct_matrix(length: int, norm: Norm) -> npt.NDArray[np.float64]:
    """(length, length): X_k = 2 Σ x_n cos(πk(2n+1) / 2·length); ortho: times √(1/4·length), √(1/2·length) for k > 0."""
    n = np.arange(length, dtype=np.float64)
    matrix = 2 * np.cos(np.pi / (2 * length) * np.outer(n, 2 * n + 1))
    if norm == "ortho":
        matrix *= np.sqrt(1 / (2 * length))
        matrix[0] *= np.sqrt(1 / 2)
    return matrix


def _walsh_matrix(length: int, norm: Norm) -> npt.NDArray[np.float64]:
    """(length, length): rows of the Hadamard matrix, row k the one with k sign changes; ortho: divided by √length."""
    if length & (length - 1):
        raise ValueError(f"block = {length}: the hadamard transform needs a power of 2 (1, 2, 4, 8, ...)")
    matrix = np.ones((1, 1))
    while len(matrix) < length:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    sign_changes = np.count_nonzero(np.diff(matrix, axis=1), axis=1)
    matrix = matrix[np.argsort(sign_changes)]
    return matrix / np.sqrt(length) if norm == "ortho" else matrix


def split(images: Tensor, matrix: Matrix, block: int) -> Tensor:
    """Split images into bands: band k at block (i, j) is Σ_n matrix[k, n] x_n over the pixels n of that block.

    Args:
        images: (B, C, H, W), a floating type; H and W multiples of block.
        matrix: (N, N), N = block², as returned by `transform_matrix`.
        block: side of the pixel block.

    Returns:
        (N, B, C, H/block, W/block), type and device of the images; differentiable.

    Raises:
        ValueError: a side that block does not divide, a matrix that is not N x N, or images of an integer type.
    """
    _check_matrix(matrix, block)
    height, width = images.shape[-2:]
    if height % block or width % block:
        raise ValueError(f"block = {block} does not divide images of {height} x {width} (height x width)")
    if not images.is_floating_point():
        raise ValueError(f"images of type {images.dtype}: normalize them first; a floating type is needed")
    pixels = rearrange(images, "b c (h r) (w s) -> (r s) b c h w", r=block, s=block)
    return torch.einsum("kn,nbchw->kbchw", torch.as_tensor(matrix).to(pixels), pixels)


def merge(bands: Tensor, matrix: Matrix, block: int) -> Tensor:
    """Undo `split`: the inverse matrix (for an orthonormal one, its transpose) turns coefficients into pixels.

    Args:
        bands: (N, B, C, h, w), N = block².
        matrix: (N, N), the one that split them; it has to be invertible.
        block: side of the pixel block.

    Returns:
        (B, C, h * block, w * block), type and device of the bands; differentiable.

    Raises:
        ValueError: a matrix that is not N x N, or a number of bands other than N.
    """
    _check_matrix(matrix, block)
    if len(bands) != block * block:
        raise ValueError(f"{len(bands)} bands: block = {block} makes {block * block}")
    inverse = torch.linalg.inv(torch.as_tensor(matrix, dtype=torch.float64))
    pixels = torch.einsum("nk,kbchw->nbchw", inverse.to(bands), bands)
    return rearrange(pixels, "(r s) b c h w -> b c (h r) (w s)", r=block, s=block)


def stack(bands: Tensor, groups: Sequence[Sequence[int]]) -> list[Tensor]:
    """Lay the bands of each group side by side in the channel axis: channel i * C + c is color c of the i-th band.

    Args:
        bands: (N, B, C, h, w).
        groups: for each branch the bands it reads; groups may overlap and repeat.

    Returns:
        one (B, C * len(group), h, w) a group.

    Raises:
        ValueError: an empty group, or a band outside 0..N-1.
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
    """From decoded images to the inputs of the branches: exactly what the DALI operator `spectral_split` computes.

    Mirrors, normalizes to (x - mean) / std, splits, stacks and converts. Reference for the operator's tests, and the
    fallback where no compiler can build the operator.

    Args:
        images: (B, H, W, C) uint8.
        matrix: (N, N), N = block².
        block: side of the pixel block.
        mean: C numbers in units of the pixel values 0..255.
        std: C numbers in the same units.
        mirror: (B,), nonzero where an image is flipped left to right; None flips none.
        groups: for each branch its bands; None gives each band its own.
        dtype: dtype of the results. The arithmetic is float32, or float64 for dtype float64.

    Returns:
        one (B, C * len(group), H/block, W/block) a group, in channels_last memory format.

    Raises:
        ValueError: images that are not uint8 (B, H, W, C), mean or std that have not C entries, and all that
            `split` and `stack` refuse.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}: needed is uint8 (B, H, W, C)")
    channels = images.shape[-1]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"mean has {len(mean)} and std {len(std)} entries for {channels} color channels")
    if mirror is not None:
        flip = rearrange(mirror.to(images.device) != 0, "b -> b 1 1 1")
        images = torch.where(flip, images.flip(2), images)
    images = images.to(torch.float64 if dtype == torch.float64 else torch.float32)
    images = (images - images.new_tensor(mean)) / images.new_tensor(std)
    bands = split(rearrange(images, "b h w c -> b c h w"), matrix, block)
    stacked = stack(bands, [[band] for band in range(len(bands))] if groups is None else groups)
    return [branch.to(dtype).contiguous(memory_format=torch.channels_last) for branch in stacked]


def _check_matrix(matrix: Matrix, block: int) -> None:
    count = block * block
    if tuple(matrix.shape) != (count, count):
        raise ValueError(f"matrix of shape {tuple(matrix.shape)}: block = {block} needs ({count}, {count})")
