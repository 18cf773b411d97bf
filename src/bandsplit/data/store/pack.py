"""`pack`, as the command line calls it: which images, into what, and a summary."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from bandsplit.config.schema import RunConfig
from bandsplit.data.images import open_here
from bandsplit.data.store import bands, images
from bandsplit.data.store.manifest import BandManifest, ImageManifest, LeftOut
from bandsplit.errors import UserError
from bandsplit.paths import expanded


def run(config: RunConfig, options: Namespace) -> None:
    """Packs the images of a config and prints what came of it.  Raises UserError as `bands.pack` does."""
    if config.data.kind != "images":
        raise UserError(f"data.kind: {config.data.kind!r} given; packed are images: name their data config")
    parts, root = open_here(config.data), expanded(config.data.root, "data.root")
    if options.kind == "bands":
        stored = bands.pack(config, parts, root, options.to, options.dtype, options.size, options.workers)
        _show_bands(stored, options.to)
    else:
        packed = images.pack(config, parts, root, options.to, options.size, options.quality, options.workers)
        _show_images(packed, options.to)


def _show_bands(manifest: BandManifest, to: Path) -> None:
    print(f"{to}: {len(manifest.bands)} bands of {manifest.data} in {manifest.dtype}")
    for part, about in manifest.parts.items():
        height, width, _ = manifest.shape(part)
        per_band = about.images * manifest.image_bytes(part) / 1e9
        print(f"{part:>8}  {about.images} images of {height} x {width}, {per_band:,.3f} GB a band")
        _show_left_out(part, about.left_out)
    psnr, clipped = min(b.psnr for b in manifest.bands.values()), max(b.clipped for b in manifest.bands.values())
    print(f"   PSNR  at least {psnr:.1f} dB of a band's range; {clipped:.1e} of the values of a band clipped, at most")


def _show_images(manifest: ImageManifest, to: Path) -> None:
    print(f"{to}: images of {manifest.data}, shorter side at most {manifest.side}, quality {manifest.quality}")
    for part, about in manifest.parts.items():
        print(f"{part:>8}  {about.images} images, {about.bytes / 1e9:,.3f} GB")
        _show_left_out(part, about.left_out)


def _show_left_out(part: str, left_out: tuple[LeftOut, ...]) -> None:
    if left_out:
        print(f"{part:>8}  {len(left_out)} left out:")
        for each in left_out:
            print(f"          {each.name!r}: {each.reason}")
