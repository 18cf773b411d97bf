"""`pack --kind images`: every image resized once, as JPEG, in its class folder.

What is small enough and a plain RGB JPEG already is copied as it is; everything else is decoded by Pillow, brought to
sRGB, resized and encoded, without its metadata.  EXIF orientation is ignored, as the pipeline ignores it.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

from PIL import Image, ImageCms, UnidentifiedImageError

from bandsplit import __version__
from bandsplit.commands import command
from bandsplit.config.schema import RunConfig
from bandsplit.data.images import ImageFiles
from bandsplit.data.store import manifest as stored
from bandsplit.data.store import packing
from bandsplit.data.store.manifest import ImageManifest, ImagePart
from bandsplit.data.store.packing import Chunk, Folder, Record, Source
from bandsplit.errors import UserError
from bandsplit.gray import with_8_bits

NAME_MAX = 255
"""Bytes of a name, of most file systems."""

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Encoding:
    """How images are written; it goes to every worker."""

    side: int
    """Longest shorter side in pixels."""
    quality: int
    interpolation: Literal["bilinear", "bicubic"]
    root: Path


def pack(
    config: RunConfig,
    parts: Mapping[str, ImageFiles],
    root: Path,
    to: Path,
    side: int | None,
    quality: int,
    workers: int,
    chunk_images: int | None = None,
) -> ImageManifest:
    """Packs the images of a data set.

    Args:
        parts: the images of "train" and "val".
        root: folder of the data set, to which the names of images are relative.
        side: longest shorter side in pixels; None: `data.resize_size`.
        quality: of JPEG, 1 to 100.
        workers: processes; 0: this one.
        chunk_images: images that a worker packs at a time; None: as many as are useful.

    Raises UserError if `to` holds something else or the disk is full.
    """
    encoding = Encoding(side or config.data.resize_size, quality, config.data.interpolation, root)
    source = Source(parts, root)
    chunks = source.chunks(chunk_images)
    for part, files in parts.items():
        _require_class_folders(getattr(config.data, part), files, source.names[part])
    plan = {
        "--kind": "images",
        "code_version": __version__,
        "--size": encoding.side,
        "--quality": quality,
        "--chunk": len(chunks[0].paths),
        "data.name": config.data.name,
        "data.interpolation": encoding.interpolation,
        **source.plan(),
    }
    folder = Folder(to)
    with folder.begun(plan) as complete:
        if complete:
            manifest = stored.read_manifest(to)
            assert isinstance(manifest, ImageManifest)
            return manifest
        records = folder.packed(partial(_pack_chunk, encoding, to), chunks, workers)
        together = list(zip(chunks, records, strict=True))
        packing.write_checksums(to, {name: value for record in records for name, value in record["sha256"].items()})
        about = {}
        for part, files in parts.items():
            own = [record for chunk, record in together if chunk.part == part]
            about[part] = ImagePart(
                images=sum(record["images"] for record in own),
                bytes=sum(record["bytes"] for record in own),
                source_images=len(files),
                source_digest=source.digests[part],
                left_out=source.left_out(part, own),
            )
        manifest = ImageManifest(
            format=stored.FORMAT,
            kind="images",
            code_version=__version__,
            data=config.data.name,
            side=encoding.side,
            quality=quality,
            interpolation=encoding.interpolation,
            classes=source.classes,
            parts=about,
        )
        folder.finish(manifest)
        return manifest


def _require_class_folders(part: str, files: ImageFiles, names: Sequence[str]) -> None:
    """Raises UserError if an image is not in the folder of its class, or two would get the same name."""
    if ".." in Path(part).parts or Path(part).is_absolute():
        raise UserError(f"data.root: {part} is not below it, so that its copy would have no place in --to")
    folders = [f"{PurePosixPath(part, name)}/" for name in files.classes]
    for name, label in zip(names, files.labels, strict=True):
        if not name.startswith(folders[label]):
            raise UserError(
                f"{name}: not in {folders[label]}, the folder of its class; "
                f"`{command('data')} prepare flat` makes class folders from a list"
            )
    renamed = {packed_name(name) for name in names if packed_name(name) != name}
    if taken := renamed.intersection(names):
        name = min(taken).removesuffix(".jpg")
        raise UserError(f"{name} would become {name}.jpg, which is there already; rename one of them")
    if long := [name for name in renamed if len(os.fsencode(PurePosixPath(name).name)) > NAME_MAX]:
        name = min(long).removesuffix(".jpg")
        raise UserError(f"{name} would become {name}.jpg, a name of more than {NAME_MAX} bytes; rename it")


def _pack_chunk(encoding: Encoding, to: Path, chunk: Chunk) -> Record:
    """In a worker."""
    left_out: list[dict[str, str]] = []
    sums: dict[str, str] = {}
    size = 0
    for path, name in zip(chunk.paths, packing.names_of(chunk.paths, encoding.root), strict=True):
        try:
            jpeg = resized(Path(path), encoding)
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            left_out.append({"name": name, "reason": f"cannot be read or decoded: {error}".replace(path, name)})
            continue
        sums[packed_name(name)] = packing.replace(to / packed_name(name), jpeg, durable=False)
        size += len(jpeg)
    return {"images": len(sums), "bytes": size, "left_out": left_out, "sha256": sums}


def resized(path: Path, encoding: Encoding) -> bytes:
    """An image as JPEG with a shorter side of at most `encoding.side`.  Raises what Pillow raises where it fails."""
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        image.load()  # raises where the file is cut
        profile = image.info.get("icc_profile")
        small = min(image.size) <= encoding.side
        if small and image.format == "JPEG" and image.mode == "RGB" and (not profile or _is_srgb(profile)):
            return content
        rgb = _in_srgb(image, profile)
    if not small:
        scale = encoding.side / min(rgb.size)
        size = [max(1, math.floor(length * scale + 0.5)) for length in rgb.size]
        rgb = rgb.resize((size[0], size[1]), _FILTERS[encoding.interpolation])
    buffer = io.BytesIO()
    rgb.save(buffer, "JPEG", quality=encoding.quality)
    return buffer.getvalue()


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB without alpha; colors of another profile are converted, where the profile can be used."""
    image = with_8_bits(image)
    if profile and image.mode in ("RGB", "CMYK", "L") and not _is_srgb(profile):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass  # a profile that is damaged or for another mode: the values are taken as they are
    return image.convert("RGB")


def _is_srgb(profile: bytes) -> bool:
    try:
        return "srgb" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).lower()
    except (ImageCms.PyCMSError, OSError, ValueError):
        return True  # no profile that says otherwise


def packed_name(name: str) -> str:
    """x.jpg and x.JPEG stay, x.png becomes x.png.jpg."""
    return name if PurePosixPath(name).suffix.lower() in (".jpg", ".jpeg") else f"{name}.jpg"
