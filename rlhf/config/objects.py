"""Python objects that a configuration names: importing them, and building a library's arguments."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlhf.config.errors import InputError, nearest

OWN_CODE = ("python:rlhf.demo.world.", "python:rlhf.demo_world.")  # now, and in older runs


JUDGE = "judge:"  # begins the path of a judge


def is_python(path: str | None) -> bool:
    """True for the path of a Python scorer: `python:module.function`, or `module.function` where no
    file or directory has that name."""
    name = str(path)
    is_dotted = all(map(str.isidentifier, name.split("."))) and "." in name
    return name.startswith("python:") or (is_dotted and not Path(name).exists())


def is_remote(path: str | None) -> bool:
    """True for the URL of a remote scorer."""
    return str(path).startswith(("http://", "https://"))


def is_judge(path: str | None) -> bool:
    """True for a judge with its rubric: `judge:helpfulness`, or `judge:<file>.yaml`."""
    return str(path).startswith(JUDGE)


def has_weights(path: str | None) -> bool:
    """True for the path of a reward model: no Python scorer, no remote one and no judge."""
    return not (is_python(path) or is_remote(path) or is_judge(path))


def load_object(dotted: str, field_name: str) -> Any:
    """Import the Python object that the configuration key `field_name` names, such as
    `my_package.module.function`; a leading `python:` is dropped.

    Raises:
        InputError: the module or the name in it does not exist.
    """
    module_name, _, name = dotted.removeprefix("python:").rpartition(".")
    if not module_name:
        raise InputError(f"{field_name}={dotted!r} must be a dotted path: my_module.my_function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{field_name}={dotted!r} cannot be imported ({error}); the module is searched for in "
            "the working directory and in PYTHONPATH"
        ) from error


def build_arguments(
    factory: Callable[..., Any], values: dict[str, Any], reserved: dict[str, Any]
) -> Any:
    """Build a library's argument object, such as `trl.SFTConfig`, from the mapping `trainer:`.

    Args:
        values: the user's values under `trainer:`.
        reserved: the values that the stage sets, which `trainer:` may not name.

    Raises:
        InputError: an unknown or reserved name, or a value that the library refuses.
    """
    known = [f.name for f in dataclasses.fields(factory) if f.init]  # type: ignore[arg-type]
    for name in values:
        if name in reserved:
            raise InputError(f"trainer.{name} is set by the stage itself; remove it from trainer")
        if name not in known:
            raise InputError(
                f"trainer.{name} is not an argument of {factory.__name__}.{nearest(name, known)}"
            )
    try:
        return factory(**values, **reserved)
    except (TypeError, ValueError) as error:
        raise InputError(f"trainer: {factory.__name__} refuses these values: {error}") from error


def refuse_named_code(values: Mapping[str, str | None], file: Path) -> None:
    """Refuse the Python objects that a stored configuration names.

    A command that receives somebody else's model directory would import them.

    Args:
        values: setting -> value, for the settings whose objects the command would import.
        file: the configuration, for the message.

    Raises:
        InputError: a value is `python:module.function` and does not belong to the embedded demo.
    """
    for name, value in values.items():
        if str(value).startswith("python:") and not str(value).startswith(OWN_CODE):
            raise InputError(
                f"{file} names Python code, {name}={value}, which was not run: it could do "
                "anything that you can do. If you have read it and trust it, add "
                "trust_remote_code=true"
            )
