"""A judge of few words in this process: an OpenAI-compatible endpoint that follows a rule."""

from __future__ import annotations

import re
from typing import Any


def chat(answer: str, **usage: int) -> tuple[int, Any]:
    """A chat completion as endpoints send it."""
    return 200, {"choices": [{"message": {"role": "assistant", "content": answer}}], "usage": usage}


def between(tag: str, text: str) -> str:
    """What a rubric shows between two tags."""
    return re.findall(rf"<{tag}>\n(.*?)\n</{tag}>", text, re.S)[0]


def prefers_long_answers(body: dict[str, Any]) -> tuple[int, Any]:
    """Rate by the number of words; prefer the answer with more of them."""
    text = body["messages"][0]["content"]
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    if "<answer>" in text:
        words = len(between("answer", text).split())
        return chat(f"It has {words} words, not [[99]]. [[{min(words, 10)}]]", **usage)
    a, b = (len(between(tag, text).split()) for tag in ("answer_a", "answer_b"))
    return chat(
        "Longer is better. " + ("[[C]]" if a == b else "[[A]]" if a > b else "[[B]]"), **usage
    )


def prefers_the_first(body: dict[str, Any]) -> tuple[int, Any]:
    """A judge with nothing but a bias."""
    return chat("[[A]]")
