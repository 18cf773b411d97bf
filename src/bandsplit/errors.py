"""Exceptions for what the user can fix, and for what another rank has already reported."""


class UserError(ValueError):
    """A user's mistake: one message that names the file, key or folder, what was given and what is allowed.

    Entry points print the message without a traceback and exit with code 2.
    """

    one_rank = False
    """Whether only this rank met the mistake, so that it has to report it."""


class ToldElsewhere(Exception):
    """This rank ends because of another one, which reports the reason."""


class Interrupted(Exception):
    """A signal has stopped the run, whose last checkpoint holds all of its steps."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal
