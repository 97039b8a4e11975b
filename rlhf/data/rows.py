"""Canonical rows: the parsers of their fields, what each stage requires, the errors of bad rows.

A canonical row of the reward stage has `prompt`, `responses` (K >= 2 texts) and `ranks` (K whole
numbers, 0 = best, ties share one). Optional columns:
    scores       K finite numbers that do not contradict the ranks
    margin       K = 2: a number >= 0 by which the better score should lead (Llama 2)
    probability  K = 2: the probability that responses[0] is preferred (a soft label)
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from rlhf.config import InputError, nearest, show
from rlhf.tokenizer import Message

Row = dict[str, Any]
Prompt = str | list[Message]

ROLES = ("system", "user", "assistant")
_COLUMNS = ("messages", "prompt", "completion", "responses", "ranks")
TEXTS = ("messages", "prompt", "completion", "responses", "text", "subset")
TOOL_ROLES = {"tool", "function", "ipython", "observation", "tool_call", "tool_response"}
TOOL_ROLES |= {"function_call", "function_response"}
_OTHER_ROLES = {"developer": "system", "human": "user", "prompter": "user"}
_OTHER_ROLES |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant")
PER_RESPONSE = "expected a list, one entry per response"
# a conversation in a text that is no list, such as NumPy writes, without commas
_TURNS = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]:.*\}\s*\]\s*""", re.DOTALL)
_FLOAT32_MAX = 3.4028234663852886e38  # scores and margins are trained on in float32


class DropRow(Exception):
    """Raised by a format for a row that is well formed but unusable; the reason is counted."""


class BadRow(InputError):
    """A malformed row; `reason` is its fault in a few words, the same for all rows that have it."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def bad_field(name: str, what: str, fix: str) -> BadRow:
    pattern = re.sub(r"\[\d+\]", "[]", name)  # messages[3].content -> messages[].content
    return BadRow(f"field {name!r}: {what}; {fix}", f"malformed field {pattern!r}")


def unexpected(name: str, value: Any, expected: str) -> BadRow:
    return bad_field(name, f"got {show(value)}", expected)


def as_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise unexpected(name, value, "expected text")
    return value


def as_number(value: Any, name: str, fix: str) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # not math.isfinite: it fails on whole numbers beyond the range of floats
    if not is_number or not abs(value) <= _FLOAT32_MAX:
        raise bad_field(name, f"got {'null' if value is None else show(value)}", fix)
    return value


def as_list(value: Any) -> Any:
    """Read a text that holds a list (CSV has no lists) as JSON, or as Python writes it and so
    pandas; other values stay the same."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    for read in (json.loads, _literal):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found = read(value)
            return found if isinstance(found, list) else value
    return value


def _literal(text: str) -> Any:
    with warnings.catch_warnings(action="ignore"):  # of escapes that Python does not know
        return ast.literal_eval(text.strip())


def as_numbers(value: Any, name: str) -> list[float]:
    value = as_list(value)
    if not isinstance(value, list):
        raise unexpected(name, value, PER_RESPONSE)
    fix = "give each response a number, or leave it out"
    return [as_number(number, f"{name}[{i}]", fix) for i, number in enumerate(value)]


def as_records(value: Any, name: str, expected: str) -> list[Row]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise unexpected(name, value, expected)
    return value


def whole_characters(text: str) -> str:
    """Join the halves of surrogate pairs; replace a half without its other half by U+FFFD.

    Text that was cut at a number of UTF-16 units holds such a half, and no tokenizer takes it.
    """
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def repaired(value: Any, name: str, changed: list[str]) -> Any:
    """Apply `whole_characters` to every text in a value; add the names of those that change."""
    if isinstance(value, str):
        text = whole_characters(value)
        if text != value:
            changed.append(name)
        return text
    if isinstance(value, list):
        return [repaired(item, f"{name}[{i}]", changed) for i, item in enumerate(value)]
    if isinstance(value, dict):
        return {key: repaired(item, f"{name}.{key}", changed) for key, item in value.items()}
    return value


# --- Conversations ------------------------------------------------------------------------------


def as_turns(value: Any, name: str) -> list[Any]:
    """Read the turns of a conversation, which may be a list in a text; see `as_list`."""
    turns = as_list(value)
    if not isinstance(turns, list) or not turns:
        raise unexpected(name, value, "expected a list of {role, content}")
    return turns


def as_messages(value: Any, name: str) -> list[Message]:
    """Convert a conversation of a chat API or ShareGPT to turns of {role, content}.

    ShareGPT's `from` and `value` become `role` and `content`, `developer` becomes system, the
    parts of a content are joined, other keys are left out. A conversation that calls tools, or has
    parts other than text, is dropped.
    """
    turns = as_turns(value, name)
    return [_as_message(turn, f"{name}[{i}]") for i, turn in enumerate(turns)]


def _as_message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise unexpected(where, turn, "expected {role, content}")
    role, content = turn.get("role"), turn.get("content")
    if role is None and turn.get("from") is not None:
        role, content = turn["from"], turn.get("value")
    role = role.lower() if isinstance(role, str) else str(role)
    if role in TOOL_ROLES or turn.get("tool_calls") or turn.get("function_call"):
        raise DropRow("tool calls")
    if content is None and turn.get("refusal"):
        raise DropRow("a refusal in place of an answer")
    if content is None and turn.get("audio"):
        raise DropRow("parts of type 'audio'")
    role = _OTHER_ROLES.get(role, role)
    if role not in ROLES:
        fix = f"known roles are {', '.join(ROLES)}.{nearest(role, ROLES)}"
        raise unexpected(f"{where}.role", role, fix)
    return {"role": role, "content": as_content(content, f"{where}.content")}


def as_content(value: Any, name: str) -> str:
    """Return the text of a message, which may be a list of text parts."""
    if not isinstance(value, list):
        return as_text(value, name)
    texts = []
    for i, part in enumerate(value):
        part = {"text": part} if isinstance(part, str) else part
        if not isinstance(part, dict):
            raise unexpected(f"{name}[{i}]", part, "expected {type: text, text}")
        if part.get("type") not in (None, "text", "input_text", "output_text"):
            raise DropRow(f"parts of type {show(part['type'])}")
        texts.append(as_text(part.get("text"), f"{name}[{i}].text"))
    return "".join(texts)


def as_prompt(value: Any, name: str) -> Prompt:
    """Read a text, or a conversation, which may be a list in a text; see `as_list`."""
    if not isinstance(value, str):
        return as_messages(value, name)
    turns = as_list(value)
    if isinstance(turns, str) and _TURNS.fullmatch(turns):
        raise unexpected(name, value, "write the conversation as JSON: json.dumps(turns)")
    is_conversation = isinstance(turns, list) and all(
        isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns
    )
    return as_messages(turns, name) if turns and is_conversation else value


# --- Columns ------------------------------------------------------------------------------------


def with_extras(canonical: Row, row: Row, used: Iterable[str] = ()) -> Row:
    """Add the columns of the source that the format did not use; see `with_system`."""
    extras = {k: v for k, v in row.items() if k not in (*_COLUMNS, *used)}
    return with_system(extras | canonical)


def with_system(row: Row) -> Row:
    """Put the text in the column `system` before a conversation that has no system message, as in
    Anthropic's API."""
    name, system = "messages" if "messages" in row else "prompt", row.get("system")
    turns = row.get(name)
    if not isinstance(system, str) or not system.strip() or not isinstance(turns, list):
        return row
    if turns[0]["role"] == "system":
        return row
    rest = {column: value for column, value in row.items() if column != "system"}
    return rest | {name: [{"role": "system", "content": system}, *turns]}


def ranks_of(scores: list[float]) -> list[int]:
    """Scores [2, 5, 5, 0] -> ranks [1, 0, 0, 2]."""
    order = sorted(set(scores), reverse=True)
    return [order.index(score) for score in scores]


def ranks_of_probability(value: Any) -> list[int]:
    fix = "expected a number from 0 to 1"
    probability = as_number(value, "probability", fix)
    if not 0 <= probability <= 1:
        raise unexpected("probability", probability, fix)
    return ranks_of([probability, 1 - probability])


def without_nulls(raw: Row) -> Row:
    """Leave out the fields that Arrow and CSV fill with None: they are missing."""
    return {name: value for name, value in raw.items() if value is not None}


def as_rows(made: Row | list[Row]) -> list[Row]:
    """What a format made of one row, as a list."""
    return made if isinstance(made, list) else [made]


# --- Whole rows ---------------------------------------------------------------------------------


def is_text(row: Row) -> bool:
    """True for plain text, which has neither prompt nor answer."""
    return "text" in row and "prompt" not in row and "messages" not in row


def prompt_of(row: Row) -> Prompt:
    """Prompt of a canonical row: `prompt`, or `messages` before the last assistant message; the
    whole of a plain text."""
    if is_text(row):
        return row["text"]
    if "messages" not in row:
        return row["prompt"]
    messages = row["messages"]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: answers[-1]] if answers else messages


def other_columns(rows: Iterable[Row]) -> list[str]:
    """Names of all columns that rows have next to their prompt, in order."""
    return list(dict.fromkeys(name for row in rows for name in row if name != "prompt"))


def prompt_key(row: Row) -> str:
    """A text that is equal for rows with the same prompt."""
    prompt = prompt_of(row)
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def different_prompts(rows: Iterable[Row]) -> list[Row]:
    """The first row of each prompt."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(prompt_key(row), row)
    return list(first.values())


def check_row(row: Row, stage: str) -> None:
    """Raise DropRow if `stage` cannot use a canonical row ("ptx": text, or an SFT row), and
    InputError or KeyError if the row is malformed."""
    if (stage == "ptx" and "text" in row) or (stage == "sft" and is_text(row)):
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
    trained = row[name] if name == "messages" else as_prompt(row[name], name)
    if name == "completion" and isinstance(trained, str) != isinstance(row["prompt"], str):
        what = "is text and 'prompt' is a conversation, or the reverse"
        raise bad_field(name, what, "make both text or both conversations")
    answers: list[Any] = [trained]
    if isinstance(trained, list):
        answers = [m["content"] for m in trained if m["role"] == "assistant"]
    if not answers:
        raise bad_field(name, "has no assistant turn", "SFT trains on the assistant's turns")
    if not all(answer.strip() for answer in answers):
        raise DropRow("empty response")


def _check_ranked(row: Row) -> None:
    responses, ranks = row["responses"], row["ranks"]
    for name in ("responses", "ranks"):
        if not isinstance(row[name], list):
            raise unexpected(name, row[name], PER_RESPONSE)
    for i, response in enumerate(responses):
        as_text(response, f"responses[{i}]")
    whole = [isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks]
    if not all(whole) or any(abs(rank) >= 2**31 for rank in ranks):
        raise unexpected("ranks", ranks, "expected whole numbers, 0 = best")
    _require_as_many(ranks, responses, "ranks", "rank or score")
    if len(responses) < 2:
        raise DropRow("only one response" if responses else "no response")
    _check_strength(row)
    if not all(response.strip() for response in responses):
        raise DropRow("empty response")
    if len(set(zip(responses, ranks, strict=True))) > len(set(responses)):
        raise DropRow("identical responses ranked differently")
    if len(set(ranks)) == 1:
        raise DropRow("all ranks tied")


def _require_as_many(values: list[Any], responses: list[str], name: str, one: str) -> None:
    if len(values) != len(responses):
        what = f"{len(values)} for {len(responses)} responses"
        raise bad_field(name, what, f"give one {one} per response")


def _check_strength(row: Row) -> None:
    """Check the optional columns: `scores`, `margin`, `probability`."""
    ranks = row["ranks"]
    if "scores" in row:
        scores = as_numbers(row["scores"], "scores")
        _require_as_many(scores, row["responses"], "scores", "score")
        pairs = list(zip(ranks, scores, strict=True))
        if any(rank < other and score < lower for rank, score in pairs for other, lower in pairs):
            fix = "rank 0 and the highest score are the best"
            raise bad_field("ranks", "disagree with 'scores'", fix)
    for name in ("margin", "probability"):
        if name in row and len(ranks) != 2:
            raise bad_field(name, f"given for {len(ranks)} responses", "only a pair can have one")
    at_least_0 = "expected a number >= 0"
    if "margin" in row and as_number(row["margin"], "margin", at_least_0) < 0:
        raise unexpected("margin", row["margin"], at_least_0)
    if "probability" in row:
        if ranks_of([-rank for rank in ranks]) != ranks_of_probability(row["probability"]):
            what = f"{row['probability']} contradicts the ranks {ranks}"
            fix = "it is the probability that the first response is preferred"
            raise bad_field("probability", what, fix)


def without_repeats(row: Row) -> Row:
    """Leave out the responses of a checked reward row that repeat an earlier response."""
    first = [i for i, text in enumerate(row["responses"]) if text not in row["responses"][:i]]
    names = [name for name in ("responses", "ranks", "scores") if name in row]
    return row | {name: [row[name][i] for i in first] for name in names}
