"""Values that a configuration takes from the environment, such as tokens: used, never written.

`${oc.env:TOKEN}` on the command line or in a YAML file is resolved for the stage. Everything that
the stage writes, prints or sends to a tracker shows `${oc.env:TOKEN}` instead of the value. The
environment belongs to the process, so the command line remembers these values here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

_REFERENCE = re.compile(r"\$\{oc\.env:\s*([A-Za-z_]\w*)")
SHORTEST = 6  # characters; a shorter value, such as "1" or "data", occurs in any text
_written: dict[str, tuple[str, Any]] = {}  # dotted key -> (as written, resolved)
_values: dict[str, str] = {}  # value of a variable -> its reference


def remember_references(written: Any, resolved: Any) -> None:
    """Remember which values come from the environment, given the command's configuration with its
    interpolations and the same resolved, both as nested dicts and lists."""
    _written.clear()
    _values.clear()
    values: dict[str, Any] = {}
    change_leaves(resolved, lambda value, key: values.setdefault(key, value))

    def remember(text: Any, key: str) -> None:
        names = _REFERENCE.findall(text) if isinstance(text, str) else []
        if names:
            _written[key] = text, values[key]
        for name in names:
            keep_secret(name)

    change_leaves(written, remember)


def keep_secret(name: str) -> None:
    """Hide the value of an environment variable in all that is printed or written from now on."""
    if len(os.environ.get(name, "")) >= SHORTEST:
        _values[os.environ[name]] = f"${{oc.env:{name}}}"


def as_written(values: Any) -> Any:
    """Put the references back in a configuration, given as nested dicts and lists."""

    def reference(value: Any, key: str) -> Any:
        if key in _written and _written[key][1] == value:
            return _written[key][0]
        return hide(value) if isinstance(value, str) else value

    return change_leaves(values, reference)


def hide(text: str) -> str:
    """Replace the values in a text by their references, the longest value first."""
    for value in sorted(_values, key=len, reverse=True):
        text = text.replace(value, _values[value])
    return text


def change_leaves(values: Any, change: Callable[[Any, str], Any], key: str = "") -> Any:
    """Copy nested dicts and lists, with `change(value, dotted key)` for each value in them."""
    start = f"{key}." if key else ""
    if isinstance(values, dict):
        return {k: change_leaves(value, change, f"{start}{k}") for k, value in values.items()}
    if isinstance(values, list):
        return [change_leaves(value, change, f"{start}{i}") for i, value in enumerate(values)]
    return change(values, key)
