"""The `key=value` options of every command but the three stages.

A command declares its options as the fields of a dataclass, in the same way as the stages declare
their knobs: `knob(default, ge=0)` gives a range, and the string literal under a field is its
sentence in `--help`. A field without a default must be given. A field named `overrides` receives
the arguments that no other field is named after.

Left out: the command line of the stages, which Hydra reads (`rlhf.cli`).
"""

from __future__ import annotations

import dataclasses
import os
import sys
import textwrap
import types
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from rlhf.config import (
    InputError,
    nearest,
    refuse,
    refused_file,
    sentences,
    value_problems,
    yaml_scalar,
)
from rlhf.console import accept_any_text, print_error, print_help
from rlhf.launched import require_one_process

Options = TypeVar("Options")

BOOLS = {"true": True, "false": False}  # bool("false") is True
OVERRIDES = "overrides"
RENAMED = {"max_new_tokens": "response_length"}  # old names work for one release
ROWS = ("data", "prompts")  # what commands call dataset.path


def run_command(
    usage: str,
    options: type[Options],
    run: Callable[[Options], int | None],
    arguments: Sequence[str],
    when_interrupted: str | None = None,
) -> int:
    """Run a command with `key=value` arguments; return its exit status.

    The processes of a launcher are refused. The status is what `run` returns (None counts as 0), 2
    after an `InputError` or a file that the system refuses, which are printed in one line, and 130
    after Ctrl-C. `--help` prints `usage` above the options.
    """
    accept_any_text()
    if {"-h", "--help"} & set(arguments):
        print_help(help_text(usage, options))
        return 0
    try:
        require_one_process(os.environ)
        return run(read_options(options, arguments)) or 0
    except InputError as error:
        print_error(str(error))
        return 2
    except OSError as error:
        print_error(refused_file(error))
        return 2
    except KeyboardInterrupt:
        if when_interrupted is not None:
            print(when_interrupted, file=sys.stderr, flush=True)
        return 130


def read_options(options: type[Options], arguments: Sequence[str]) -> Options:
    """Fill a dataclass from `key=value` arguments."""
    known = {name: kind for name, kind in get_type_hints(options).items() if name != OVERRIDES}
    takes_overrides = OVERRIDES in get_type_hints(options)
    values: dict[str, Any] = {}
    overrides = []
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not takes_overrides:
            name = _option_named(name, known)
        if name in known and equals:
            values[name] = _parse(name, known[name], text)
        elif takes_overrides:
            overrides.append(argument)
        elif not equals:
            first = next(iter(known), "path")
            raise InputError(f"cannot read {argument!r}; write key=value, e.g. {first}={argument}")
        else:
            hint = nearest(name, known)
            raise InputError(f"unknown option {name!r}.{hint} (--help lists the options)")
    about = sentences(options)
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        if _is_required(field) and not values.get(field.name):
            what = about[field.name][0].lower() + about[field.name][1:].rstrip(".")
            raise InputError(f"{field.name} is missing; add {field.name}=<{what}>")
    if overrides:
        values[OVERRIDES] = overrides
    filled = options(**values)
    check_options(filled)
    return filled


def _option_named(name: str, known: Collection[str]) -> str:
    """The option that a name means: its own, its old one, or that of the stages' setting, such as
    `ppo.response_length` for `response_length`."""
    if name in known:
        return name
    if (new := RENAMED.get(name)) in known:
        print(f"{name} is now called {new}; the old name goes away", file=sys.stderr, flush=True)
        return str(new)
    group, _, last = name.rpartition(".")
    if name == "dataset.path":
        return next((rows for rows in ROWS if rows in known), name)
    return last if group and last != "path" and last in known else name


def check_options(options: Any) -> None:
    """Check that the values of a dataclass are finite and in range."""
    refuse(list(value_problems(options)))


def _parse(name: str, kind: Any, text: str) -> Any:
    """Read a value of the type of a field: bool, int, float, str, or a list such as `[a,b]`."""
    if get_origin(kind) is types.UnionType:  # float of `float | None`
        kind = get_args(kind)[0]
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        parts = (part.strip() for part in text.strip("[] ").split(","))
        return [_parse(name, item, part) for part in parts if part]
    if kind is bool:
        if text.lower() not in BOOLS:
            raise InputError(f"{name} must be true or false, got {text!r}")
        return BOOLS[text.lower()]
    try:
        return kind(text)
    except ValueError as error:
        raise InputError(f"{name} must be of type {kind.__name__}, got {text!r}") from error


def help_text(usage: str, options: type) -> str:
    """What `--help` prints: the usage, and each option with its sentence and default."""
    about = sentences(options)
    own = vars(options).get("__annotations__", {})  # before those that other commands have too
    order = sorted(dataclasses.fields(options), key=lambda field: field.name not in own)
    fields = sorted(order, key=_is_required, reverse=True)
    labels = ["..." if field.name == OVERRIDES else field.name for field in fields]
    width = max(map(len, labels)) + 6
    lines = [
        textwrap.fill(
            about[field.name] + _default(field),
            width=100,
            initial_indent=f"    {label}".ljust(width),
            subsequent_indent=" " * width,
        )
        for field, label in zip(fields, labels, strict=True)
    ]
    return "\n".join([usage.strip(), "\nOptions, each as key=value:\n", *lines])


def _default(field: dataclasses.Field[Any]) -> str:
    if _is_required(field):
        return " (required)"
    if field.default in (dataclasses.MISSING, None):
        return ""
    return f" (default: {yaml_scalar(field.default)})"


def _is_required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing
