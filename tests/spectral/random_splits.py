"""Random calls of the operator against numpy: python random_splits.py PLUGIN COUNT

test_native.py runs it with sanitizers. Only numpy and DALI are imported, and every image has its own memory, so that a
read past its end is detected.
"""

import sys
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, plugin_manager, types


def expected(image: Any, matrix: Any, block: int, mean: Any, std: Any, bands: Any, mirror: bool) -> Any:
    """(h, w, bands * channels)"""
    x = ((image[:, ::-1] if mirror else image).astype(np.float64) - mean) / std
    height, width, channels = image.shape[0] // block, image.shape[1] // block, image.shape[2]
    squares = x.reshape(height, block, width, block, channels).transpose(0, 2, 1, 3, 4)
    pixels = squares.reshape(height, width, block * block, channels)
    return np.einsum("kn,hwnc->hwkc", matrix[bands], pixels).reshape(height, width, len(bands) * channels)


def check(seed: int) -> str:
    rng = np.random.default_rng(seed)
    block, batch, threads = int(rng.integers(1, 9)), int(rng.integers(1, 6)), int(rng.integers(1, 5))
    channels = int(rng.choice([1, 2, 3, 3, 3, 3, 4]))
    sizes = rng.integers(0 if seed % 8 == 0 else 1, 40, (batch, 2)) * block
    images = [rng.integers(0, 256, (*size, channels), dtype=np.uint8) for size in sizes]
    mirror = rng.integers(0, 2, batch).astype(np.int32)
    factors = rng.normal(size=(2, block, block))
    product = bool(rng.integers(2))
    matrix = np.kron(*factors) if product else rng.normal(size=(block * block, block * block))
    groups = [rng.integers(0, block * block, rng.integers(1, block * block + 2)) for _ in range(rng.integers(1, 5))]
    mean, std = rng.uniform(0, 255, channels), rng.uniform(1, 99, channels)
    half, layout = bool(rng.integers(2)), str(rng.choice(["HWC", "CHW"]))

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=None)
    def pipeline() -> Any:
        source = fn.external_source(lambda: images, layout="HWC", no_copy=True)
        flips = fn.external_source(lambda: mirror)
        outputs = fn.spectral_split(
            source, mirror=flips, block=block, matrix=matrix.ravel().tolist(), mean=mean.tolist(), std=std.tolist(),
            groups=np.concatenate(groups).tolist(), group_sizes=[len(group) for group in groups],
            dtype=types.FLOAT16 if half else types.FLOAT, output_layout=layout,
        )  # fmt: skip
        return tuple(outputs) if isinstance(outputs, list) else (outputs,)

    built = pipeline()
    built.build()
    outputs = built.run()
    for group, output in zip(groups, outputs, strict=True):
        for i, image in enumerate(images):
            want = expected(image, matrix, block, mean, std, group, bool(mirror[i]))
            got = np.array(output[i]).astype(np.float64)
            got = got if layout == "HWC" else got.transpose(1, 2, 0)
            span = np.abs(want).max(initial=1e-9)
            np.testing.assert_allclose(got, want, atol=1e-4 * span, rtol=2e-3 if half else 0)
    return f"block {block}, {batch} images, {channels} channels, {threads} threads, {layout}, product {product}"


if __name__ == "__main__":
    plugin_manager.load_library(sys.argv[1])
    for seed in range(int(sys.argv[2])):
        print(seed, check(seed), flush=True)
    print("all equal")
