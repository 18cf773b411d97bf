"""Make class folders from the archives that data sets come in, or from flat folders."""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path
from typing import Any

from bandsplit.cli import options
from bandsplit.cpus import available_cpus
from bandsplit.errors import UserError

KEEPS = "An interrupted run is continued by the same command. Nothing is ever written outside of --to."

EXAMPLES = """
bandsplit data prepare imagenet1k --archives /data/archives --to /data/imagenet
bandsplit data prepare tiny-imagenet --archives tiny-imagenet-200.zip --to /data/tiny
bandsplit data prepare flat --from images --list labels.csv --to /data/own
bandsplit data prepare split --from /data/own --to /data/own_split --fraction 0.1
"""


def add(commands: Any) -> None:
    """Adds `prepare` and its own commands."""
    about = "make class folders from archives or flat folders"
    parser = commands.add_parser("prepare", help=about, **options.texts(f"{__doc__} {KEEPS}", EXAMPLES))
    whats = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for add_one in (_imagenet1k, _imagenet21k, _tiny_imagenet, _flat, _split):
        add_one(whats)


def _imagenet1k(whats: Any) -> None:
    about = "train/, val/, dev/ (the devkit) and meta.bin from the three archives of ILSVRC 2012"
    parser = _parser(whats, "imagenet1k", about, _run_imagenet1k)
    _add_archives(parser, "folder of ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, ILSVRC2012_devkit_t12.tar.gz")
    _add_threads(parser)
    parser.add_argument(
        "--parts", nargs="+", choices=["train", "val"], default=["train", "val"], help="default: train val"
    )


def _run_imagenet1k(arguments: argparse.Namespace) -> None:
    from bandsplit.data.prepare import imagenet1k

    print(
        imagenet1k.prepare(
            arguments.archives, arguments.to, arguments.parts, not arguments.skip_checksum, arguments.threads
        )
    )


def _imagenet21k(whats: Any) -> None:
    about = "train/ and val/ from winter21_whole.tar.gz or fall11_whole.tar, without the classes that have few images"
    parser = _parser(whats, "imagenet21k", about, _run_imagenet21k)
    _add_archives(parser, "the archive, or its folder")
    _add_threads(parser)
    parser.add_argument("--release", choices=["winter21", "fall11"], help="default: by the name of the archive")
    parser.add_argument(
        "--min-images", type=options.count, default=500, help="leave classes with fewer images out (default: 500)"
    )
    parser.add_argument(
        "--val-images", type=options.count, default=50, help="images of each class for val/ (default: 50)"
    )
    _add_seed(parser)


def _run_imagenet21k(arguments: argparse.Namespace) -> None:
    if arguments.val_images >= arguments.min_images:
        raise UserError(f"--val-images: {arguments.val_images} given, expected less than --min-images")
    from bandsplit.data.prepare import imagenet21k

    print(
        imagenet21k.prepare(
            arguments.archives,
            arguments.to,
            arguments.release,
            min_images=arguments.min_images,
            val_images=arguments.val_images,
            seed=arguments.seed,
            checksum=not arguments.skip_checksum,
            threads=arguments.threads,
        )
    )


def _tiny_imagenet(whats: Any) -> None:
    about = "train/ and val/ from tiny-imagenet-200.zip, or from the folder that was unpacked from it"
    parser = _parser(whats, "tiny-imagenet", about, _run_tiny_imagenet)
    _add_archives(parser, "the zip file, the unpacked folder, or the folder of either")


def _run_tiny_imagenet(arguments: argparse.Namespace) -> None:
    from bandsplit.data.prepare import tiny_imagenet

    print(tiny_imagenet.prepare(arguments.archives, arguments.to, not arguments.skip_checksum))


def _flat(whats: Any) -> None:
    about = "class folders from a folder of images and a list of their labels"
    parser = _parser(whats, "flat", about, _run_flat)
    _add_from(parser, "folder of the images")
    parser.add_argument(
        "--list", type=Path, required=True, help="a line an image: name and label; CSV, or separated by tabs or blanks"
    )
    parser.add_argument("--classes", type=Path, help="name of each class a line, where the labels are numbers from 0")


def _run_flat(arguments: argparse.Namespace) -> None:
    from bandsplit.data.prepare import flat

    print(flat.prepare(arguments.source, arguments.list, arguments.to, arguments.classes, arguments.link))


def _split(whats: Any) -> None:
    about = "train/ and val/ from class folders without a validation part"
    parser = _parser(whats, "split", about, _run_split)
    _add_from(parser, "folder with one folder per class, or with train/")
    share = parser.add_mutually_exclusive_group(required=True)
    share.add_argument("--fraction", type=_fraction, help="share of each class for val/, such as 0.1")
    share.add_argument("--count", type=options.count, help="images of each class for val/")
    _add_seed(parser)


def _run_split(arguments: argparse.Namespace) -> None:
    from bandsplit.data.prepare import split

    share = arguments.count if arguments.fraction is None else arguments.fraction
    print(split.prepare(arguments.source, arguments.to, share, arguments.seed, arguments.link))


# ------------------------------------------------------------------------------------------------------------- options


def _parser(whats: Any, name: str, about: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = whats.add_parser(name, help=about, description=f"{about}. {KEEPS}")
    parser.set_defaults(run=run)
    parser.add_argument("--to", type=Path, required=True, help="a new or empty folder")
    return parser


def _add_archives(parser: argparse.ArgumentParser, about: str) -> None:
    parser.add_argument("--archives", type=Path, required=True, help=about)
    parser.add_argument(
        "--skip-checksum", action="store_true", help="do not compare the archives with the published checksums"
    )


def _add_threads(parser: argparse.ArgumentParser) -> None:
    cpus = min(8, available_cpus())
    parser.add_argument(
        "--threads", type=options.count, default=cpus, help=f"classes that are unpacked at a time (default: {cpus})"
    )


def _add_from(parser: argparse.ArgumentParser, about: str) -> None:
    parser.add_argument("--from", dest="source", type=Path, required=True, help=f"{about}; it is not changed")
    parser.add_argument(
        "--link",
        choices=["hard", "symbolic", "copy"],
        default="hard",
        help="what the images in --to are: hard links (default; symbolic ones where there can be none), symbolic links "
        "or copies",
    )


def _add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=options.seed, default=0, help="chooses the images for val/ (default: 0)")


def _fraction(text: str) -> Fraction:
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} given, expected a number between 0 and 1")
    return value
