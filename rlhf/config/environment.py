"""Values that a configuration takes from the environment, such as tokens: used, never written.

`${oc.env:TOKEN}` on the command line or in a YAML file is resolved for the stage. Everything that
the stage writes, prints or sends to a tracker shows `${oc.env:TOKEN}` instead of the value. The
environment belongs to the process, so the command line remembers these values here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

_REFERENCE = re.compile(r"\$\{oc\.env:\s*([A-Za-z_]\w*)")
SHORTEST = 6  # characters; a shorter value, such as "1" or "data", occurs in any text
_written: dict[str, tuple[str, Any]] = {}  # dotted key -> (as written, resolved)
_values: dict[str, str] = {}  # value of a variable -> its reference


def remember_references(written: Any, resolved: Any) -> None:
    """Remember which values of the command's configuration come from the environment.

    Args:
        written: the configuration with its interpolations, as nested dicts and lists.
        resolved: the same, resolved.
    """
    _written.clear()
    _values.clear()
    values = dict(_leaves(resolved))
    for key, text in _leaves(written):
        names = _REFERENCE.findall(text) if isinstance(text, str) else []
        if names:
            _written[key] = text, values[key]
        for name in names:
            if len(os.environ.get(name, "")) >= SHORTEST:
                _values[os.environ[name]] = f"${{oc.env:{name}}}"


def as_written(values: Any) -> Any:
    """Put the references back in a configuration, given as nested dicts and lists."""

    def replaced(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {
                name: replaced(v, f"{key}.{name}" if key else name) for name, v in value.items()
            }
        if isinstance(value, list):
            return [replaced(v, f"{key}.{i}") for i, v in enumerate(value)]
        if key in _written and _written[key][1] == value:
            return _written[key][0]
        return hide(value) if isinstance(value, str) else value

    return replaced(values, "")


def hide(text: str) -> str:
    """Replace the values in a text by their references, the longest value first."""
    for value in sorted(_values, key=len, reverse=True):
        text = text.replace(value, _values[value])
    return text


def _leaves(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    items: Any = ()
    if isinstance(values, dict):
        items = values.items()
    elif isinstance(values, list):
        items = enumerate(values)
    else:
        yield key, values
    for name, value in items:
        yield from _leaves(value, f"{key}.{name}" if key else str(name))
