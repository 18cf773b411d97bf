"""Prebuild the DALI operator, for example on a login node: python -m bandsplit.spectral.native [--cuda]."""

import argparse
import sys

from bandsplit.spectral.native import BuildError, build


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bandsplit.spectral.native", description=__doc__)
    parser.add_argument(
        "--cuda",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="build with or without the GPU kernel (default: with it if a GPU and nvcc are found)",
    )
    try:
        print(build(parser.parse_args().cuda))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
