"""Exceptions that entry points report without a traceback."""


class UserError(ValueError):
    """A user's mistake. The message names the file, key or folder, the value given and what is allowed.

    Entry points print the message without a traceback and exit with code 2.
    """

    one_rank = False
    """Whether this rank prints the message even if it is not rank 0, because the other ranks do not have the error."""


class ReportedElsewhere(Exception):
    """This rank exits because another rank failed; that rank reports the error."""


class Interrupted(Exception):
    """A signal stopped the run. Its last checkpoint includes every step so far."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal
