"""How a knob is declared: default and range on its dataclass field, its sentence below the field.

    kl_coef: float = knob(0.05, ge=0)
    \"\"\"Weight of the KL penalty, score units per nat.\"\"\"

From that declaration come the range check, the YAML files in `conf/`, `--help` and `help(...)`.
Rules between two knobs are in `rlhf.config.checks`.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import math
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from rlhf.config.errors import InputError

Class = TypeVar("Class", bound=type)


@dataclasses.dataclass(frozen=True)
class Limits:
    """The values that a knob accepts. None passes every range; it means that a knob is off."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple[Any, ...] = ()

    def __str__(self) -> str:
        """What a value must satisfy, e.g. `must be >= 0`; empty without limits."""
        if self.choices:
            return f"must be one of {', '.join(map(yaml_scalar, self.choices))}"
        low, high = self.ge if self.gt is None else self.gt, self.le if self.lt is None else self.lt
        if low is not None and high is not None:
            opening, closing = "[("[self.gt is not None], "])"[self.lt is not None]
            return f"must lie in {opening}{low}, {high}{closing}"
        signs = {">=": self.ge, ">": self.gt, "<=": self.le, "<": self.lt}
        return next((f"must be {sign} {x}" for sign, x in signs.items() if x is not None), "")

    def allow(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        return value is None or (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )


def knob(
    default: Any,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[Any, ...] = (),
    infinite: bool = False,
) -> Any:
    """Declare a knob.

    Args:
        default: its value when nothing is given; a list or dict is copied for every instance.
        ge, gt, le, lt: the value must be >=, >, <=, < this.
        choices: the values that exist; None is added where it is the default.
        infinite: accept inf and nan, which every other knob refuses.
    """
    if choices and default is None:
        choices = (*choices, None)
    metadata = {"limits": Limits(ge, gt, le, lt, choices), "infinite": infinite}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def group(config_class: type, free: bool = False, **values: Any) -> Any:
    """Declare a group of knobs: a dataclass inside a dataclass.

    Args:
        free: the field is a dict with these defaults, which may hold other keys too.
        values: defaults that differ from those of the class.
    """

    def make() -> Any:
        made = config_class(**values)
        return dataclasses.asdict(made) if free else made

    return dataclasses.field(default_factory=make, metadata={"group": config_class})


# --- Checks ---------------------------------------------------------------------------------------


def check_finite(config: Any, prefix: str = "") -> None:
    """Check that every number in a dataclass is finite, also those in its lists and mappings.

    Args:
        prefix: put before the names in messages, e.g. "scorer.".

    Raises:
        InputError: names every number that is not finite at once.
    """
    problems = [
        f"{name} must be a finite number, got {value}"
        for name, value in _numbers(config, prefix.removesuffix("."))
        if not math.isfinite(value)
    ]
    if problems:
        raise InputError("\n".join(problems))


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Every float in a value, however deep, with its dotted name."""
    items: list[tuple[str, Any]] = []
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, list | tuple):
        items = [(f"{name}[{i}]", item) for i, item in enumerate(value)]
    elif isinstance(value, dict):
        items = [(f"{name}.{key}", item) for key, item in value.items()]
    elif dataclasses.is_dataclass(value):
        fields = [f.name for f in dataclasses.fields(value) if not f.metadata.get("infinite")]
        items = [(f"{name}.{key}".lstrip("."), getattr(value, key)) for key in fields]
    for inner_name, inner in items:
        yield from _numbers(inner, inner_name)


def range_problems(config: Any, prefix: str = "") -> Iterator[str]:
    """Yield a message for each knob of a dataclass, and of those in it, that is out of range."""
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        limits = field.metadata.get("limits", Limits())
        if dataclasses.is_dataclass(value):
            yield from range_problems(value, f"{name}.")
        elif isinstance(value, list):
            for i, item in enumerate(value):
                if dataclasses.is_dataclass(item):
                    yield from range_problems(item, f"{name}[{i}].")
        elif not limits.allow(value):
            yield f"{name} {limits}, got {value!r}"


# --- Sentences ------------------------------------------------------------------------------------


def sentences(config_class: type) -> dict[str, str]:
    """What each field of a dataclass is, and its limits: field name -> sentences.

    A group of knobs has the first paragraph of its class's docstring.
    """
    below: dict[str, str] = {}
    for owner in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(owner):
            below |= _texts_below_fields(inspect.getfile(owner)).get(owner.__name__, {})
    found = {}
    for field in dataclasses.fields(config_class):
        text = below.get(field.name, "")
        if not text and "group" in field.metadata:
            text = summary(field.metadata["group"])
        limits = field.metadata.get("limits", Limits())
        if str(limits) and not (limits.choices and _names_choices(text, limits)):
            text += f" M{str(limits)[1:]}."
        found[field.name] = text
    return found


def summary(config_class: type) -> str:
    """The docstring of a dataclass, in one line and without its knobs."""
    doc = vars(config_class)["__doc__"]
    return " ".join((doc.summary if isinstance(doc, _Help) else doc).split())


def _names_choices(text: str, limits: Limits) -> bool:
    return all(choice in text for choice in limits.choices if isinstance(choice, str))


@cache
def _texts_below_fields(file: str) -> dict[str, dict[str, str]]:
    """Class name -> field name -> the string literal below the field, read from the source."""
    nodes = ast.walk(ast.parse(Path(file).read_text(encoding="utf-8")))
    return {
        owner.name: {
            field.target.id: " ".join(below.value.value.split())
            for field, below in pairwise(owner.body)
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        }
        for owner in nodes
        if isinstance(owner, ast.ClassDef)
    }


class _Help:
    """A class's `__doc__` that reads the source only when somebody asks for it."""

    def __init__(self, summary: str) -> None:
        self.summary = summary

    def __get__(self, instance: Any, owner: type) -> str:
        knobs = [f"    {name}: {text}" for name, text in sentences(owner).items()]
        return "\n".join([self.summary, "", "Attributes:", *knobs])


def documented(config_class: Class) -> Class:
    """Make `help()` of a dataclass show the sentences and limits of its knobs."""
    help_text = _Help(inspect.cleandoc(config_class.__doc__ or ""))
    config_class.__doc__ = help_text  # type: ignore[assignment]
    return config_class


def yaml_scalar(value: Any) -> str:
    """A value as YAML and the command line write it: `null`, `true`, `2e-5`, `[0.9, 0.95]`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return repr(value).replace("e-0", "e-")
    if isinstance(value, list):
        return f"[{', '.join(map(yaml_scalar, value))}]"
    return str(value)
