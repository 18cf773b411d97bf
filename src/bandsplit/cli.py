"""What the entry points share: a user's mistake ends with one message and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from bandsplit.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Calls `main`; UserError becomes a message on stderr and exit code 2, Ctrl-C exit code 130.

    Under torchrun every rank meets the same mistake, and rank 0 speaks for all, unless one rank alone met it.
    """
    try:
        main()
    except UserError as error:
        if error.one_rank or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
