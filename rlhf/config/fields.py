"""How a knob is declared: default and range on its dataclass field, its sentence below the field.

    kl_coef: float = knob(0.05, ge=0)
    \"\"\"Weight of the KL penalty, score units per nat.\"\"\"

From that declaration come the range check, the YAML files in `conf/`, `--help` and `help(...)`.
Rules between two knobs are in `rlhf.config.checks` and `rlhf.config.ppo_checks`.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import math
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar, dataclass_transform

from rlhf.config.errors import InputError, nearest

Class = TypeVar("Class", bound=type)


@dataclasses.dataclass(frozen=True)
class Limits:
    """The values that a knob accepts. None passes every range; it means that a knob is off."""

    ge: float = -math.inf
    gt: float = -math.inf
    le: float = math.inf
    lt: float = math.inf
    choices: tuple[Any, ...] = ()

    def __str__(self) -> str:
        """What a value must satisfy, e.g. `must be >= 0`; empty without limits."""
        if self.choices:
            return f"must be one of {', '.join(map(yaml_scalar, self.choices))}"
        low, high = max(self.ge, self.gt), min(self.le, self.lt)
        if math.isfinite(low) and math.isfinite(high):
            opening, closing = "[("[low == self.gt], "])"[high == self.lt]
            return f"must lie in {opening}{low}, {high}{closing}"
        signs = {">=": self.ge, ">": self.gt, "<=": self.le, "<": self.lt}
        return next((f"must be {sign} {x}" for sign, x in signs.items() if math.isfinite(x)), "")

    def allow(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if value is None or not isinstance(value, int | float):
            return value is None
        return self.ge <= value <= self.le and self.gt < value < self.lt


def knob(default: Any, *, infinite: bool = False, **limits: Any) -> Any:
    """Declare a knob.

    Args:
        default: its value when nothing is given; a list or dict is copied for every instance.
        infinite: accept inf and nan, which every other knob refuses.
        limits: ge, gt, le, lt: the value must be >=, >, <=, < this; or choices: the values that
            exist, and None where it is the default.
    """
    metadata: dict[str, Any] = {"infinite": infinite}
    if limits:
        metadata["limits"] = accepted = Limits(**limits)
        if accepted.choices and default is None:
            metadata["limits"] = Limits(choices=(*accepted.choices, None))
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def group(config_class: type, free: bool = False) -> Any:
    """Declare a group of knobs: a dataclass inside a dataclass.

    A class has the same defaults in every stage, so that one that is made in Python means what the
    same keys mean on the command line.

    Args:
        free: the field is a dict with these defaults, which may hold other keys too.
    """

    def make() -> Any:
        return dataclasses.asdict(config_class()) if free else config_class()

    return dataclasses.field(default_factory=make, metadata={"group": config_class})


def over_defaults(config_class: Any, name: str, value: Any) -> Any:
    """Put a mapping that is given for a group over the group's defaults, as the command line does;
    return any other value as it is.

    Raises:
        InputError: the value is no group of that name, or the group has no such key.
    """
    field = config_class.__dataclass_fields__.get(name)
    if field is None or "group" not in field.metadata:
        return value
    default = field.default_factory()
    if not isinstance(value, Mapping):
        if isinstance(value, type(default)):
            return value
        kind = "a dict" if isinstance(default, dict) else f"a {type(default).__name__} or a dict"
        is_path = isinstance(value, str) and hasattr(default, "path")
        fix = f"; for a path, give {name}={{'path': {value!r}}}" if is_path else ""
        raise InputError(f"{name} must be {kind}, got {value!r:.60}{fix}")
    if isinstance(default, dict):
        return default | dict(value)
    for key in value:
        if key not in vars(default):
            raise InputError(f"unknown key '{name}.{key}'.{nearest(key, vars(default))}")
    return dataclasses.replace(default, **value)


def value_problems(value: Any, name: str = "", limits: Limits | None = None) -> Iterator[str]:
    """Yield a message for each number in a value that is not finite, however deep, and for each
    knob that is out of its range."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{name} must be a finite number, got {value}"
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            inner, limits = f"{name}.{field.name}".lstrip("."), field.metadata.get("limits")
            if not field.metadata.get("infinite"):
                yield from value_problems(getattr(value, field.name), inner, limits)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from value_problems(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from value_problems(item, f"{name}[{i}]", limits)
    elif limits is not None and not limits.allow(value):
        yield f"{name} {limits}, got {value!r}"


# --- Sentences ------------------------------------------------------------------------------------


def sentences(config_class: type) -> dict[str, str]:
    """What each field of a dataclass is, and its limits: field name -> sentences.

    A group of knobs has the first paragraph of its class's docstring.
    """
    below: dict[str, str] = {}
    for owner in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(owner):
            below |= _texts_below_fields(owner)
    found = {}
    for field in dataclasses.fields(config_class):
        text = below.get(field.name) or summary(field.metadata["group"])
        limits = field.metadata.get("limits", Limits())
        named = [choice in text for choice in limits.choices if isinstance(choice, str)]
        if str(limits) and not (named and all(named)):
            text += f" M{str(limits)[1:]}."
        found[field.name] = text
    return found


@cache
def _texts_below_fields(owner: type) -> dict[str, str]:
    """Field name -> the string literal below the field, read from the source."""
    (tree,) = ast.parse(inspect.getsource(owner)).body
    texts = {}
    for field, below in pairwise(tree.body):  # type: ignore[attr-defined]
        match field, below:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                texts[name] = " ".join(text.split())
    return texts


def summary(config_class: type) -> str:
    """The docstring of a class of knobs, in one line and without its knobs."""
    return " ".join(vars(config_class)["__doc__"].summary.split())


class _Help:
    """A class's `__doc__` that reads the source only when somebody asks for it."""

    def __init__(self, summary: str) -> None:
        self.summary = summary

    def __get__(self, instance: Any, owner: type) -> str:
        knobs = [f"    {name}: {text}" for name, text in sentences(owner).items()]
        return "\n".join([self.summary, "", "Attributes:", *knobs])


@dataclass_transform()
def knobs(config_class: Class) -> Class:
    """Make a dataclass of knobs; its `help()` shows their sentences and limits."""
    help_text = _Help(inspect.cleandoc(config_class.__doc__ or ""))
    made: Any = dataclasses.dataclass(config_class)
    made.__doc__ = help_text
    return made


def yaml_scalar(value: Any) -> str:
    """A value as YAML and the command line write it: `null`, `true`, `2e-5`, `[0.9, 0.95]`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return repr(value).replace("e-0", "e-")
    if isinstance(value, list):
        return f"[{', '.join(map(yaml_scalar, value))}]"
    return str(value)
