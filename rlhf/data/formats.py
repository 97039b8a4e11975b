"""Formats: functions from one row of a source to a canonical row, and the checks of such rows.

A new data set is one function `row -> canonical row`, given as a dotted path in `dataset.format`.
It raises `DropRow` for a row that is well formed but unusable, and KeyError, TypeError or
InputError for a malformed one. Fields that are null in the source are absent from `row`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from rlhf.config import InputError, load_object, nearest

Row = dict[str, Any]
Message = dict[str, str]
Prompt = str | list[Message]

ROLES = ("system", "user", "assistant")
_CANONICAL = ("messages", "prompt", "completion", "responses", "ranks")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_INPUT_MARKER = "\n\n### Input:\n"  # conf/chat_template/alpaca.jinja looks for it


class DropRow(Exception):
    """Raised by a format for a row that is well formed but unusable; the reason is counted."""


def _bad(name: str, what: str, fix: str) -> InputError:
    return InputError(f"field {name!r}: {what}; {fix}")


def show(value: Any) -> str:
    """Shorten a value for an error message."""
    text = repr(value)
    return f"{text[:60]}... ({type(value).__name__})" if len(text) > 60 else text


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _bad(name, f"got {show(value)}", "expected text")
    return value


def _messages(value: Any, name: str) -> list[Message]:
    """Check a conversation; ShareGPT's `from` and `value` become `role` and `content`."""
    if not isinstance(value, list) or not value:
        raise _bad(name, f"got {show(value)}", "expected a list of {role, content}")
    messages = []
    for i, message in enumerate(value):
        where = f"{name}[{i}]"
        if not isinstance(message, dict):
            raise _bad(where, f"got {show(message)}", "expected {role, content}")
        role, content = message.get("role"), message.get("content")
        if role is None and message.get("from") is not None:
            role, content = message["from"], message.get("value")
            role = _SHAREGPT_ROLES.get(str(role), role)
        if role not in ROLES:
            fix = f"known roles are {', '.join(ROLES)}.{nearest(str(role), ROLES)}"
            raise _bad(f"{where}.role", f"got {role!r}", fix)
        messages.append({"role": role, "content": _text(content, f"{where}.content")})
    return messages


def _prompt(value: Any, name: str) -> Prompt:
    return value if isinstance(value, str) else _messages(value, name)


def _with_extras(canonical: Row, row: Row, used: Iterable[str]) -> Row:
    extras = {k: v for k, v in row.items() if k not in (*_CANONICAL, *used)}
    return {**extras, **canonical}


def format_messages(row: Row) -> Row:
    """`messages` of {role, content}; or ShareGPT's `conversations` of {from, value}."""
    name = "conversations" if "messages" not in row and "conversations" in row else "messages"
    return _with_extras({"messages": _messages(row[name], name)}, row, [name])


def format_prompt_completion(row: Row) -> Row:
    """`prompt` and `completion`, both text or both conversations; PPO needs the prompt alone."""
    canonical: Row = {"prompt": _prompt(row["prompt"], "prompt")}
    if "completion" in row:
        canonical["completion"] = _prompt(row["completion"], "completion")
    return _with_extras(canonical, row, [])


def format_text(row: Row) -> Row:
    """`text`, without prompt and response: what PPO-ptx trains on."""
    return _with_extras({"text": _text(row["text"], "text")}, row, [])


def format_alpaca(row: Row) -> Row:
    """`instruction`, `input` (may be empty), `output` -> one user and one assistant message.

    A non-empty input follows the instruction under "### Input:". So the `alpaca` template renders
    Alpaca's own prompt, and the text stays plain {role, content} for other templates and servers.
    """
    content = _text(row["instruction"], "instruction")
    extra = _text(row.get("input", ""), "input")
    if extra.strip():
        content += _INPUT_MARKER + extra
    output = _text(row["output"], "output")
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": output}]
    return _with_extras({"messages": messages}, row, ["instruction", "input", "output"])


def _hh_turns(text: Any, name: str) -> list[Message]:
    parts = re.split(r"\n\n(Human|Assistant):", _text(text, name))
    if len(parts) < 3 or parts[0].strip():
        raise _bad(name, f"got {show(text)}", r"expected text that starts with '\n\nHuman:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": roles[role], "content": content.strip()} for role, content in turns]


def format_hh(row: Row) -> Row:
    """Anthropic's HH pairs: `chosen` and `rejected` are whole dialogues that share a prompt."""
    chosen, rejected = (_hh_turns(row[name], name) for name in ("chosen", "rejected"))
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise DropRow("last turn not the assistant's")
    if chosen[:-1] != rejected[:-1]:
        raise DropRow("prompts differ")
    responses = [chosen[-1]["content"], rejected[-1]["content"]]
    canonical = {"prompt": chosen[:-1], "responses": responses, "ranks": [0, 1]}
    return _with_extras(canonical, row, ["chosen", "rejected"])


def format_ranked(row: Row) -> Row:
    """`prompt`, `responses`, and `ranks` (0 = best) or `scores` (higher is better)."""
    names = [name for name in ("ranks", "scores") if name in row]
    if not names:
        raise _bad("ranks", "missing or null, and so is 'scores'", "give one of the two")
    for name in ("responses", *names):
        if not isinstance(row[name], list):
            raise _bad(name, f"got {show(row[name])}", "expected a list, one entry per response")
    orders = [_dense_ranks(row[name], name) for name in names]
    if orders[0] != orders[-1]:
        raise _bad("ranks", "disagree with 'scores'", "rank 0 and the highest score are the best")
    prompt = _prompt(row["prompt"], "prompt")
    canonical = {"prompt": prompt, "responses": row["responses"], "ranks": orders[0]}
    return _with_extras(canonical, row, [])


def _dense_ranks(numbers: list[Any], name: str) -> list[int]:
    """Scores [2, 5, 5, 0] -> ranks [1, 0, 0, 2]; ranks [1, 3, 3] -> [0, 1, 1]."""
    for i, number in enumerate(numbers):
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not is_number or math.isnan(number):
            what = "null" if number is None else show(number)
            raise _bad(
                f"{name}[{i}]", f"got {what}", "give each response a number, or leave it out"
            )
    order = sorted(set(numbers), reverse=name == "scores")
    return [order.index(number) for number in numbers]


def format_pair(row: Row) -> Row:
    """`prompt`, `chosen`, `rejected`, each text or a conversation.

    A conversation in `chosen` or `rejected` ends in the assistant's answer. What stands before it
    is the prompt; a column `prompt` must then say the same, as a conversation or as its last turn.
    """
    contexts, responses = [], []
    for name in ("chosen", "rejected"):
        side = _prompt(row[name], name)
        if isinstance(side, list) and side[-1]["role"] != "assistant":
            raise _bad(name, f"ends in a {side[-1]['role']} turn", "end it in the assistant's")
        contexts.append(side[:-1] if isinstance(side, list) else [])
        responses.append(side[-1]["content"] if isinstance(side, list) else side)
    if contexts[0] != contexts[1]:
        raise DropRow("prompts differ")
    prompt: Prompt = contexts[0] or _prompt(row["prompt"], "prompt")
    given = row.get("prompt", prompt)
    if contexts[0] and given not in (prompt, contexts[0][-1]["content"]):
        raise _bad("prompt", "differs from what stands before the answer in 'chosen'", "remove one")
    if isinstance(prompt, str) and isinstance(row["chosen"], list):
        prompt = [{"role": "user", "content": prompt}]
    canonical = {"prompt": prompt, "responses": responses, "ranks": [0, 1]}
    return _with_extras(canonical, row, ["chosen", "rejected"])


FORMATS: dict[str, Callable[[Row], Row]] = {
    "messages": format_messages,
    "prompt_completion": format_prompt_completion,
    "text": format_text,
    "alpaca": format_alpaca,
    "hh": format_hh,
    "ranked": format_ranked,
    "pair": format_pair,
}


def resolve_format(name: str) -> Callable[[Row], Row]:
    """Return the format function: a name in `FORMATS`, or a dotted path to the user's own."""
    if name in FORMATS:
        return FORMATS[name]
    if "." in name:
        return load_object(name, "dataset.format")
    raise InputError(
        f"dataset.format={name!r} is neither one of {', '.join(FORMATS)} nor a dotted path such as "
        f"my_module.my_format.{nearest(name, FORMATS)}"
    )


# --- Canonical rows -----------------------------------------------------------------------------


def prompt_of(row: Row) -> Prompt:
    """Prompt of a canonical row: `prompt`, or `messages` before the last assistant message."""
    if "messages" not in row:
        return row["prompt"]
    messages = row["messages"]
    last = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: last[-1]] if last else messages


def check_row(row: Row, stage: str) -> None:
    """Check that a canonical row has what `stage` needs ("ptx": text, or an SFT row).

    Raises:
        InputError, KeyError: a malformed row.
        DropRow: a well-formed row that the stage cannot use.
    """
    if stage == "ptx" and "text" in row:
        if not row["text"].strip():
            raise DropRow("empty text")
        return
    if "messages" in row:
        _messages(row["messages"], "messages")
    else:
        _prompt(row["prompt"], "prompt")
    if stage in ("sft", "ptx"):
        _check_sft(row)
    elif stage == "reward":
        _check_ranked(row)
    prompt = prompt_of(row)
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise DropRow("empty prompt")
    if isinstance(prompt, list):
        roles = [message["role"] for message in prompt if message["role"] != "system"]
        if roles[:1] != ["user"]:
            raise DropRow("conversation does not start with a user turn")


def _check_sft(row: Row) -> None:
    name = "messages" if "messages" in row else "completion"
    trained = _prompt(row[name], name)
    if name == "completion" and isinstance(trained, str) != isinstance(row["prompt"], str):
        raise _bad(name, "is text and 'prompt' a conversation, or the reverse", "make both alike")
    if isinstance(trained, list):
        answers = [m["content"] for m in trained if m["role"] == "assistant"]
        if not answers:
            raise _bad(name, "has no assistant turn", "SFT trains on the assistant's turns")
    else:
        answers = [trained]
    if not all(answer.strip() for answer in answers):
        raise DropRow("empty response")


def _check_ranked(row: Row) -> None:
    responses, ranks = row["responses"], row["ranks"]
    if not isinstance(responses, list) or not isinstance(ranks, list):
        raise _bad("responses", "not a list, or 'ranks' is not", "one entry per response in each")
    for i, response in enumerate(responses):
        _text(response, f"responses[{i}]")
    if any(not isinstance(rank, int) or isinstance(rank, bool) for rank in ranks):
        raise _bad("ranks", f"got {show(ranks)}", "expected whole numbers, 0 = best")
    if len(responses) != len(ranks):
        what = f"{len(ranks)} for {len(responses)} responses"
        raise _bad("ranks", what, "give one rank or score per response")
    if len(responses) < 2:
        what = f"a ranking needs at least 2, got {len(responses)}"
        raise _bad("responses", what, "add a response to compare with, or remove the row")
    if not all(response.strip() for response in responses):
        raise DropRow("empty response")
    if len(set(ranks)) == 1:
        raise DropRow("all ranks tied")
