"""What the entry points share: a user's mistake ends with one message and exit code 2."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial

from bandsplit.errors import Interrupted, ToldElsewhere, UserError


def run(main: Callable[[], None]) -> None:
    """Calls `main` and turns how it ends into a message and an exit code.

    UserError: its message and 2; Ctrl-C: 130; another rank's error: 1, without a word; a run stopped by a signal: 128
    + signal, or 0 under torchrun, which would take anything else for a failure and start again.  Every other error has
    its traceback on the terminal.  Under torchrun every rank meets the same user's mistake, and rank 0 speaks for all,
    unless one rank alone met it.
    """
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    attempt: Callable[[], UserError | Interrupted | ToldElsewhere | None] = partial(_attempt, main)
    if under_torchrun:
        from torch.distributed.elastic.multiprocessing.errors import record

        attempt = record(attempt)
    try:
        ended = attempt()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    if isinstance(ended, UserError):
        if ended.one_rank or os.environ.get("RANK", "0") == "0":
            print(f"error: {ended}", file=sys.stderr)
        elif under_torchrun:
            _let_another_speak(20)
        sys.exit(2)
    if isinstance(ended, Interrupted):
        sys.exit(0 if under_torchrun else 128 + ended.signal)
    if isinstance(ended, ToldElsewhere):
        if under_torchrun:
            _let_another_speak(5)
        sys.exit(1)


def _let_another_speak(seconds: float) -> None:
    """torchrun ends all ranks when the first one has ended: that has to be the one that tells why."""
    time.sleep(seconds)


def _attempt(main: Callable[[], None]) -> UserError | Interrupted | ToldElsewhere | None:
    try:
        main()
    except (UserError, Interrupted, ToldElsewhere) as ended:
        return ended
    return None
