"""Files of every kind get a verdict each, whatever becomes of the process that decodes them."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import signal
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bandsplit.data import check
from bandsplit.data.check import ON_GPU, Verdict, examine
from tests.conftest import REPOSITORY, Done


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((130, 90))


def oriented(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = value
    return exif


def with_color_transform(cmyk: bytes, transform: int | None) -> bytes:
    """A CMYK file of Pillow's with another value in its Adobe marker (2: YCCK), or without the marker."""
    start = cmyk.index(b"\xff\xee")
    end = start + 2 + int.from_bytes(cmyk[start + 2 : start + 4], "big")
    return cmyk[:start] + (b"" if transform is None else cmyk[start : end - 1] + bytes([transform])) + cmyk[end:]


def with_jpeg_size(jpeg: bytes, width: int, height: int) -> bytes:
    place = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:place] + struct.pack(">HH", height, width) + jpeg[place + 4 :]


def with_sampling(gray: bytes, horizontal: int, vertical: int) -> bytes:
    """A JPEG of one component with other sampling factors, which mean nothing there."""
    place = gray.index(b"\xff\xc0") + 11
    return gray[:place] + bytes([16 * horizontal + vertical]) + gray[place + 1 :]


def with_png_size(png: bytes, width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def good_files() -> Iterator[tuple[str, bytes, str, str, int, str]]:
    """Name, content, format, color, orientation, and the beginning of the note: Pillow shows other pixels."""
    rgb, gray = photo(), photo().convert("L")
    cmyk = encoded(rgb.convert("CMYK"))
    deep = Image.fromarray((np.arange(90 * 130).reshape(90, 130) * 5).astype(np.uint16))
    yield "baseline.jpg", encoded(rgb), "jpeg", "rgb", 0, ""
    yield "progressive.jpg", encoded(rgb, progressive=True), "jpeg", "rgb", 0, ""
    yield "gray.jpg", encoded(gray), "jpeg", "gray", 0, ""
    yield "rgb.jpg", encoded(rgb, keep_rgb=True), "jpeg", "rgb", 0, "shown by a GPU in wrong colors"
    yield "sampled.jpg", with_sampling(encoded(gray), 2, 2), "jpeg", "gray", 0, "shown by a GPU with a hardware decoder"
    yield "cmyk.jpg", cmyk, "jpeg", "cmyk", 0, ""
    yield "ycck.jpg", with_color_transform(cmyk, 2), "jpeg", "ycck", 0, ""
    # DALI takes the values for inverted as Adobe writes them, marker or not
    yield "cmyk_of_others.jpg", with_color_transform(cmyk, None), "jpeg", "cmyk", 0, "cmyk: comes out black"
    # DALI scales 16 bits to 8, Pillow clips them
    yield "gray16.png", encoded(deep, "PNG"), "png", "gray16", 0, "gray16: comes out otherwise than in Pillow"
    yield "gray16.tiff", encoded(deep, "TIFF"), "tiff", "gray16", 0, "gray16: comes out otherwise than in Pillow"
    yield "float.tiff", encoded(gray.convert("F"), "TIFF"), "tiff", "float", 0, "float: comes out"
    yield "palette.png", encoded(rgb.quantize(16), "PNG"), "png", "palette", 0, ""
    yield "alpha.png", encoded(rgb.convert("RGBA"), "PNG"), "png", "rgba", 0, ""
    yield "gray_alpha.png", encoded(rgb.convert("LA"), "PNG"), "png", "gray+alpha", 0, ""
    yield "bilevel.png", encoded(rgb.convert("1"), "PNG"), "png", "bilevel", 0, ""
    for value in range(2, 9):
        yield f"exif{value}.jpg", encoded(rgb, exif=oriented(value)), "jpeg", "rgb", value, ""
    yield "exif.webp", encoded(rgb, "WEBP", exif=oriented(6)), "webp", "rgb", 6, ""
    yield "exif.png", encoded(rgb, "PNG", exif=oriented(6)), "png", "rgb", 6, ""
    for kind, name in (("PNG", "png"), ("WEBP", "webp"), ("BMP", "bmp"), ("TIFF", "tiff"), ("PPM", "pnm"),
                       ("JPEG2000", "jpeg2000")):  # fmt: skip
        yield f"{name}_named.jpg", encoded(rgb, kind), name, "rgb", 0, ""
    # what a camera appends to its photo, and a thumbnail, do not matter
    yield "video_behind.jpg", encoded(rgb) + np.random.default_rng(1).bytes(200_000), "jpeg", "rgb", 0, ""


def in_folder(folder: Path, contents: dict[str, bytes]) -> list[str]:
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [str(folder / name) for name in contents]


def judged(folder: Path, contents: dict[str, bytes], decode: bool = True) -> dict[str, Verdict]:
    return dict(zip(contents, examine(in_folder(folder, contents), 2, decode), strict=True))


def pillows(content: bytes) -> tuple[int, int] | None:
    """Width and height; None where Pillow does not decode it."""
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return None
    return image.size


@pytest.mark.parametrize("decode", [True, False])
def test_what_decodes_is_told_by_its_content(tmp_path: Path, decode: bool) -> None:
    files = {name: (content, *told) for name, content, *told in good_files()}
    verdicts = judged(tmp_path, {name: content for name, (content, *_) in files.items()}, decode)
    for name, (content, kind, color, orientation, note) in files.items():
        verdict = verdicts[name]
        assert (verdict.width, verdict.height) == pillows(content) == (130, 90)
        assert (verdict.format, verdict.color, verdict.orientation, verdict.reason) == (kind, color, orientation, "")
        told = note and (decode or note.startswith(ON_GPU))  # the latter by its header
        assert verdict.note.startswith(note) if told else verdict.note == "", name
        assert verdict.checksum == int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_thin_images_decode(tmp_path: Path, size: tuple[int, int]) -> None:
    (verdict,) = judged(tmp_path, {"thin.jpg": encoded(photo().resize(size))}).values()
    assert (verdict.width, verdict.height, verdict.reason) == (*size, "")


@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG", "WEBP", "BMP", "TIFF"])
def test_a_file_that_was_cut_does_not_decode(tmp_path: Path, kind: str) -> None:
    whole = encoded(photo(), progressive=True) if kind == "progressive" else encoded(photo(), kind)
    cuts = [*(len(whole) * n // 10 for n in range(1, 10)), len(whole) - 20, len(whole) - 1]
    contents = {str(cut): whole[:cut] for cut in cuts}
    by_header = judged(tmp_path, contents, decode=False)
    for cut, verdict in judged(tmp_path, contents).items():
        # Pillow does not need the last chunk of a PNG; DALI fills up the last pixels of a BMP, as Pillow the last one
        apart = {"PNG": cuts[-2:], "BMP": cuts[-2:-1]}.get(kind, [])
        assert (verdict.reason == "") == (kind == "BMP" and int(cut) >= cuts[-2])
        assert (pillows(contents[cut]) is None) == ((verdict.reason != "") != (int(cut) in apart)), cut
        if kind != "TIFF":  # has its directory at the end or anywhere
            assert by_header[cut].reason.startswith("truncated")
            assert verdict.reason in ("", by_header[cut].reason)
        else:
            assert verdict.reason.startswith("DALI does not decode it (")


def test_what_does_not_decode_is_told_why(tmp_path: Path) -> None:
    rgb = photo()
    expected = {
        "empty.jpg": (b"", "empty file"),
        "zeros.jpg": (bytes(1000), "not an image of a known format"),
        "text.jpg": (b"not an image", "not an image of a known format"),
        "random.jpg": (np.random.default_rng(0).bytes(3000), "not an image of a known format"),
        "magic.jpg": (b"\xff\xd8\xff", "truncated: no end marker"),
        "markers.jpg": (encoded(rgb)[:20] + bytes(500) + encoded(rgb)[-400:], "header not understood; DALI does not"),
        "huge.jpg": (with_jpeg_size(encoded(rgb), 65535, 65535), "65535 x 65535 pixels by its header, more than 268,4"),
        "huge.png": (with_png_size(encoded(rgb, "PNG"), 65535, 65535), "65535 x 65535 pixels by its header, more"),
        "gif.jpg": (encoded(rgb, "GIF"), "DALI does not decode gif"),
        "avif.jpg": (encoded(rgb, "AVIF"), "DALI does not decode avif"),
    }
    contents = {name: content for name, (content, _) in expected.items()}
    verdicts = judged(tmp_path, contents)
    for name, (content, reason) in expected.items():
        assert verdicts[name].reason.startswith(reason), (name, verdicts[name])
        assert "\n" not in verdicts[name].reason
        decodes_in_pillow = name in ("gif.jpg", "avif.jpg")
        assert (pillows(content) is not None) == decodes_in_pillow
    assert verdicts["huge.jpg"].width == verdicts["huge.png"].height == 65535
    assert all(verdict.reason for verdict in judged(tmp_path, contents, decode=False).values())


def test_what_cannot_be_read_is_told_in_the_words_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jpg")
    expected = {
        "gone.jpg": "no such file or directory",
        "dangling.jpg": "no such file or directory",
        "folder.jpg": "is a directory",
        "pipe.jpg": "no regular file",
    }
    verdicts = list(examine([str(tmp_path / name) for name in expected], 1))
    assert verdicts == [Verdict(reason=reason) for reason in expected.values()]


def test_a_file_that_may_not_be_read(tmp_path: Path, unprivileged: Callable[..., Done]) -> None:
    (path,) = in_folder(tmp_path, {"secret.jpg": encoded(photo())})
    Path(path).chmod(0)
    script = tmp_path / "main.py"
    script.write_text(
        "from bandsplit.data.check import examine\n"
        f"if __name__ == '__main__':\n    print([verdict.reason for verdict in examine([{path!r}], 1)])\n"
    )
    done = unprivileged(script)
    assert done.stdout == "['permission denied']\n", done.stderr


def test_any_name(tmp_path: Path) -> None:
    names = [" a b ", "quote'\"", "line\nbreak", "gr\udcfcn", "grün", "#", "-x"]
    verdicts = judged(tmp_path, dict.fromkeys(names, encoded(photo())))
    assert [verdict.reason for verdict in verdicts.values()] == [""] * len(names)


@pytest.mark.parametrize("processes", [1, 3])
def test_one_verdict_for_each_path_in_their_order(tmp_path: Path, processes: int) -> None:
    """Several chunks, more or fewer than processes; taken from the paths only as they are needed."""
    contents = {f"{n:03d}.jpg": b"" if n % 9 == 4 else encoded(photo().resize((n + 1, 3))) for n in range(200)}
    taken = 0

    def paths() -> Iterator[str]:
        nonlocal taken
        for path in in_folder(tmp_path, contents):
            taken += 1
            yield path

    verdicts = examine(paths(), processes)
    first = [next(verdicts)]
    assert taken <= processes * 64 * 2
    for n, verdict in enumerate([*first, *verdicts]):
        assert verdict.width == (0 if n % 9 == 4 else n + 1)
        assert verdict.reason == ("empty file" if n % 9 == 4 else "")


def test_nothing_to_examine() -> None:
    assert list(examine([], 2)) == []


# ---------------------------------------------------------------------- processes that end or hang

CRASHES, HANGS = b"-- crashes --", b"-- hangs --"


def work_with_traps(pipe: Any, decode: bool) -> None:
    """`check._work` with a decoder that does not survive some files, decoded together with others or alone."""
    run = check._Decoder._run

    def trapped(decoder: check._Decoder, graph: str, contents: list[bytes]) -> Any:
        if any(content.endswith(CRASHES) for content in contents):
            os.kill(os.getpid(), signal.SIGSEGV)
        while any(content.endswith(HANGS) for content in contents):
            time.sleep(1)
        return run(decoder, graph, contents)

    check._Decoder._run = trapped  # type: ignore[method-assign, assignment]
    _work(pipe, decode)


_work = check._work


@pytest.mark.slow
def test_a_crash_and_a_hang_cost_one_file_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where two crash one after the other, at the first and at the last place."""
    good = encoded(photo())
    ends = {0: CRASHES, 17: CRASHES, 18: CRASHES, 40: HANGS, 63: CRASHES, 70: CRASHES, 99: HANGS}
    contents = {f"{n:02d}.jpg": good + ends.get(n, b"") for n in range(100)}
    monkeypatch.setattr(check, "_work", work_with_traps)
    monkeypatch.setattr(check, "_TIME_LIMIT", 1.0)
    verdicts = list(judged(tmp_path, contents).values())
    reasons = {CRASHES: "the decoder crashed (SIGSEGV)", HANGS: "the decoder did not end in 1 s", b"": ""}
    assert [verdict.reason for verdict in verdicts] == [reasons[ends.get(n, b"")] for n in range(100)]


def work_killed_once(pipe: Any, decode: bool) -> None:
    """`check._work` that is killed from outside while it decodes, the first time that one is started."""
    once = Path(os.environ["KILLED_ONCE"])
    if not once.exists():
        once.touch()
        check._Decoder._run = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    _work(pipe, decode)


def test_a_process_that_is_killed_from_outside_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILLED_ONCE", str(tmp_path / "killed"))
    monkeypatch.setattr(check, "_work", work_killed_once)
    verdicts = judged(tmp_path, {f"{n}.jpg": encoded(photo()) for n in range(5)})
    assert (tmp_path / "killed").exists()
    assert [verdict.reason for verdict in verdicts.values()] == [""] * 5


def work_not_at_all(pipe: Any, decode: bool) -> None:
    raise SystemExit(3)


def test_processes_that_cannot_start_end_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_work", work_not_at_all)
    with pytest.raises(RuntimeError, match="a process that examines images could not start"):
        list(examine(["x"], 1))


def test_awkward_files_beside_pillow() -> None:
    folder = REPOSITORY.parent / "shared/data/awkward"
    if not folder.is_dir():
        pytest.skip("no folder of awkward files beside the repository")
    with (folder / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    verdicts = examine([str(folder / row["file"]) for row in rows], 2)
    # its data are damaged, which libjpeg mends, with a warning; Pillow refuses it for that
    apart = {"fuzz_corrupt__20.jpg"}
    for row, verdict in zip(rows, verdicts, strict=True):
        assert (verdict.reason == "") == ((row["pillow"] == "ok") != (row["file"] in apart)), row
        if row["pillow"] == "ok":
            assert (verdict.width, verdict.height) == (int(row["width"]), int(row["height"]))
            assert (verdict.format, verdict.orientation) == (row["format"], int(row["exif_orientation"]))
