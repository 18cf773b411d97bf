"""Exceptions that mean "the user can mend this", or that somebody else has already told the user."""


class UserError(ValueError):
    """A user's mistake: one message that names the file, key or folder, what was given and what is allowed.

    Entry points print the message without a traceback and exit with code 2.
    """

    one_rank = False
    """Whether a single rank met the mistake, so that it has to tell it itself."""


class ToldElsewhere(Exception):
    """This rank ends because of another one, which tells the user why."""


class Interrupted(Exception):
    """The run was asked to stop by a signal, and has: all that it did is in its last checkpoint."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal
