"""Formats without a data set's name: messages, prompt and completion, text."""

from __future__ import annotations

from typing import Any

from rlhf.config import show
from rlhf.data.rows import (
    DropRow,
    Row,
    as_messages,
    as_prompt,
    as_text,
    as_turns,
    bad_field,
    with_extras,
)
from rlhf.tokenizer import Message


def format_messages(row: Row) -> Row:
    """`messages` of {role, content}; or ShareGPT's `conversations` of {from, value}.

    An answer of weight 0 carries no loss. A text in `system` is the system message, as in
    Anthropic's API, where the conversation has none.
    """
    name = "conversations" if "messages" not in row and "conversations" in row else "messages"
    messages = as_messages(row[name], name)
    canonical = _weighted(messages, as_turns(row[name], name), name)
    system = row.get("system")
    if not isinstance(system, str) or not system.strip() or messages[0]["role"] == "system":
        return with_extras(canonical, row, [name])
    first = "messages" if "messages" in canonical else "prompt"
    canonical[first] = [{"role": "system", "content": system}, *canonical[first]]
    return with_extras(canonical, row, [name, "system"])


def _weighted(messages: list[Message], turns: list[Any], name: str) -> Row:
    """Leave loss on the answers whose weight is not 0, as OpenAI's fine-tuning has it.

    A canonical row, as prompt and completion, can express that only for the last answer.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    weights = {i: turns[i].get("weight") for i in answers}
    for i, weight in weights.items():
        if weight not in (None, 0, 1):
            raise bad_field(f"{name}[{i}].weight", f"got {show(weight)}", "expected 0 or 1")
    if 0 not in weights.values():
        return {"messages": messages}
    if weights[answers[-1]] == 0 or any(weights[i] != 0 for i in answers[:-1]):
        trained = [i for i in answers if weights[i] != 0]
        if not trained:
            raise DropRow("every answer has weight 0")
        fix = "only the answers before the last one may have weight 0, and then all of them"
        raise bad_field(f"{name}[{trained[0]}].weight", "got 1, and another answer has 0", fix)
    last = answers[-1]
    return {"prompt": messages[:last], "completion": messages[last : last + 1]}


def format_prompt_completion(row: Row) -> Row:
    """`prompt` and `completion`, both text or both conversations; PPO needs the prompt alone."""
    canonical: Row = {"prompt": as_prompt(row["prompt"], "prompt")}
    if "completion" in row:
        canonical["completion"] = as_prompt(row["completion"], "completion")
    return with_extras(canonical, row, [])


def format_text(row: Row) -> Row:
    """`text`, without prompt and response, for PPO-ptx."""
    return with_extras({"text": as_text(row["text"], "text")}, row, [])
