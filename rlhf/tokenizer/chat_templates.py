"""Chat templates: where they come from, and the stop strings that they declare.

A template declares the texts that end an answer besides EOS, so that they are saved with the
tokenizer:

    {%- set stop_strings = ['\\nUser'] -%}
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlhf.config import CONF_DIR, InputError, nearest, show

_DECLARATION = re.compile(r"\{#.*?#\}|\{%[-+]?\s*set\s+stop_strings\s*=", re.DOTALL)


def chat_template_text(
    name_or_path: str, field: str = "model.chat_template", own: Mapping[str, str] | None = None
) -> str:
    """Return a chat template: one of the tokenizer's `own` by its name, one of
    `conf/chat_template`, a .jinja file, or the text itself."""
    if own and name_or_path in own:
        return own[name_or_path]
    if "{%" in name_or_path:
        return name_or_path
    known = {file.stem: file for file in sorted((CONF_DIR / "chat_template").glob("*.jinja"))}
    file = known.get(name_or_path, Path(name_or_path).expanduser())
    if file.suffix == ".jinja" and file.is_file():
        return file.read_text(encoding="utf-8")
    names = [*sorted(own or {}), *known]
    raise InputError(
        f"{field}={name_or_path!r} is neither one of {', '.join(names)}, nor a .jinja "
        f"file that exists, nor a template's text.{nearest(name_or_path, names)}"
    )


def named_templates(directory: Path) -> dict[str, str]:
    """Read the named chat templates that a tokenizer's directory holds; most hold none."""
    file = directory / "tokenizer_config.json"
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        listed = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
        own = {one["name"]: one["template"] for one in listed}
        return own
    files = (directory / "additional_chat_templates").glob("*.jinja")
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


def template_of(tokenizer: Any) -> str | None:
    """Return the chat template that renders conversations: of several named ones, `default`."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def stop_strings(tokenizer: Any) -> tuple[str, ...]:
    """Read the stop strings that the tokenizer's chat template declares; most declare none."""
    template = template_of(tokenizer)
    return _declared(template)[0] if template is not None else ()


def declare_stop_strings(template: str, strings: Sequence[str]) -> str:
    """Write stop strings into a chat template, replacing those that it declares."""
    literal = json.dumps(list(strings), ensure_ascii=False)
    _, place = _declared(template)
    if place is not None:
        return f"{template[: place.start]} {literal} {template[place.stop :]}"
    # chat templates are rendered with trim_blocks: the newline after a tag is left out
    return f"{{% set stop_strings = {literal} %}}\n{template}" if strings else template


@lru_cache(maxsize=64)
def _declared(template: str) -> tuple[tuple[str, ...], slice | None]:
    """The stop strings of a template and the place of their list; None without a declaration.

    Jinja's parser does not tell places, and fails on the tags that transformers adds.
    """
    tags = (m for m in _DECLARATION.finditer(template) if m.group().startswith("{%"))
    start = next((tag.end() for tag in tags), None)
    if start is None:
        return (), None
    # a string may contain "%}": the declaration ends at the first one that completes a list
    for end in re.finditer(r"[-+]?%\}", template[start:]):
        place = slice(start, start + end.start())
        try:
            strings = ast.literal_eval(template[place].strip())
        except (ValueError, SyntaxError):
            continue
        if isinstance(strings, list) and all(isinstance(s, str) and s for s in strings):
            return tuple(strings), place
        break
    raise InputError(
        f"the chat template declares stop_strings = {show(template[start:].strip())}; expected a "
        "list of strings that are not empty, e.g. {%- set stop_strings = ['\\nUser'] -%}"
    )
