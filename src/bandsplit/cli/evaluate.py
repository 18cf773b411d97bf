"""Validate a checkpoint, or the ensemble of several runs' branches: torchrun src/evaluate.py RUN [RUN …]"""

from __future__ import annotations

import argparse
from pathlib import Path

from bandsplit.cli import options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="+", help="run directory; several runs form one ensemble")
    parser.add_argument("--checkpoint", default="best", help="best, last or a step number (default: best)")
    parser.add_argument(
        "--data", type=Path, metavar="CONFIG", help="data config of other validation images, prepared as the run's"
    )
    options.add_set(parser)
    parser.add_argument(
        "--fit-fusion",
        action="store_true",
        help="fit the weights of the branches on the run's held-out images (data.holdout), and keep them beside the "
        "checkpoint",
    )
    parser.add_argument(
        "--fusion",
        choices=["mean", "rank", "learned", "temperature", "drop"],
        help="how the ensemble's logits are fused; all but mean must have been fitted (default: fusion.method of the "
        "config)",
    )
    parser.add_argument(
        "--cascade",
        type=options.percent,
        metavar="POINTS",
        help="evaluate branch by branch, until an image is certain enough to lose at most so many points of top-1; "
        "fitted with --fit-fusion",
    )
    crops = parser.add_mutually_exclusive_group()
    crops.add_argument(
        "--flip", action="store_const", dest="crops", const="flip", help="average over the image and its mirror image"
    )
    crops.add_argument(
        "--ten-crop",
        action="store_const",
        dest="crops",
        const="ten",
        help="average over the center, the four corners and their mirror images",
    )
    parser.add_argument(
        "--corrupt",
        nargs="?",
        const="all",
        metavar="KIND,…",
        help="also evaluate corrupted images, with five strengths of noise, blur, brightness, contrast and jpeg, or of "
        "those that are named; with --output, writes a table and a figure beside it",
    )
    parser.add_argument("--latency", action="store_true", help="also measure images per second, and ms for one image")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    parser.add_argument(
        "--save",
        type=Path,
        metavar="FILE.npz",
        help="save the predictions for every image, fused and of every branch; report.py draws them",
    )
    parser.add_argument(
        "--save-sample",
        type=options.count,
        metavar="COUNT",
        help="with --save: only so many images, drawn by the run's seed",
    )
    parser.add_argument(
        "--save-fused",
        action="store_true",
        help="with --save: only the five likeliest classes of each image, without the logits of the branches",
    )
    arguments = parser.parse_args()
    for option in ("save_sample", "save_fused"):
        if getattr(arguments, option) and not arguments.save:
            parser.error(f"--{option.replace('_', '-')} needs --save")

    from bandsplit.distributed.ranks import rank
    from bandsplit.evaluation.predictions import Save
    from bandsplit.evaluation.runs import Request, evaluate_runs
    from bandsplit.reporting import corruption

    evaluate_runs(
        Request(
            arguments.run,
            arguments.checkpoint,
            arguments.set,
            arguments.fusion,
            arguments.fit_fusion,
            arguments.crops or "center",
            arguments.output,
            arguments.save and Save(arguments.save, arguments.save_sample, arguments.save_fused),
            arguments.cascade,
            arguments.data,
            arguments.corrupt,
            arguments.latency,
        )
    )
    if arguments.corrupt and arguments.output and rank() == 0:
        corruption.write(arguments.output)
