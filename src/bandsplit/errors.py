"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A user's mistake: one message that names the file, key or folder, what was given and what is allowed.

    Entry points print the message without a traceback and exit with code 2.
    """

    one_rank = False
    """Whether a single rank met the mistake, so that it has to tell it itself."""
