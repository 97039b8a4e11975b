"""Rubrics: what a judge is asked, and how its verdict is read. The files are in conf/judge/.

A file has a `version`, the columns that its rows must have, and two Jinja templates: `rate` asks
for 1 to 10, `compare` for the better of two answers. A verdict ends the answer of the judge, in
double brackets. Left out: asking (`rlhf.scorers.judge`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlhf.config import CONF_DIR, JUDGE, InputError, read_yaml, show

LOWEST, HIGHEST = 1, 10
OWN = {"prompt", "response", "a", "b"}  # variables of the templates that are no columns
TEMPLATES = ImmutableSandboxedEnvironment(undefined=StrictUndefined)


@dataclass(frozen=True)
class Rubric:
    """What a judge is asked.

    Attributes:
        name: of the file.
        columns: that every row must have.
        optional: other columns that the templates read; None where a row has none.
        digest: SHA-256 of the file.
    """

    name: str
    version: int
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    rate: str
    compare: str
    digest: str

    def ask_to_rate(self, prompt: Any, response: str, columns: Mapping[str, Any]) -> str:
        """What the judge reads to rate a response."""
        return self._render(self.rate, columns, prompt=as_dialogue(prompt), response=response)

    def ask_to_compare(self, prompt: Any, a: str, b: str, columns: Mapping[str, Any]) -> str:
        """What the judge reads to compare two responses."""
        return self._render(self.compare, columns, prompt=as_dialogue(prompt), a=a, b=b)

    def _render(self, template: str, columns: Mapping[str, Any], **texts: str) -> str:
        names = (*self.columns, *self.optional)
        values = {name: columns.get(name) for name in names} | texts
        try:
            return TEMPLATES.from_string(template).render(values)
        except TemplateError as error:
            raise InputError(f"rubric {self.name}: {error}") from error


def as_dialogue(prompt: Any) -> str:
    """A prompt as text; the turns of a longer conversation with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def read_rating(answer: str) -> float | None:
    """The rating at the end of a judge's answer: "... [[7]]" -> 7.0; None where there is none."""
    found = re.findall(r"\[\[\s*(-?\d+(?:\.\d+)?)\s*(?:/\s*10\s*)?\]\]", answer)
    rating = float(found[-1]) if found else None
    return rating if rating is not None and LOWEST <= rating <= HIGHEST else None


def read_choice(answer: str) -> str | None:
    """The choice at the end of a judge's answer: "a", "b" or "tie"; None where there is none."""
    found = re.findall(r"\[\[\s*([ABC])\s*\]\]", answer)
    return {"A": "a", "B": "b", "C": "tie"}[found[-1]] if found else None


def read_rubric(path: str, field: str) -> Rubric:
    """Read the rubric that `judge:<name>` or `judge:<file>.yaml` names."""
    name = path.removeprefix(JUDGE)
    file = (
        Path(name).expanduser() if name.endswith(".yaml") else CONF_DIR / "judge" / f"{name}.yaml"
    )
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in (CONF_DIR / "judge").glob("*.yaml")))
        fix = f"give judge:<name> with one of {known}, or judge:<file>.yaml"
        raise InputError(f"{field}={path}: there is no rubric {file}; {fix}")
    values, where = read_yaml(file), f"{field}={path}: {file}"
    if not isinstance(values, dict):
        raise InputError(f"{where} must have the keys version, rate and compare")
    rate = _template(values, "rate", {"response"}, where)
    compare = _template(values, "compare", {"a", "b"}, where)
    columns = values.get("columns") or []
    if not isinstance(columns, list) or not isinstance(values.get("version"), int):
        raise InputError(f"{where}: version must be a number, columns a list of names")
    others = (_variables(rate) | _variables(compare)) - OWN - set(columns)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    own = file.stem, values["version"], tuple(columns), tuple(sorted(others))
    return Rubric(*own, rate, compare, digest)


def _template(values: Any, key: str, needed: set[str], where: str) -> str:
    """A template of the file; refuses one that leaves out what is judged."""
    text = values.get(key)
    if not isinstance(text, str):
        raise InputError(f"{where}: {key} must be a text, got {show(text)}")
    try:
        missing = needed - _variables(text)
    except TemplateError as error:
        raise InputError(f"{where}: {key} is no Jinja template ({error})") from error
    if missing:
        names = " and ".join(f"{{{{ {name} }}}}" for name in sorted(missing))
        raise InputError(f"{where}: {key} must show {names}")
    return text


def _variables(template: str) -> set[str]:
    return find_undeclared_variables(TEMPLATES.parse(template))
