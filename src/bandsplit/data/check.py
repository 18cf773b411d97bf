"""Examines image files: what they are, and whether DALI decodes them, in processes that may crash or hang."""

from __future__ import annotations

import hashlib
import io
import math
import multiprocessing
import os
import re
import signal
import stat
import sys
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count, islice
from multiprocessing import connection
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile

MAX_PIXELS = 2**28
"""Larger images are refused by their header: decoded they take 800 MB, and what a header promises can be a lie."""

_CHUNK = 64
"""Files that a worker is given at a time."""
_BATCH_BYTES, _BATCH_PIXELS = 2**25, 2**25
"""Of what is read and decoded together."""
_TIME_LIMIT, _SLOWEST = 120.0, 50_000
"""Seconds that any decoding may take, and bytes per second that it has to manage beyond."""

_OF_DECODER = "the decoder"

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF", "ICO", "PSD")
_FORMAT_NAMES = {"mpo": "jpeg", "ppm": "pnm"}
_COLORS = {"1": "bilevel", "L": "gray", "LA": "gray+alpha", "P": "palette", "PA": "palette+alpha", "I": "gray32",
           "I;16": "gray16", "I;16B": "gray16", "F": "float"}  # fmt: skip
_REFUSED = ("gif", "avif", "ico", "psd")
"""Formats that DALI 2.4 does not decode."""
_BEGINNINGS = {
    "jpeg": b"\xff\xd8",
    "png": b"\x89PNG",
    "webp": b"RIFF....WEBP",
    "bmp": b"BM",
    "tiff": b"II\\*\0|MM\0\\*",
}
ON_GPU = "shown by a GPU"
"""How a note begins on what NVIDIA's decoders show otherwise than DALI's on the CPU."""
_COMMON = ("rgb", "gray")
"""Colors that DALI and Pillow are known to agree on."""


@dataclass(frozen=True)
class Verdict:
    """What a file is, and whether DALI decodes it."""

    width: int = 0
    """Pixels, as height; 0: unknown."""
    height: int = 0
    format: str = ""
    """By content, not by name: "jpeg", "png", "webp", "bmp", "tiff", "pnm", "jpeg2000", "gif", …; "": unknown."""
    color: str = ""
    """"rgb", "gray", "cmyk", "ycck", "palette", "rgba", …, with 16 bits a value "rgb16", "gray16", …; "": unknown."""
    orientation: int = 0
    """EXIF orientation, 1 to 8; 0: none."""
    checksum: int = 0
    """First 8 bytes of the SHA-256 digest of the content, big-endian; 0: it was not read."""
    reason: str = ""
    """Why it does not decode; "": it does."""
    note: str = ""
    """How its pixels differ from Pillow's, or on a GPU, though it decodes; "": not that one knows."""

    @property
    def unread(self) -> bool:
        """Whether the content could not be read, as opposed to decoded."""
        return self.reason != "" and not self.checksum and not self.reason.startswith(_OF_DECODER)


def examine(paths: Iterable[str], processes: int, decode: bool = True) -> Generator[Verdict, None, None]:
    """Examines files in worker processes; yields exactly one verdict per path, in order, as they become known.

    A file that crashes the decoder, or on which it hangs, costs that file: its process is started again. Without
    `decode`, only headers are read, and files that end too early are found where their format marks the end.

    Raises RuntimeError if a process cannot start.
    """
    workers = [_Worker(decode) for _ in range(processes)]
    remaining, numbers = iter(paths), count()
    finished: dict[int, list[Verdict]] = {}
    told = 0  # chunks
    try:
        while True:
            for worker in workers:
                # a chunk that takes long must not let the others pile up
                if worker.idle and len(finished) < 4 * processes and (chunk := list(islice(remaining, _CHUNK))):
                    worker.begin(next(numbers), chunk)
            busy = [worker for worker in workers if not worker.idle]
            if not busy and not finished:
                return
            _wait(busy)
            for worker in busy:
                worker.proceed()
                if worker.idle:
                    finished[worker.number] = worker.verdicts
            while told in finished:
                yield from finished.pop(told)
                told += 1
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that examines one chunk after the other, and what is known of the current one.

    A file is to blame for the end of the process only if it was decoded alone and by a process that had done nothing
    before, so at first the rest of the chunk is examined again, one by one.
    """

    def __init__(self, decode: bool) -> None:
        self._decode = decode
        self._process: Any = None
        self._paths: list[str] = []
        self._ready = self._fresh = self._alone = False
        self._limit, self._deadline = 0.0, math.inf
        self.connection: Any = None
        self.number = -1
        self.verdicts: list[Verdict] = []

    @property
    def idle(self) -> bool:
        return len(self.verdicts) == len(self._paths)

    @property
    def seconds_left(self) -> float:
        return self._deadline - time.monotonic()

    def begin(self, number: int, paths: list[str]) -> None:
        self.number, self._paths, self.verdicts = number, paths, []
        if self._process is None:
            self._start()
        self._examine(alone=False)

    def proceed(self) -> None:
        """Takes what the process has sent; deals with one that has ended or hangs."""
        try:
            while not self.idle and self.connection.poll():
                self._take(self.connection.recv())
        except (EOFError, OSError):
            self._process.join(10)
            code = self._process.exitcode or 0
            self._replace(f"{_OF_DECODER} crashed ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})")
        else:
            if self.seconds_left < 0:
                self._replace(f"{_OF_DECODER} did not end in {self._limit:.0f} s")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join(10)
            self.connection.close()
            self._process = None

    def _take(self, message: int | list[Verdict] | None) -> None:
        if message is None:
            self._ready = True
        elif isinstance(message, int):  # bytes that were read and are now examined
            self._limit = _TIME_LIMIT + message / _SLOWEST
            self._deadline = time.monotonic() + self._limit
        else:
            self._fresh, self._deadline = False, math.inf
            self.verdicts += message

    def _replace(self, reason: str) -> None:
        self.stop()
        if not self._ready:
            raise RuntimeError(f"a process that examines images could not start: {reason}")
        if self._alone and self._fresh:
            self.verdicts.append(Verdict(reason=reason))
        if not self.idle:
            self._start()
            self._examine(alone=True)

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_work, args=(theirs, self._decode), daemon=True)
        self._process.start()
        theirs.close()
        self._ready, self._fresh, self._deadline = False, True, math.inf

    def _examine(self, alone: bool) -> None:
        self._alone = alone
        with suppress(OSError):  # ended already, which `proceed` finds out
            self.connection.send((self._paths[len(self.verdicts) :], alone))


def _wait(workers: Sequence[_Worker]) -> None:
    """Until one of them has something to tell or takes too long."""
    soonest = max(0.0, min((worker.seconds_left for worker in workers), default=0.0))
    connection.wait([worker.connection for worker in workers], None if math.isinf(soonest) else soonest)


# ---------------------------------------------------------------------- in the worker


def _work(pipe: Any, decode: bool) -> None:
    """Answers lists of paths until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # there is a limit of our own
    Image.init()
    decoder = _Decoder() if decode else None
    pipe.send(None)
    while True:
        try:
            paths, alone = pipe.recv()
        except (EOFError, OSError):
            return
        for batch in _batches(paths, 1 if alone else _CHUNK):
            pipe.send(sum(len(content) for content in batch if not isinstance(content, str)))
            pipe.send(_verdicts(batch, decoder))


def _batches(paths: Sequence[str], size: int) -> Iterator[list[bytes | str]]:
    """Contents of files, or why they cannot be read; up to `size` files and `_BATCH_BYTES` at a time."""
    batch: list[bytes | str] = []
    held = 0
    for path in paths:
        content = _content(path)
        batch.append(content)
        held += len(content)
        if len(batch) == size or held > _BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _content(path: str) -> bytes | str:
    """bytes of a file, or why they cannot be read."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            return "no regular file"  # to open a pipe would wait for ever
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read()
    except OSError as error:
        return (error.strerror or str(error)).lower()


def _verdicts(batch: Sequence[bytes | str], decoder: _Decoder | None) -> list[Verdict]:
    verdicts = [Verdict(reason=content) if isinstance(content, str) else header(content) for content in batch]
    if decoder is None:
        return [
            verdict if isinstance(content, str) else replace(verdict, reason=_early_end(content) or verdict.reason)
            for verdict, content in zip(verdicts, batch, strict=True)
        ]
    together: list[int] = []
    pixels = 0
    for i, (verdict, content) in enumerate(zip(verdicts, batch, strict=True)):
        if isinstance(content, str) or len(content) == 0 or verdict.width * verdict.height > MAX_PIXELS:
            continue
        if verdict.reason or _early_end(content):  # will fail, and must not do so beside others
            verdicts[i] = decoder.judge(content, verdict)
            continue
        together.append(i)
        pixels += verdict.width * verdict.height
        if pixels > _BATCH_PIXELS:
            _judge_together(together, batch, verdicts, decoder)
            together, pixels = [], 0
    _judge_together(together, batch, verdicts, decoder)
    return verdicts


def _judge_together(chosen: Sequence[int], batch: Sequence[Any], verdicts: list[Verdict], decoder: _Decoder) -> None:
    """Decodes these of a batch at once, and one by one where that fails; replaces their verdicts."""
    if not chosen or (len(chosen) > 1 and decoder.decodes([batch[i] for i in chosen])):
        unusual = [i for i in chosen if verdicts[i].color not in _COMMON]
    else:
        unusual = list(chosen)
    for i in unusual:
        verdicts[i] = decoder.judge(batch[i], verdicts[i])


def header(content: bytes) -> Verdict:
    """What the header of a file tells; a reason only where that alone shows that DALI does not decode it."""
    checksum = _checksum(content)
    if not content:
        return Verdict(checksum=checksum, reason="empty file")
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except Exception:  # Pillow raises anything on damaged headers
        kind = _format_by_beginning(content)
        reason = "header not understood" if kind else "not an image of a known format"
        return Verdict(format=kind, checksum=checksum, reason=reason)
    kind = (image.format or "").lower()
    kind = _FORMAT_NAMES.get(kind, kind)
    reason = _too_large(*image.size) or (f"DALI does not decode {kind}" if kind in _REFUSED else "")
    note = _on_gpu(image) if isinstance(image, JpegImageFile) else ""
    return Verdict(*image.size, kind, _color(image, content), _orientation(image), checksum, reason, note)


def _on_gpu(image: JpegImageFile) -> str:
    """What NVIDIA's decoders (DALI 2.4 on an H200) show of a JPEG; "": what others show."""
    ids, factors = [layer[0] for layer in image.layer], [layer[1:3] for layer in image.layer]
    # how libjpeg tells RGB from YCbCr (jdapimin.c)
    stored = image.info.get("adobe_transform", 0 if ids == [*b"RGB"] else 1)
    if len(ids) == 3 and "jfif" not in image.info and stored == 0:
        return f"{ON_GPU} in wrong colors, since it is stored as RGB"
    if len(ids) == 1 and factors != [(1, 1)]:
        return f"{ON_GPU} with a hardware decoder as another image (sampling factors {factors[0][0]} x {factors[0][1]})"
    return ""


def _too_large(width: int, height: int) -> str:
    if width * height > MAX_PIXELS:
        return f"{width} x {height} pixels by its header, more than {MAX_PIXELS:,}"
    return ""


def _checksum(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def _format_by_beginning(content: bytes) -> str:
    return next((name for name, start in _BEGINNINGS.items() if re.match(start, content, re.DOTALL)), "")


def _color(image: Image.Image, content: bytes) -> str:
    if image.mode == "CMYK" and image.info.get("adobe_transform") == 2:
        return "ycck"
    color = _COLORS.get(image.mode, image.mode.lower())
    sixteen = image.format == "PNG" and content[24] == 16 and not color.endswith("16")
    return f"{color.removesuffix('32')}16" if sixteen else color


def _orientation(image: Image.Image) -> int:
    if image.format != "TIFF" and "exif" not in image.info:  # Pillow would decode a PNG to look for it
        return 0
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 0)
    except Exception:  # Pillow raises anything on damaged EXIF data
        return 0
    return value if isinstance(value, int) and 1 <= value <= 8 else 0


def _early_end(content: bytes) -> str:
    """Why a file is known to end too early by what its format has at its end; "": it is not."""
    kind = _format_by_beginning(content)
    if kind == "jpeg" and not _has_end_marker(content):
        return "truncated: no end marker"
    if kind == "png" and b"IEND\xaeB`\x82" not in content[-65536:]:
        return "truncated: no end chunk"
    sizes = {"webp": int.from_bytes(content[4:8], "little") + 8, "bmp": int.from_bytes(content[2:6], "little")}
    promised = sizes.get(kind, 0)
    return f"truncated: {len(content):,} bytes of {promised:,}" if promised > len(content) else ""


def _has_end_marker(content: bytes) -> bool:
    """Whether a JPEG file has an end marker behind the header, in which a thumbnail has its own.

    Cameras append whole videos to it.
    """
    if content.endswith(b"\xff\xd9"):
        return True
    i = 2
    while i + 4 <= len(content) and content[i] == 0xFF:
        marker = content[i + 1]
        if marker == 0xDA:  # start of scan
            break
        i += 1 if marker == 0xFF else 2 + int.from_bytes(content[i + 2 : i + 4], "big")
    return content.rfind(b"\xff\xd9", i) >= 0


class _Decoder:
    """DALI's decoder on the CPU as the training pipeline uses it, with one thread."""

    def __init__(self) -> None:
        from nvidia.dali import fn, pipeline_def, types

        def decoded() -> Any:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            return fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False)

        def shape() -> Any:
            return fn.peek_image_shape(fn.external_source(name="encoded", dtype=types.UINT8, ndim=1))

        self._graphs = {graph.__name__: pipeline_def(graph) for graph in (decoded, shape)}
        self._pipes: dict[str, Any] = {}
        self._complaints = os.memfd_create("complaints")
        sys.stderr.flush()
        os.dup2(self._complaints, 2)  # DALI and libjpeg say there what they dislike

    def decodes(self, contents: Sequence[bytes]) -> bool:
        try:
            self._run("decoded", contents)
        except RuntimeError:
            return False
        return True

    def judge(self, content: bytes, known: Verdict) -> Verdict:
        """The verdict on a file that is decoded alone, given what its header tells."""
        os.ftruncate(self._complaints, 0)
        os.lseek(self._complaints, 0, os.SEEK_SET)
        try:
            if not known.width:  # Pillow does not know it
                height, width = (int(n) for n in np.asarray(self._run("shape", [content]).at(0))[:2])
                known = replace(known, width=width, height=height, reason=_too_large(width, height) or known.reason)
                if width * height > MAX_PIXELS:
                    return known
            image = np.asarray(self._run("decoded", [content]).at(0))
        except RuntimeError as error:
            return replace(known, reason=self._cleaned(str(error), content, known))
        note = _difference(image, content, known) if known.color not in _COMMON else ""
        return replace(known, width=image.shape[1], height=image.shape[0], reason="", note=note or known.note)

    def _run(self, graph: str, contents: Sequence[bytes]) -> Any:
        """Raises RuntimeError if DALI does; the pipeline, which is then of no more use, is dropped."""
        pipe = self._pipes.pop(graph, None)
        if pipe is None:
            pipe = self._graphs[graph](batch_size=_CHUNK, num_threads=1, device_id=None, prefetch_queue_depth=1)
        pipe.feed_input("encoded", [np.frombuffer(content, np.uint8) for content in contents])
        (output,) = pipe.run()
        self._pipes[graph] = pipe
        return output

    def _cleaned(self, error: str, content: bytes, known: Verdict) -> str:
        """Why DALI refuses a file: what is known anyway, or the words of DALI and its libraries, unwrapped."""
        early = _early_end(content)
        if early or known.format in ("", *_REFUSED):
            return early or known.reason
        complaints = os.pread(self._complaints, 65536, 0).decode(errors="replace")
        lines = re.sub(r"\x1b\[[\d;]*m|\[\w+\]|.*error: \(.*?\)| in function '.*'", "", complaints).split("\n")
        told = [" ".join(line.split()) for line in lines if line.strip() and "Warning" not in line]
        if not told and "'#3'" in error:  # nvImageCodec's status of a bad code stream
            told = ["damaged"]
        refused = f"DALI does not decode it{f' ({told[-1]})' if told else ''}"
        return f"{known.reason}; {refused}" if known.reason else refused


def _difference(image: NDArray[np.uint8], content: bytes, known: Verdict) -> str:
    """How an image (H, W, 3) differs from Pillow's where the mean of all pixels is off by more than 16 of 255."""
    if known.width * known.height > _BATCH_PIXELS:
        return ""
    try:
        theirs = np.asarray(Image.open(io.BytesIO(content), formats=_FORMATS).convert("RGB"))
    except Exception:  # then there is nothing to compare with
        return ""
    if theirs.shape != image.shape:
        return f"{image.shape[1]} x {image.shape[0]} pixels, {theirs.shape[1]} x {theirs.shape[0]} in Pillow"
    if np.abs(theirs.astype(np.int16) - image).mean() <= 16:
        return ""
    black = "comes out black" if image.max() < 16 else "comes out otherwise than in Pillow"
    return f"{known.color}: {black} (mean value {image.mean():.0f} of 255, {theirs.mean():.0f} in Pillow)"
