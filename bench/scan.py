"""Throughput of the scan (src/data.py scan) against decoding alone, with DALI's decoder on the same number of CPUs.

Decoding alone: one DALI pipeline that reads and decodes whole images with as many threads.  Both read the same files,
in the same order; the start of the scan's processes is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import common
from nvidia.dali import fn, pipeline_def, types

from bandsplit.cli import entry
from bandsplit.data import check

Subject = Callable[[], int]

_STEP = 64


def scan(files: list[Path], threads: int, decode: bool) -> Subject:
    verdicts = check.examine(cycle(map(str, files)), threads, decode)

    def step() -> int:
        return sum(not next(verdicts).reason for _ in range(_STEP))

    return step


def decoding(files: list[Path], threads: int) -> Subject:
    @pipeline_def(batch_size=_STEP, num_threads=threads, device_id=None, prefetch_queue_depth=2)
    def graph() -> Any:
        encoded, _ = fn.readers.file(files=[*map(str, files)])
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False)

    pipe = graph()
    pipe.build()
    return lambda: len(pipe.run()[0])


def main() -> None:
    parser = common.arguments(__doc__ or "", "bench/results/scan.json")
    parser.add_argument("--count", type=common.count, default=2048, help="number of different files (default: 2048)")
    arguments = parser.parse_args()
    files = common.jpeg_files(arguments.images, arguments.count)
    rates = common.interleaved(
        {
            "scan": scan(files, arguments.threads, decode=True),
            "decoding alone": decoding(files, arguments.threads),
        },
        arguments.rounds,
        seconds=4,
        pause=3,
        skip=16,
    )
    kilobytes = sum(file.stat().st_size for file in files) / len(files) / 1000
    common.print_table(f"{len(files):,} files of {kilobytes:.0f} kB on {arguments.threads} threads", rates, "scan")
    common.write(arguments.output, {"files": len(files), "kilobytes": kilobytes, "threads": arguments.threads}, rates)


if __name__ == "__main__":
    entry.run(main)
