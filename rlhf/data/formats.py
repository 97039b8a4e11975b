"""Formats: functions from one row of a source to a canonical row, and the checks of such rows.

A new data set is one function `row -> canonical row`, given as a dotted path in `dataset.format`.
It raises `DropRow` for a row that is well formed but unusable, and KeyError, TypeError or
InputError for a malformed one. Fields that are null in the source are absent from `row`.

A canonical row of the reward stage has `prompt`, `responses` (K >= 2 texts) and `ranks` (K whole
numbers, 0 = best, ties share one), and where the source has them
    scores       K finite numbers that nowhere contradict the ranks
    margin       K = 2: a number >= 0, by which the better score should lead (Llama 2)
    probability  K = 2: a number in [0, 1], that responses[0] is preferred (a soft label)
"""

from __future__ import annotations

import json
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


def _number(value: Any, name: str, fix: str) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise _bad(name, f"got {'null' if value is None else show(value)}", fix)
    return value


def _numbers(value: Any, name: str) -> list[float]:
    if not isinstance(value, list):
        raise _bad(name, f"got {show(value)}", "expected a list, one entry per response")
    fix = "give each response a number, or leave it out"
    return [_number(number, f"{name}[{i}]", fix) for i, number in enumerate(value)]


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


def _alpaca_prompt(row: Row) -> list[Message]:
    content = _text(row["instruction"], "instruction")
    extra = _text(row.get("input", ""), "input")
    if extra.strip():
        content += _INPUT_MARKER + extra
    return [{"role": "user", "content": content}]


def format_alpaca(row: Row) -> Row:
    """`instruction`, `input` (may be empty), `output` -> one user and one assistant message.

    A non-empty input follows the instruction under "### Input:". So the `alpaca` template renders
    Alpaca's own prompt, and the text stays plain {role, content} for other templates and servers.
    """
    answer = {"role": "assistant", "content": _text(row["output"], "output")}
    canonical = {"messages": [*_alpaca_prompt(row), answer]}
    return _with_extras(canonical, row, ["instruction", "input", "output"])


# --- Preferences --------------------------------------------------------------------------------


def _ranks_of(scores: list[float]) -> list[int]:
    """Scores [2, 5, 5, 0] -> ranks [1, 0, 0, 2]."""
    order = sorted(set(scores), reverse=True)
    return [order.index(score) for score in scores]


def _ranks_of_probability(value: Any) -> list[int]:
    fix = "expected a number from 0 to 1"
    probability = _number(value, "probability", fix)
    if not 0 <= probability <= 1:
        raise _bad("probability", f"got {probability}", fix)
    return _ranks_of([probability, 1 - probability])


def _user_prompt(value: Any, name: str) -> list[Message]:
    """Make text one user turn; a conversation stays."""
    return (
        [{"role": "user", "content": value}] if isinstance(value, str) else _messages(value, name)
    )


def _scored(row: Row, name: str, text: str, scores: list[str]) -> Row:
    """`responses`, `scores` and `ranks` from the list row[name] of {text, score}.

    The score of all of them is the first of the fields `scores` that any of them has.
    """
    items = row[name]
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise _bad(name, f"got {show(items)}", f"expected a list of {{{text}, {scores[0]}}}")
    known = [score for score in scores if any(item.get(score) is not None for item in items)]
    score, fix = (known or scores)[0], "score every one (0 is a score), or leave it out"
    rows = list(enumerate(items))
    responses = [_text(item.get(text), f"{name}[{i}].{text}") for i, item in rows]
    numbers = [_number(item.get(score), f"{name}[{i}].{score}", fix) for i, item in rows]
    return {"responses": responses, "scores": numbers, "ranks": _ranks_of(numbers)}


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
    """`prompt`, `responses`, and `ranks` (0 = best) or `scores` (higher is better), or both.

    Of two responses, `probability` (that the first is preferred) may stand in place of ranks.
    """
    if "ranks" in row:
        ranks = _ranks_of([-rank for rank in _numbers(row["ranks"], "ranks")])
    elif "scores" in row:
        ranks = _ranks_of(_numbers(row["scores"], "scores"))
    elif "probability" in row:
        ranks = _ranks_of_probability(row["probability"])
    else:
        raise _bad("ranks", "missing or null, and so is 'scores'", "give one of the two")
    prompt = _prompt(row["prompt"], "prompt")
    return _with_extras({"prompt": prompt, "responses": row["responses"], "ranks": ranks}, row, [])


def format_ratings(row: Row) -> Row:
    """`prompt`, `responses`, `ratings` (higher is better, equal ones tie) and `scale` [low, high].

    The ratings become the scores as they are. Without a scale any finite number is a rating.
    """
    ratings = _numbers(row["ratings"], "ratings")
    if "scale" in row:
        scale = _numbers(row["scale"], "scale")
        if len(scale) != 2 or scale[0] >= scale[1]:
            raise _bad("scale", f"got {show(scale)}", "expected [lowest, highest] rating")
        for i, rating in enumerate(ratings):
            if not scale[0] <= rating <= scale[1]:
                fix = f"'scale' is {scale[0]} to {scale[1]}; correct one of them"
                raise _bad(f"ratings[{i}]", f"got {rating}", fix)
    canonical = {
        "prompt": _prompt(row["prompt"], "prompt"),
        "responses": row["responses"],
        "ranks": _ranks_of(ratings),
        "scores": ratings,
    }
    return _with_extras(canonical, row, ["ratings", "scale"])


def format_pair(row: Row) -> Row:
    """`prompt`, `chosen`, `rejected`, each text or a conversation.

    A conversation in `chosen` or `rejected` ends in the assistant's answer. What stands before it
    is the prompt; a column `prompt` must then say the same, as a conversation or as its last turn.
    Optional: `margin`, `probability` (that `chosen` is preferred), `score_chosen` and
    `score_rejected`; equal scores leave the preference as it is.
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
    ranks = [0, 0] if row.get("probability") == 0.5 else [0, 1]
    canonical: Row = {"prompt": prompt, "responses": responses, "ranks": ranks}
    names = ("score_chosen", "score_rejected")
    if any(name in row for name in names):
        scores = [_number(row[name], name, "score both responses or neither") for name in names]
        if scores[0] < scores[1]:
            raise DropRow("scores contradict the preference")
        canonical["scores"] = scores
    return _with_extras(canonical, row, ["chosen", "rejected", *names])


def format_alpaca_farm(row: Row) -> Row:
    """AlpacaFarm's and AlpacaEval's pairs: `instruction`, `input`, `output_1`, `output_2`.

    `preference` is 1 or 2, the better output; 0 or 1.5 is a tie. Between 1 and 2 it is a soft
    label: 1 + the probability that output_2 is preferred.
    """
    fix = "expected 1 or 2, the better output; between them a soft label; or 0, a tie"
    preference = _number(row["preference"], "preference", fix)
    if preference != 0 and not 1 <= preference <= 2:
        raise _bad("preference", f"got {show(preference)}", fix)
    probability = 2 - preference if preference else 0.5
    names = ["output_1", "output_2"]
    canonical: Row = {
        "prompt": _alpaca_prompt(row),
        "responses": [_text(row[name], name) for name in names],
        "ranks": _ranks_of_probability(probability),
    }
    if 0 < probability < 1:
        canonical["probability"] = probability
    return _with_extras(canonical, row, ["instruction", "input", "preference", *names])


def format_ultrafeedback(row: Row) -> Row:
    """UltraFeedback's `instruction` and `completions`, or its binarized pairs.

    Of each completion `response` and `overall_score` are read, or where no completion of the row
    has that, `fine-grained_score`. Binarized: see `format_pair`; the preference was read off
    `score_chosen` and `score_rejected`, so equal scores are a tie.
    """
    if "completions" not in row:
        pair = format_pair(row)
        return pair | {"ranks": _ranks_of([row["score_chosen"], row["score_rejected"]])}
    canonical = _scored(row, "completions", "response", ["overall_score", "fine-grained_score"])
    canonical["prompt"] = _user_prompt(row["instruction"], "instruction")
    return _with_extras(canonical, row, ["instruction", "completions"])


def format_stack_exchange(row: Row) -> Row:
    """StackExchange's `question` with `response_j` (preferred) and `response_k`, or with `answers`.

    Of each answer `text` and `pm_score` are read (log2 of the votes, plus 1 if it was accepted).
    Texts stay as they are: HTML is not converted.
    """
    names = ["response_j", "response_k"]
    if "answers" in row:
        canonical = _scored(row, "answers", "text", ["pm_score"])
    else:
        responses = [_text(row[name], name) for name in names]
        canonical = {"responses": responses, "ranks": [0, 1]}
    canonical["prompt"] = _user_prompt(row["question"], "question")
    return _with_extras(canonical, row, ["question", "answers", *names])


def format_chatllama_reward(row: Row) -> Row:
    """ChatLLaMA's `user_input`, `completion`, `score`: a part of a ranking (see `GROUPED`)."""
    fix = "score every completion (0 is a score), or remove the row"
    canonical = {
        "prompt": _prompt(row["user_input"], "user_input"),
        "responses": [_text(row["completion"], "completion")],
        "scores": [_number(row.get("score"), "score", fix)],
        "ranks": [0],
    }
    return _with_extras(canonical, row, ["user_input", "completion", "score"])


def merge_by_prompt(rows: list[Row]) -> list[Row]:
    """Make one ranking of the scored responses of each prompt, in the order of the source.

    Columns that are not canonical are those of the prompt's first row.
    """
    merged: dict[str, Row] = {}
    for row in rows:
        key = json.dumps(row["prompt"], sort_keys=True)
        into = merged.setdefault(key, {**row, "responses": [], "scores": []})
        into["responses"] += row["responses"]
        into["scores"] += row["scores"]
    return [{**row, "ranks": _ranks_of(row["scores"])} for row in merged.values()]


FORMATS: dict[str, Callable[[Row], Row]] = {
    "messages": format_messages,
    "prompt_completion": format_prompt_completion,
    "text": format_text,
    "alpaca": format_alpaca,
    "hh": format_hh,
    "ranked": format_ranked,
    "pair": format_pair,
    "ratings": format_ratings,
    "alpaca_farm": format_alpaca_farm,
    "ultrafeedback": format_ultrafeedback,
    "stack_exchange": format_stack_exchange,
    "chatllama_reward": format_chatllama_reward,
}

# Formats whose rows are parts of canonical rows, and what puts the parts together.
GROUPED: dict[str, Callable[[list[Row]], list[Row]]] = {"chatllama_reward": merge_by_prompt}


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
    for name in ("responses", "ranks"):
        if not isinstance(row[name], list):
            raise _bad(name, f"got {show(row[name])}", "expected a list, one entry per response")
    for i, response in enumerate(responses):
        _text(response, f"responses[{i}]")
    if any(not isinstance(rank, int) or isinstance(rank, bool) for rank in ranks):
        raise _bad("ranks", f"got {show(ranks)}", "expected whole numbers, 0 = best")
    if len(responses) != len(ranks):
        what = f"{len(ranks)} for {len(responses)} responses"
        raise _bad("ranks", what, "give one rank or score per response")
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
        scores = _numbers(row["scores"], "scores")
        if len(scores) != len(ranks):
            what = f"{len(scores)} for {len(ranks)} responses"
            raise _bad("scores", what, "give one score per response")
        pairs = list(zip(ranks, scores, strict=True))
        if any(rank < other and score < lower for rank, score in pairs for other, lower in pairs):
            fix = "rank 0 and the highest score are the best"
            raise _bad("ranks", "disagree with 'scores'", fix)
    for name in ("margin", "probability"):
        if name in row and len(ranks) != 2:
            raise _bad(name, f"given for {len(ranks)} responses", "only a pair can have one")
    if "margin" in row and _number(row["margin"], "margin", "expected a number >= 0") < 0:
        raise _bad("margin", f"got {row['margin']}", "expected a number >= 0")
    if "probability" in row:
        expected = _ranks_of_probability(row["probability"])
        if _ranks_of([-rank for rank in ranks]) != expected:
            fix = "it is the probability that the first response is preferred"
            raise _bad("probability", f"{row['probability']} contradicts the ranks {ranks}", fix)


def without_repeats(row: Row) -> Row:
    """Leave out the responses of a checked reward row that repeat an earlier one."""
    first = [i for i, text in enumerate(row["responses"]) if text not in row["responses"][:i]]
    names = [name for name in ("responses", "ranks", "scores") if name in row]
    return row | {name: [row[name][i] for i in first] for name in names}
