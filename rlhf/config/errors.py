"""The errors that a user's input can cause; `rlhf.cli` prints their message without a traceback."""


class InputError(ValueError):
    """Bad input from the user; the message: what was given, what was expected, how to fix it."""


class MissingValues(InputError):
    """Values that have no default and were not given."""
