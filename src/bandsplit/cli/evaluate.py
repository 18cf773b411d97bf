"""Validate a checkpoint, or the ensemble of several runs' branches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bandsplit.cli import options

EXAMPLES = """
bandsplit evaluate runs/demo-seed0
bandsplit evaluate runs/demo-seed0 --checkpoint last --ten-crop --output result.json
bandsplit evaluate runs/demo-branches0,1 runs/demo-branches2,3      one ensemble from two runs
torchrun --nproc-per-node 8 -m bandsplit evaluate runs/resnet34_sub16-seed0
"""


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = options.parser(prog, __doc__, EXAMPLES)
    parser.add_argument(
        "run", type=Path, nargs="+", metavar="RUN", help="run directory; several runs form one ensemble"
    )
    parser.add_argument("--checkpoint", default="best", help="best, last or a step number (default: best)")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="CONFIG",
        help=f"data config of other validation images, prepared as the run's: {options.FILE_OR_NAME}",
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
        help="evaluate one branch after another and stop once the prediction is confident enough; POINTS is the "
        "largest loss of top-1 in percentage points; fitted with --fit-fusion",
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
        help="save the predictions for every image, fused and of every branch; `bandsplit report` draws them",
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
    given = parser.parse_args(arguments)
    for option in ("save_sample", "save_fused"):
        if getattr(given, option) and not given.save:
            parser.error(f"--{option.replace('_', '-')} needs --save")

    from bandsplit.distributed.ranks import rank
    from bandsplit.evaluation.predictions import Save
    from bandsplit.evaluation.runs import Request, evaluate_runs
    from bandsplit.reporting import corruption

    evaluate_runs(
        Request(
            given.run,
            given.checkpoint,
            given.set,
            given.fusion,
            given.fit_fusion,
            given.crops or "center",
            given.output,
            given.save and Save(given.save, given.save_sample, given.save_fused),
            given.cascade,
            given.data,
            given.corrupt,
            given.latency,
        )
    )
    if given.corrupt and given.output and rank() == 0:
        corruption.write(given.output)
