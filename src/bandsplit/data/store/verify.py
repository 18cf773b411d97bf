"""Packed data against its checksums."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bandsplit.data.store import packing
from bandsplit.data.store.manifest import CHECKSUMS, BandManifest, Manifest, band_folder, read_manifest
from bandsplit.errors import UserError
from bandsplit.paths import reading_from
from bandsplit.progress import followed


@dataclass(frozen=True)
class Verified:
    manifest: Manifest
    files: int
    bytes: int
    absent: tuple[int, ...]
    """Bands whose folders are not here: a node copies only those that it reads."""


def verify(root: Path, threads: int) -> Verified:
    """Reads every file of packed data.  Raises UserError that names all that are damaged or missing."""
    manifest = read_manifest(root)
    folders, absent = [root], []
    if isinstance(manifest, BandManifest):
        for band in sorted(manifest.bands):
            folder = root / band_folder(band)
            folders.append(folder) if folder.is_dir() else absent.append(band)
    expected = {
        folder / name: value for folder in folders for name, value in packing.read_checksums(folder / CHECKSUMS).items()
    }
    wrong = []
    with ThreadPoolExecutor(threads) as pool:
        checked = zip(expected, pool.map(_verdict, expected, expected.values()), strict=True)
        for path, verdict in followed(checked, f"reading {root}", len(expected), "files"):
            if verdict:
                wrong.append(f"{path}: {verdict}")
    wrong += list(_disagreeing(root, manifest))
    if wrong:
        listed = "\n  ".join(wrong[:100]) + (f"\n  and {len(wrong) - 100} more" if len(wrong) > 100 else "")
        raise UserError(f"{root}: {len(wrong)} of {len(expected)} files are wrong:\n  {listed}")
    return Verified(manifest, len(expected), sum(path.stat().st_size for path in expected), tuple(absent))


def _verdict(path: Path, expected: str) -> str | None:
    with reading_from(path):
        if not path.is_file():
            return "missing"
        return None if packing.file_sha256(path) == expected else "damaged: its content has changed"


def _disagreeing(root: Path, manifest: Manifest) -> Iterator[str]:
    """Files that the manifest counts and no checksum names."""
    if not isinstance(manifest, BandManifest):
        return
    for band in sorted(manifest.bands):
        folder = root / band_folder(band)
        if folder.is_dir():
            listed = packing.read_checksums(folder / CHECKSUMS)
            for part, about in manifest.parts.items():
                shards = sum(name.startswith(f"{part}/") for name in listed)
                if shards != len(about.shards):
                    yield f"{folder / CHECKSUMS}: names {shards} {part} shards of {len(about.shards)}"
