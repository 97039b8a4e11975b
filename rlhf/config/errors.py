"""The errors that a user's input can cause, and helpers for their messages.

`rlhf.cli` and `rlhf.option_parser` print the message of an `InputError` without a traceback.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class InputError(ValueError):
    """Bad input from the user; the message: what was given, what was expected, how to fix it."""


class MissingValues(InputError):
    """Values that have no default and were not given."""


def refuse(problems: Sequence[str], missing: Sequence[str] = ()) -> None:
    """Raise one error for all problems and missing values, if there are any."""
    listed = ["missing values:\n  " + "\n  ".join(missing)] if missing else []
    if problems:
        raise InputError("\n".join(dict.fromkeys([*problems, *listed])))
    if missing:
        raise MissingValues(listed[0])


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean ...?` with the closest known names, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def show(value: Any) -> str:
    """Shorten a value for an error message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of too many digits; lists nested too deeply
        return f"a value that cannot be shown ({type(value).__name__})"
    return f"{text[:60]}... ({type(value).__name__})" if len(text) > 60 else text


def refused_file(error: OSError) -> str:
    """Say in one line what the system said about a file; raise an error that is of none again."""
    if error.filename is None:  # of a connection, or a pipe
        raise error
    return f"{str(error.filename)[:200]}: {error.strerror}"


def one_line(error: BaseException) -> str:
    """Describe an exception in one line: its type, and at most 400 characters of its text."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
