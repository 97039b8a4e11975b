"""A custom data format: a function from a row of a file to a canonical row."""

from __future__ import annotations

from typing import Any

from rlhf.data import FORMATS


def ranked_conversation(row: dict[str, Any]) -> dict[str, Any]:
    """Read `prompt, responses, scores`; the prompt becomes a user turn for the chat template."""
    canonical = FORMATS["ranked"](row)
    return canonical | {"prompt": [{"role": "user", "content": canonical["prompt"]}]}
