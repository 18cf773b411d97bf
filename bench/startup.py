"""Start-up with many images: seconds and memory until the first batch is known, on rank 0 and on another rank.

Makes empty files in class folders (20 GB of inodes for 14.2 million), which are walked but not decoded, and opens them
as a training does, each time in a new process: first without an index, then with one, and as a rank that only reads it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import common

from bandsplit.cli import entry
from bandsplit.errors import UserError
from bandsplit.paths import writing_to

OPEN = """
import json, sys, time
began = time.perf_counter()
from pathlib import Path
import torch
import nvidia.dali
from bandsplit.config import loading
from bandsplit.data import images, index, loader
from bandsplit.data.order import TrainingOrder
from bandsplit.distributed.ranks import Ranks
def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 2**20
imported = time.perf_counter()
config = loading.load(sys.argv[1])
if sys.argv[2] == "rank 0":
    files = loader.open_data(config, Ranks(0, 1, 0, 1, torch.device("cpu")), ["train"])["train"]
else:
    root = Path(config.data.root)
    files = images.ImageFiles.of(index.read(index.place(root, "train", 0)), root / "train")
order = TrainingOrder(len(files), 256, seed=0, stream=3, streams=8)
names = [files.paths[i] for i in order.batch(0).tolist()]
print(json.dumps({
    "images": len(files), "imports_s": imported - began, "open_s": time.perf_counter() - imported,
    "peak_gib": memory("VmHWM"), "anonymous_gib": memory("RssAnon"),
}))
"""

CONFIG = """
[model]
arch = "resnet18"
[split]
[optim]
lr = 0.1
[train]
epochs = 1
batch_size = 256
[data]
name = "synthetic"
root = "{root}"
check = "off"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--images", type=common.count, default=1_281_167, help="number of files (default: ImageNet-1K's)"
    )
    parser.add_argument("--classes", type=common.count, default=1000, help="number of class folders (default: 1000)")
    parser.add_argument("--folder", type=Path, default=Path("data/startup"), help="where the files are made")
    parser.add_argument("--keep", action="store_true", help="keep the files")
    common.add_output(parser, "bench/results/startup.json")
    arguments = parser.parse_args()
    if arguments.images < arguments.classes:
        raise UserError(f"--images: {arguments.images} given, expected at least --classes = {arguments.classes}")
    if arguments.folder.exists():
        raise UserError(f"--folder: {arguments.folder} given, which already exists; allowed: a new folder")
    with ExitStack() as at_the_end:
        if not arguments.keep:
            at_the_end.callback(shutil.rmtree, arguments.folder, ignore_errors=True)
        began = time.perf_counter()
        with writing_to(arguments.folder):
            make(arguments.folder / "train", arguments.images, arguments.classes)
            (arguments.folder / "config.toml").write_text(CONFIG.format(root=arguments.folder.absolute()))
        print(f"{arguments.images:,} files made in {time.perf_counter() - began:,.0f} s")
        results = opened(arguments.folder / "config.toml")
    common.write(arguments.output, {"images": arguments.images, "classes": arguments.classes}, results)


def opened(config: Path) -> dict[str, Any]:
    """Seconds and memory of each way to open the images."""
    results = {}
    for name, role in (("no index", "rank 0"), ("index", "rank 0"), ("index, other rank", "rank 1")):
        done = subprocess.run([sys.executable, "-c", OPEN, config, role], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the images cannot be opened: {done.stderr.splitlines()[-1]}")
        results[name] = json.loads(done.stdout.splitlines()[-1])
        one = results[name]
        print(
            f"{name:<18} imports {one['imports_s']:5.1f} s  opened in {one['open_s']:6.1f} s  "
            f"memory {one['peak_gib']:5.2f} GiB, of which {one['anonymous_gib']:5.2f} GiB are not shared"
        )
    return results


def make(folder: Path, images: int, classes: int) -> None:
    for k in range(classes):
        name = f"n{k:08d}"
        (folder / name).mkdir(parents=True)
        within = os.open(folder / name, os.O_RDONLY)
        for i in range(k, images, classes):
            os.close(os.open(f"{name}_{i}.JPEG", os.O_CREAT | os.O_WRONLY, dir_fd=within))
        os.close(within)


if __name__ == "__main__":
    entry.run(main)
