"""Error handling and exit codes, shared by all entry points."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from functools import partial

from bandsplit.errors import Interrupted, ReportedElsewhere, UserError


def run(main: Callable[[], None]) -> None:
    """Calls `main` and exits with a code that says how it ended.

    - UserError: 2, after printing its message. Under torchrun only rank 0 prints, unless the error is `one_rank`.
    - Ctrl-C: 130.
    - An error that another rank reports: 1, nothing printed.
    - A run stopped by a signal: 128 + signal; under torchrun 0, since torchrun restarts on any other code.
    - Output that nobody reads any more, as with `| head`: 141 (128 + SIGPIPE), nothing printed.
    - Any other exception is raised, so that Python prints its traceback.
    """
    _sleep_soon()
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    attempt: Callable[[], UserError | Interrupted | ReportedElsewhere | None] = partial(_attempt, main)
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
            _wait_for_report(20)
        sys.exit(2)
    if isinstance(ended, Interrupted):
        sys.exit(0 if under_torchrun else 128 + ended.signal)
    if isinstance(ended, ReportedElsewhere):
        if under_torchrun:
            _wait_for_report(5)
        sys.exit(1)


def _sleep_soon() -> None:
    """Lets torch's threads on a CPU sleep when they have waited for each other for a moment; call it before torch.

    By default they spin for milliseconds. Where another program needs a core, they spin for whole turns of it, and
    training was 50 times slower. Without any spinning it is half as fast where nothing else runs (doc/results.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _wait_for_report(seconds: float) -> None:
    """Delays the exit: torchrun kills all ranks once one has exited, so the rank that reports must exit first."""
    time.sleep(seconds)


def _attempt(main: Callable[[], None]) -> UserError | Interrupted | ReportedElsewhere | None:
    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except (UserError, Interrupted, ReportedElsewhere) as ended:
        return ended
    except BrokenPipeError:
        if _stdout_is_read():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return Interrupted(signal.SIGPIPE)
    return None


def _stdout_is_read() -> bool:
    """Whether what is printed still has a reader; `| head` ends when it has read enough."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return not any(event & select.POLLERR for _, event in poll.poll(0))
