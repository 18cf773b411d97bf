"""Build the DALI operator ahead of its first use, on a login node say: python -m bandsplit.spectral.native [--cuda]."""

import argparse
import sys

from bandsplit.spectral.native import BuildError, build


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bandsplit.spectral.native", description=__doc__)
    parser.add_argument(
        "--cuda",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="with or without the GPU kernel; by default with it where a GPU and nvcc are found",
    )
    try:
        print(build(parser.parse_args().cuda))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
