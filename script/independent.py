"""Evaluates a run again with torch, torchvision, Pillow and SciPy alone, and none of this project's code.

    python script/independent.py RUN [--checkpoint last | STEP] [--root IMAGES] [--predictions FILE.npz]

Covers ResNets without tweaks, of one kind in all branches, on class folders of images. With --predictions, the file
that src/evaluate.py --save wrote, takes their checkpoint, and also compares the logits, image by image.
"""

from __future__ import annotations

import argparse
import json
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dct, dctn
from scipy.special import log_softmax
from torch import nn


def network(model: dict[str, Any], channels: int, classes: int) -> nn.Module:
    """torchvision's ResNet, with this width, stem and number of input channels; weights are random."""
    net = getattr(torchvision.models, model["arch"])(num_classes=classes)

    def scaled(count: int) -> int:
        return max(8, round(count * model["width"] / 8) * 8)

    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Conv2d):
            shape = {key: getattr(module, key) for key in ("kernel_size", "stride", "padding")}
            inputs = channels if name == "conv1" else scaled(module.in_channels)
            if name == "conv1" and model["stem"] != "standard":
                shape["stride"] = 1
            if name == "conv1" and model["stem"] == "small":
                shape |= {"kernel_size": 3, "padding": 1}
            net.set_submodule(name, nn.Conv2d(inputs, scaled(module.out_channels), bias=False, **shape))
        elif isinstance(module, nn.BatchNorm2d):
            net.set_submodule(name, nn.BatchNorm2d(scaled(module.num_features)))
        elif isinstance(module, nn.Linear):
            net.set_submodule(name, nn.Linear(scaled(module.in_features), classes))
    if model["stem"] == "small":
        net.maxpool = nn.Identity()
    return net


@dataclass(frozen=True)
class Run:
    """A run at one of its checkpoints."""

    step: int
    data: dict[str, Any]
    split: dict[str, Any]
    groups: list[list[int]]
    """The bands of each branch."""
    networks: list[nn.Module]

    @classmethod
    def read(cls, run_dir: Path, checkpoint: str) -> Run:
        """`checkpoint`: "last" or a step. The EMA of the weights is used if there is one."""
        config = tomllib.loads((run_dir / "config.toml").read_text())
        steps = sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_????????"))
        step = steps[-1] if checkpoint == "last" else int(checkpoint)
        folder = run_dir / f"checkpoints/step_{step:08d}"
        classes = len(torch.load(folder / "run.pt", weights_only=True)["classes"])
        groups, networks = groups_of(config["split"]), []
        for number, bands in enumerate(groups):
            state = torch.load(folder / f"branch_{number:02d}.pt", map_location="cpu", weights_only=True)
            networks.append(network(config["model"], 3 * len(bands), classes))
            networks[-1].load_state_dict(state.get("ema", state["network"]))
            networks[-1].eval()
        return cls(step, config["data"], config["split"], groups, networks)


def prepared(path: Path, data: dict[str, Any]) -> NDArray[np.uint8]:
    """An image (size, size, 3): its shorter side resized, cropped at the center.

    As DALI does, rounds the longer side to the nearest integer, where torchvision rounds down, and the place of the
    crop half up.
    """
    size = data.get("val_image_size") or data["image_size"]
    with Image.open(path) as image:
        scale = data["resize_size"] / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        resampling = Image.Resampling[data["interpolation"].upper()]
        if white := {"F": 1, "I": 65535}.get(image.mode[0]):  # floating point, or 16 bits: convert would clip it
            image = Image.fromarray((np.clip(image, 0, white) * (255 / white) + 0.5).astype(np.uint8))
        resized = image.convert("RGB").resize((width, height), resampling)
    left, top = ((side - size + 1) // 2 for side in (width, height))
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def bands_of(image: NDArray[np.uint8], data: dict[str, Any], split: dict[str, Any]) -> NDArray[np.float64]:
    """An image (H, W, 3) of 0 … 255 -> all bands (N, 3, H/s, W/s)."""
    s = split["block"]
    x = (image.astype(np.float64) - data["mean"]) / data["std"]
    blocks = x.reshape(x.shape[0] // s, s, x.shape[1] // s, s, 3).transpose(0, 2, 4, 1, 3)  # (h, w, 3, s, s)
    norm = "ortho" if split["norm"] == "ortho" else None
    if split["transform"] == "dct2d":
        blocks = dctn(blocks, axes=(-2, -1), norm=norm)
    elif split["transform"] == "dct1d":
        blocks = dct(blocks.reshape(*blocks.shape[:3], -1), norm=norm)
    elif split["transform"] != "identity":
        raise SystemExit(f"transform {split['transform']!r}: not covered")
    bands = blocks.reshape(*blocks.shape[:3], -1).transpose(3, 2, 0, 1)
    if split["scale"]:
        bands = bands / np.array(split["sigma"])[:, None, None, None] ** split["scale"]
    return bands


def groups_of(split: dict[str, Any]) -> list[list[int]]:
    """The bands of each branch."""
    every = list(range(split["block"] ** 2))
    branches = split["branches"]
    groups = [[k] for k in every] if branches == "each" else [every] if branches == "all" else branches
    return [groups[k] for k in split.get("only", range(len(groups)))]


@torch.inference_mode()
def logits_of(run: Run, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Images (size, size, 3) each -> logits (images, branches, classes)."""
    bands = torch.from_numpy(np.stack([bands_of(image, run.data, run.split) for image in images])).float()
    each = [
        net(bands[:, group].flatten(1, 2))  # (B, 3·bands, h, w)
        for net, group in zip(run.networks, run.groups, strict=True)
    ]
    return torch.stack(each, dim=1).numpy()


def evaluated(run: Run, images: Sequence[NDArray[np.uint8]], labels: NDArray[np.int64]) -> dict[str, Any]:
    return {"step": run.step, **measures(logits_of(run, images), labels)}


def measures(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> dict[str, Any]:
    """Logits (N, branches, classes), fused by their mean -> accuracies in percent, and mean cross-entropy."""
    fused = logits.astype(np.float64).mean(1)
    order = np.argsort(-fused, axis=1, kind="stable")
    right = order == labels[:, None]
    return {
        "images": len(labels),
        "loss": float(-log_softmax(fused, axis=1)[np.arange(len(labels)), labels].mean()),
        "top1": 100 * int(right[:, 0].sum()) / len(labels),
        "top5": 100 * int(right[:, :5].sum()) / len(labels),
        "branch_top1": [100 * int(n) / len(labels) for n in (logits.argmax(-1) == labels[:, None]).sum(0)],
    }


def step_of(predictions: Path) -> str:
    """The step of the checkpoint that these are of."""
    with np.load(predictions) as saved:
        steps = {branch["step"] for branch in json.loads(str(saved["about"]))["branches"]}
    if len(steps) > 1:
        raise SystemExit(f"{predictions}: branches of several checkpoints: not covered")
    return str(steps.pop())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--checkpoint", help="last or a step (default: that of the predictions; without them, last)")
    parser.add_argument("--root", type=Path, help="folder of the validation images (default: as in config.toml)")
    parser.add_argument("--predictions", type=Path, metavar="FILE.npz", help="compare with these, image by image")
    arguments = parser.parse_args()
    saved_at = step_of(arguments.predictions) if arguments.predictions else "last"
    run = Run.read(arguments.run, arguments.checkpoint or saved_at)
    root = arguments.root or Path(os.path.expandvars(run.data["root"])) / run.data["val"]
    classes = sorted(path.name for path in root.iterdir() if path.is_dir())
    files = [(path, label) for label, name in enumerate(classes) for path in sorted((root / name).rglob("*.*"))]
    labels, logits = np.array([label for _, label in files]), []
    for first in range(0, len(files), 64):
        logits.append(logits_of(run, [prepared(path, run.data) for path, _ in files[first : first + 64]]))
    own = np.concatenate(logits)
    print(json.dumps({"step": run.step, **measures(own, labels)}, indent=2))

    if arguments.predictions:
        with np.load(arguments.predictions) as saved:
            place = {os.fsdecode(bytes(name)): i for i, name in enumerate(saved["names"])}
            rows = [place[str(path.relative_to(root))] for path, _ in files]
            theirs = saved["logits"][rows].astype(np.float32)
        own -= own.max(-1, keepdims=True)  # as they are saved
        pairs = [(own.mean(1), theirs.mean(1)), *((own[:, k], theirs[:, k]) for k in range(len(run.groups)))]
        unlike = [int((a.argmax(-1) != b.argmax(-1)).sum()) for a, b in pairs]
        print(f"images with another top-1: {unlike[0]} fused; {unlike[1:]} by branch")
        print(
            f"logits differ by {np.abs(own - theirs).mean():.2g} on average, {np.abs(own - theirs).max():.2g} at most"
        )


if __name__ == "__main__":
    main()
