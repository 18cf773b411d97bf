"""Published checksums of archives, each compared once."""

from __future__ import annotations

import hashlib
from pathlib import Path

from bandsplit.data.prepare.archives import CHUNK
from bandsplit.data.prepare.destination import Destination
from bandsplit.data.prepare.progress import Progress
from bandsplit.errors import UserError
from bandsplit.paths import reading_from

MD5 = {
    "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
    "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
    "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
    "winter21_whole.tar.gz": "ab313ce03179fd803a401b02c651c0a2",
    "tiny-imagenet-200.zip": "90528d7ca1a48142e341f4ef8d21d0de",
}
"""Published checksums: of ILSVRC2012 and winter21 by image-net.org, of Tiny ImageNet by the libraries that load it.
There is none of fall11."""


def require_published(path: Path, name: str, target: Destination) -> None:
    """Compares an archive with the checksum that is published for the archive `name`, if there is one.

    An interrupted run has to read hundreds of gigabytes only once: `target` remembers what has been compared.

    Raises UserError if they differ.
    """
    if name not in MD5:
        return
    with reading_from(path):
        about = path.stat()
    same = {"size": about.st_size, "mtime_ns": about.st_mtime_ns}
    if target.noted(f"md5 {name}") == same:
        return
    found = _md5(path, about.st_size)
    if found != MD5[name]:
        raise UserError(
            f"{path}: its MD5 is {found}, but {MD5[name]} is published for {name}: damaged, incomplete "
            f"({about.st_size:,} bytes) or repacked; download it again, or use it as it is with --skip-checksum"
        )
    target.note(f"md5 {name}", same)


def _md5(path: Path, size: int) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with Progress(f"checksum of {path.name}", size) as progress, reading_from(path), path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            progress.advance(len(chunk))
    return digest.hexdigest()
