"""FFCV beside the benchmarks, in a process and an environment of its own, since it needs other versions of packages.

The benchmark imports this file, and FFCV's Python runs it.  It is told what to read in one line of JSON, answers with
the bytes of its images, and from then on answers each line with the number of images of another batch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bandsplit.config import schema

HOW = (
    "apt install libopencv-dev libturbojpeg0-dev pkg-config; python -m venv ~/ffcv; ~/ffcv/bin/pip install "
    "opencv-python-headless torch torchvision ffcv; then --ffcv-python ~/ffcv/bin/python"
)
"""How FFCV gets beside the benchmarks."""

PASSES = 200
"""Passes over the images in one epoch of its loader, so that none ends while it is timed."""


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ffcv-python", type=_program, help=f"interpreter that has FFCV ({HOW})")


def _program(text: str) -> Path:
    if shutil.which(text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} given, expected a program that can be run")
    return Path(text)


class Peer:
    """Called, it returns the number of images of FFCV's next batch: random resized crop, flip, normalization."""

    def __init__(self, python: Path, job: dict[str, Any]) -> None:
        alone = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).absolute())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=alone,
        )
        self.image_bytes = self._ask(json.dumps(job)) / len(job["files"])
        """Bytes of an image in the .beton file, without the unfilled ends of its pages of 8 MiB."""

    def __call__(self) -> int:
        return self._ask("next")

    def _ask(self, line: str) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())
        except (OSError, ValueError):
            from bandsplit.errors import UserError  # late: FFCV's Python, which runs this file too, does not have it

            raise UserError("--ffcv-python: FFCV has failed, with the message above") from None

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def started(
    options: argparse.Namespace,
    containers: Mapping[str, tuple[list[Path], int | None]],
    folder: Path,
    data: schema.Data,
) -> dict[str, Peer]:
    """FFCV's loaders by name, with the batch, threads and interpreter of `options`; without one, none.

    Args:
        containers: name -> JPEG files, and the longest side of the images that FFCV makes of them for its .beton; None:
            they are stored as they are.
        folder: for the .beton files.
        data: side of the crops in pixels, mean and deviation.
    """
    if options.ffcv_python is None:
        print(f"FFCV is not measured: {HOW}")
        return {}
    return {
        name: Peer(
            options.ffcv_python,
            {
                "files": [str(file.absolute()) for file in files],
                "container": str(folder / f"{longest or 'as they are'}.beton"),
                "max_resolution": longest,
                "side": data.image_size,
                "batch_size": options.batch,
                "threads": options.threads,
                "mean": data.mean,
                "std": data.std,
            },
        )
        for name, (files, longest) in containers.items()
    }


def stop(peers: Mapping[str, Peer]) -> None:
    for peer in peers.values():
        peer.close()


# In FFCV's process ----------------------------------------------------------------------------------------------------


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what FFCV prints is no answer
    job = json.loads(sys.stdin.readline())
    container = Path(job["container"])
    if not container.exists():
        write(job, container)
    from ffcv.fields import RGBImageField
    from ffcv.reader import Reader

    stored = Reader(str(container), {"image": RGBImageField}).alloc_table["size"].sum()
    print(int(stored), file=answers, flush=True)
    batches = endless(job, container)
    for _ in sys.stdin:
        print(len(next(batches)[0]), file=answers, flush=True)


def write(job: dict[str, Any], container: Path) -> None:
    import numpy as np
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.writer import DatasetWriter
    from PIL import Image

    class StoredJpeg(RGBImageField):
        def encode(self, destination: Any, file: Any, malloc: Any) -> None:
            content = np.fromfile(file, dtype=np.uint8)
            destination["mode"] = IMAGE_MODES["jpg"]
            destination["width"], destination["height"] = Image.open(file).size
            destination["data_ptr"], storage = malloc(content.nbytes)
            storage[:] = content

    class Decoded:
        def __len__(self) -> int:
            return len(job["files"])

        def __getitem__(self, i: int) -> tuple[Any, int]:
            return Image.open(job["files"][i]).convert("RGB"), 0

    if job["max_resolution"] is None:
        image, images = StoredJpeg(), [(file, 0) for file in job["files"]]
    else:
        image = RGBImageField(write_mode="jpg", max_resolution=job["max_resolution"], jpeg_quality=90)
        images = Decoded()
    DatasetWriter(str(container), {"image": image, "label": IntField()}, num_workers=1).from_indexed_dataset(images)


def endless(job: dict[str, Any], container: Path) -> Iterator[Any]:
    import numpy as np
    from ffcv.fields import RGBImageField
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage

    image = [
        RandomResizedCropRGBImageDecoder((job["side"], job["side"])),
        RandomHorizontalFlip(),
        NormalizeImage(np.array(job["mean"], np.float32), np.array(job["std"], np.float32), np.float32),
        ToTensor(),
        ToTorchImage(),
    ]
    loader = Loader(
        str(container),
        job["batch_size"],
        num_workers=job["threads"],
        order=OrderOption.RANDOM,
        os_cache=True,
        indices=np.tile(np.arange(len(job["files"])), PASSES),
        drop_last=True,
        custom_fields={"image": RGBImageField},
        pipelines={"image": image, "label": [IntDecoder(), ToTensor()]},
    )
    while True:
        yield from loader


if __name__ == "__main__":
    serve()
