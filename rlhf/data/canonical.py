"""Canonical rows: their types, the checks of what they hold, and the errors of bad ones.

A canonical row of the reward stage has `prompt`, `responses` (K >= 2 texts) and `ranks` (K whole
numbers, 0 = best, ties share one), and where the source has them
    scores       K finite numbers that nowhere contradict the ranks
    margin       K = 2: a number >= 0, by which the better score should lead (Llama 2)
    probability  K = 2: a number in [0, 1], that responses[0] is preferred (a soft label)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from rlhf.config import InputError, nearest

Row = dict[str, Any]
Message = dict[str, str]
Prompt = str | list[Message]

ROLES = ("system", "user", "assistant")
_COLUMNS = ("messages", "prompt", "completion", "responses", "ranks")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


class DropRow(Exception):
    """Raised by a format for a row that is well formed but unusable; the reason is counted."""


def bad_field(name: str, what: str, fix: str) -> InputError:
    """The error of a field that holds something else than expected."""
    return InputError(f"field {name!r}: {what}; {fix}")


def show(value: Any) -> str:
    """Shorten a value for an error message."""
    text = repr(value)
    return f"{text[:60]}... ({type(value).__name__})" if len(text) > 60 else text


def as_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise bad_field(name, f"got {show(value)}", "expected text")
    return value


def as_number(value: Any, name: str, fix: str) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise bad_field(name, f"got {'null' if value is None else show(value)}", fix)
    return value


def as_numbers(value: Any, name: str) -> list[float]:
    if not isinstance(value, list):
        raise bad_field(name, f"got {show(value)}", "expected a list, one entry per response")
    fix = "give each response a number, or leave it out"
    return [as_number(number, f"{name}[{i}]", fix) for i, number in enumerate(value)]


def as_messages(value: Any, name: str) -> list[Message]:
    """Check a conversation; ShareGPT's `from` and `value` become `role` and `content`."""
    if not isinstance(value, list) or not value:
        raise bad_field(name, f"got {show(value)}", "expected a list of {role, content}")
    messages = []
    for i, message in enumerate(value):
        where = f"{name}[{i}]"
        if not isinstance(message, dict):
            raise bad_field(where, f"got {show(message)}", "expected {role, content}")
        role, content = message.get("role"), message.get("content")
        if role is None and message.get("from") is not None:
            role, content = message["from"], message.get("value")
            role = _SHAREGPT_ROLES.get(str(role), role)
        if role not in ROLES:
            fix = f"known roles are {', '.join(ROLES)}.{nearest(str(role), ROLES)}"
            raise bad_field(f"{where}.role", f"got {role!r}", fix)
        messages.append({"role": role, "content": as_text(content, f"{where}.content")})
    return messages


def as_prompt(value: Any, name: str) -> Prompt:
    return value if isinstance(value, str) else as_messages(value, name)


def with_extras(canonical: Row, row: Row, used: Iterable[str]) -> Row:
    """Add the columns of the source that no one read."""
    extras = {k: v for k, v in row.items() if k not in (*_COLUMNS, *used)}
    return {**extras, **canonical}


def ranks_of(scores: list[float]) -> list[int]:
    """Scores [2, 5, 5, 0] -> ranks [1, 0, 0, 2]."""
    order = sorted(set(scores), reverse=True)
    return [order.index(score) for score in scores]


def ranks_of_probability(value: Any) -> list[int]:
    fix = "expected a number from 0 to 1"
    probability = as_number(value, "probability", fix)
    if not 0 <= probability <= 1:
        raise bad_field("probability", f"got {probability}", fix)
    return ranks_of([probability, 1 - probability])


# --- Whole rows ---------------------------------------------------------------------------------


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
        as_messages(row["messages"], "messages")
    else:
        as_prompt(row["prompt"], "prompt")
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
        if any(m["role"] == "user" and not m["content"].strip() for m in prompt):
            raise DropRow("empty user turn")


def _check_sft(row: Row) -> None:
    name = "messages" if "messages" in row else "completion"
    trained = as_prompt(row[name], name)
    if name == "completion" and isinstance(trained, str) != isinstance(row["prompt"], str):
        raise bad_field(
            name, "is text and 'prompt' a conversation, or the reverse", "make both alike"
        )
    if isinstance(trained, list):
        answers = [m["content"] for m in trained if m["role"] == "assistant"]
        if not answers:
            raise bad_field(name, "has no assistant turn", "SFT trains on the assistant's turns")
    else:
        answers = [trained]
    if not all(answer.strip() for answer in answers):
        raise DropRow("empty response")


def _check_ranked(row: Row) -> None:
    responses, ranks = row["responses"], row["ranks"]
    for name in ("responses", "ranks"):
        if not isinstance(row[name], list):
            raise bad_field(
                name, f"got {show(row[name])}", "expected a list, one entry per response"
            )
    for i, response in enumerate(responses):
        as_text(response, f"responses[{i}]")
    if any(not isinstance(rank, int) or isinstance(rank, bool) for rank in ranks):
        raise bad_field("ranks", f"got {show(ranks)}", "expected whole numbers, 0 = best")
    if len(responses) != len(ranks):
        what = f"{len(ranks)} for {len(responses)} responses"
        raise bad_field("ranks", what, "give one rank or score per response")
    if len(responses) < 2:
        raise DropRow("only one response" if responses else "no response")
    _check_strength(row)
    if not all(response.strip() for response in responses):
        raise DropRow("empty response")
    rank_of: dict[str, int] = {}
    pairs = zip(responses, ranks, strict=True)
    if any(rank_of.setdefault(response, rank) != rank for response, rank in pairs):
        raise DropRow("identical responses ranked differently")
    if len(set(ranks)) == 1:
        raise DropRow("all ranks tied")


def _check_strength(row: Row) -> None:
    """Check what says how much better a response is: `scores`, `margin`, `probability`."""
    ranks = row["ranks"]
    if "scores" in row:
        scores = as_numbers(row["scores"], "scores")
        if len(scores) != len(ranks):
            what = f"{len(scores)} for {len(ranks)} responses"
            raise bad_field("scores", what, "give one score per response")
        pairs = list(zip(ranks, scores, strict=True))
        if any(rank < other and score < lower for rank, score in pairs for other, lower in pairs):
            fix = "rank 0 and the highest score are the best"
            raise bad_field("ranks", "disagree with 'scores'", fix)
    for name in ("margin", "probability"):
        if name in row and len(ranks) != 2:
            raise bad_field(name, f"given for {len(ranks)} responses", "only a pair can have one")
    if "margin" in row and as_number(row["margin"], "margin", "expected a number >= 0") < 0:
        raise bad_field("margin", f"got {row['margin']}", "expected a number >= 0")
    if "probability" in row:
        expected = ranks_of_probability(row["probability"])
        if ranks_of([-rank for rank in ranks]) != expected:
            fix = "it is the probability that the first response is preferred"
            raise bad_field(
                "probability", f"{row['probability']} contradicts the ranks {ranks}", fix
            )


def without_repeats(row: Row) -> Row:
    """Leave out the responses of a checked reward row that repeat an earlier one."""
    first = [i for i, text in enumerate(row["responses"]) if text not in row["responses"][:i]]
    names = [name for name in ("responses", "ranks", "scores") if name in row]
    return row | {name: [row[name][i] for i in first] for name in names}
