"""Formats of preference sets: ranked responses, pairs, ratings."""

from __future__ import annotations

import re
from typing import Any

from rlhf.data.formats.instructions import alpaca_prompt, as_tagged, tldr_prompt
from rlhf.data.rows import (
    DropRow,
    Prompt,
    Row,
    as_list,
    as_number,
    as_numbers,
    as_prompt,
    as_records,
    as_text,
    bad_field,
    prompt_key,
    ranks_of,
    ranks_of_probability,
    unexpected,
    with_extras,
)
from rlhf.tokenizer import Message


def _user_prompt(prompt: Prompt) -> list[Message]:
    """Make text one user turn; a conversation stays."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _scored(row: Row, name: str, text: str, scores: list[str]) -> Row:
    """`responses`, `scores` and `ranks` from the list row[name] of {text, score}.

    The score of all of them is the first field of `scores` that any of them has.
    """
    items = as_records(row[name], name, f"expected a list of {{{text}, {scores[0]}}}")
    known = [score for score in scores if any(item.get(score) is not None for item in items)]
    score, fix = (known or scores)[0], "score every one (0 is a score), or leave it out"
    responses, numbers = [], []
    for i, item in enumerate(items):
        responses.append(as_text(item.get(text), f"{name}[{i}].{text}"))
        numbers.append(as_number(item.get(score), f"{name}[{i}].{score}", fix))
    return {"responses": responses, "scores": numbers, "ranks": ranks_of(numbers)}


def _hh_turns(text: Any, name: str) -> list[Message]:
    parts = re.split(r"\n\n(Human|Assistant):", as_text(text, name))
    if len(parts) < 3 or parts[0].strip():
        raise unexpected(name, text, r"expected text that starts with '\n\nHuman:'")
    turns = as_tagged(parts, {"Human": "user", "Assistant": "assistant"})
    if turns[-1]["role"] != "assistant":
        raise DropRow("last turn not the assistant's")
    return turns


def format_hh(row: Row) -> Row:
    """Anthropic's HH pairs: `chosen` and `rejected` are whole dialogues that share a prompt."""
    chosen, rejected = (_hh_turns(row[name], name) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise DropRow("prompts differ")
    responses = [chosen[-1]["content"], rejected[-1]["content"]]
    canonical = {"prompt": chosen[:-1], "responses": responses, "ranks": [0, 1]}
    return with_extras(canonical, row, ["chosen", "rejected"])


def format_hh_chosen(row: Row) -> Row:
    """The preferred dialogue of an HH pair as a demonstration: loss on its last answer only."""
    turns = _hh_turns(row["chosen"], "chosen")
    canonical = {"prompt": turns[:-1], "completion": turns[-1:]}
    return with_extras(canonical, row, ["chosen", "rejected"])


def format_chosen(row: Row) -> Row:
    """The preferred answer of a pair as a demonstration: `chosen`, a conversation, or a text with
    its `prompt`; loss on the last answer only."""
    context, answer = _side(row, "chosen")
    prompt = as_prompt(row["prompt"], "prompt") if context is None else context
    completion = [{"role": "assistant", "content": answer}]
    canonical = {"prompt": prompt, "completion": answer if isinstance(prompt, str) else completion}
    return with_extras(canonical, row, ["chosen", "rejected"])


def format_ranked(row: Row) -> Row:
    """`prompt`, `responses`, and `ranks` (0 = best) or `scores` (higher is better), or both.

    Two responses may have `probability` (that the first is preferred) in place of ranks.
    """
    if "ranks" in row:
        ranks = ranks_of([-rank for rank in as_numbers(row["ranks"], "ranks")])
    elif "scores" in row:
        ranks = ranks_of(as_numbers(row["scores"], "scores"))
    elif "probability" in row:
        ranks = ranks_of_probability(row["probability"])
    else:
        raise bad_field("ranks", "missing or null, and so is 'scores'", "give one of the two")
    return _ranking(row, ranks)


def _ranking(row: Row, ranks: list[int]) -> Row:
    prompt, responses = as_prompt(row["prompt"], "prompt"), as_list(row["responses"])
    canonical: Row = {"prompt": prompt, "responses": responses, "ranks": ranks}
    if "scores" in row:
        canonical["scores"] = as_numbers(row["scores"], "scores")
    return with_extras(canonical, row)


def format_ratings(row: Row) -> Row:
    """`prompt`, `responses`, `ratings` (higher is better, equal ones tie) and `scale` [low, high].

    The ratings become the scores, unchanged. Without a scale any finite number is a rating.
    """
    ratings = as_numbers(row["ratings"], "ratings")
    if "scale" in row:
        scale = as_numbers(row["scale"], "scale")
        if len(scale) != 2 or scale[0] >= scale[1]:
            raise unexpected("scale", scale, "expected [lowest, highest] rating")
        for i, rating in enumerate(ratings):
            if not scale[0] <= rating <= scale[1]:
                fix = f"'scale' is {scale[0]} to {scale[1]}; correct one of them"
                raise unexpected(f"ratings[{i}]", rating, fix)
    rest = {name: value for name, value in row.items() if name not in ("ratings", "scale")}
    return _ranking(rest | {"scores": ratings}, ranks_of(ratings))


def _side(row: Row, name: str) -> tuple[list[Message] | None, str]:
    """The turns before an answer of a pair, None if it is text; and the answer."""
    side = as_prompt(row[name], name)
    if isinstance(side, str):
        return None, side
    if side[-1]["role"] != "assistant":
        raise bad_field(name, f"ends in a {side[-1]['role']} turn", "end it in the assistant's")
    return side[:-1], side[-1]["content"]


def format_pair(row: Row) -> Row:
    """`prompt`, `chosen`, `rejected`, each text or a conversation.

    A conversation in `chosen` or `rejected` ends with the assistant's answer. The turns before it
    are the prompt; a column `prompt` must then be the same conversation, or its last turn.
    Optional: `margin`, `probability` (that `chosen` is preferred), `score_chosen` and
    `score_rejected`; equal scores do not change the preference.
    """
    (context, chosen), (other, rejected) = (_side(row, name) for name in ("chosen", "rejected"))
    if (context or []) != (other or []):
        raise DropRow("prompts differ")
    prompt: Prompt = context or as_prompt(row["prompt"], "prompt")
    given = as_prompt(row["prompt"], "prompt") if "prompt" in row else prompt
    if context and given not in (prompt, context[-1]["content"]):
        what = "differs from the turns before the answer in 'chosen'"
        raise bad_field("prompt", what, "remove one")
    if context is not None:
        prompt = _user_prompt(prompt)
    responses = [chosen, rejected]
    ranks = [0, 0] if row.get("probability") == 0.5 else [0, 1]
    canonical: Row = {"prompt": prompt, "responses": responses, "ranks": ranks}
    names = ("score_chosen", "score_rejected")
    if any(name in row for name in names):
        scores = [as_number(row[name], name, "score both responses or neither") for name in names]
        if scores[0] < scores[1]:
            raise DropRow("scores contradict the preference")
        canonical["scores"] = scores
    return with_extras(canonical, row, ["chosen", "rejected", *names])


def format_alpaca_farm(row: Row) -> Row:
    """AlpacaFarm's and AlpacaEval's pairs: `instruction`, `input`, `output_1`, `output_2`.

    `preference` is 1 or 2, the better output; 0 or 1.5 is a tie. Between 1 and 2 it is a soft
    label: 1 + the probability that output_2 is preferred.
    """
    fix = "expected 1 or 2, the better output; between them a soft label; or 0, a tie"
    preference = as_number(row["preference"], "preference", fix)
    if preference != 0 and not 1 <= preference <= 2:
        raise unexpected("preference", preference, fix)
    probability = 2 - preference if preference else 0.5
    names = ["output_1", "output_2"]
    canonical: Row = {
        "prompt": alpaca_prompt(row),
        "responses": [as_text(row[name], name) for name in names],
        "ranks": ranks_of_probability(probability),
    }
    if 0 < probability < 1:
        canonical["probability"] = probability
    return with_extras(canonical, row, ["instruction", "input", "preference", *names])


def format_ultrafeedback(row: Row) -> Row:
    """UltraFeedback's `instruction` and `completions`, or its binarized pairs.

    A completion has `response` and `overall_score`, or `fine-grained_score` where no completion of
    the row has `overall_score`. Binarized: see `format_pair`, but equal scores are a tie.
    """
    if "completions" not in row:
        pair = format_pair(row)
        return pair | {"ranks": ranks_of([row["score_chosen"], row["score_rejected"]])}
    canonical = _scored(row, "completions", "response", ["overall_score", "fine-grained_score"])
    canonical["prompt"] = _user_prompt(as_prompt(row["instruction"], "instruction"))
    return with_extras(canonical, row, ["instruction", "completions"])


def format_stack_exchange(row: Row) -> Row:
    """StackExchange's `question` with `response_j` (preferred) and `response_k`, or with `answers`.

    An answer has `text` and `pm_score` (log2 of the votes, plus 1 if it was accepted). HTML is not
    converted.
    """
    names = ["response_j", "response_k"]
    if "answers" in row:
        canonical = _scored(row, "answers", "text", ["pm_score"])
    else:
        responses = [as_text(row[name], name) for name in names]
        canonical = {"responses": responses, "ranks": [0, 1]}
    canonical["prompt"] = _user_prompt(as_prompt(row["question"], "question"))
    return with_extras(canonical, row, ["question", "answers", *names])


def format_summarize_from_feedback(row: Row) -> Row:
    """OpenAI's comparisons of summaries: `info` (the post), two `summaries`, `choice` (0 or 1).

    Prompt and answers have the form of `format_tldr`. Posts without a subreddit (the CNN articles
    of the validation split) are dropped. Other columns, which repeat every text, are left out.
    """
    info = row["info"]
    if not isinstance(info, dict):
        raise unexpected("info", info, "expected {subreddit, title, post}")
    fix = "expected two of {text}"
    summaries = as_records(row["summaries"], "summaries", fix)
    if len(summaries) != 2:
        raise unexpected("summaries", summaries, fix)
    if row["choice"] not in (0, 1):
        raise unexpected("choice", row["choice"], "expected 0 or 1, the better one")
    if not info.get("subreddit"):
        raise DropRow("no subreddit")
    texts = [as_text(summary.get("text"), "summaries.text") for summary in summaries]
    return {
        "prompt": tldr_prompt(info),
        "responses": [" " + text.strip() for text in texts],
        "ranks": [int(row["choice"] != i) for i in range(2)],
    }


def format_chatllama_reward(row: Row) -> Row:
    """ChatLLaMA's `user_input`, `completion`, `score`: `merge_by_prompt` makes rankings of them."""
    fix = "score every completion (0 is a score), or remove the row"
    canonical = {
        "prompt": as_prompt(row["user_input"], "user_input"),
        "responses": [as_text(row["completion"], "completion")],
        "scores": [as_number(row.get("score"), "score", fix)],
    }
    return with_extras(canonical, row, ["user_input", "completion", "score"])


def merge_by_prompt(rows: list[Row]) -> list[Row]:
    """Make one ranking of the scored responses of each prompt, in the order of the source.

    Other columns come from the prompt's first row.
    """
    merged: dict[str, Row] = {}
    for row in rows:
        into = merged.setdefault(prompt_key(row), row | {"responses": [], "scores": []})
        into["responses"] += row["responses"]
        into["scores"] += row["scores"]
    return [row | {"ranks": ranks_of(row["scores"])} for row in merged.values()]


def _ranked_siblings(node: Row, before: list[Message]) -> list[Row]:
    """One row for each user turn of a tree with at least two ranked answers."""
    roles = {"prompter": "user", "assistant": "assistant"}
    fix = "expected {text, role: prompter or assistant, replies: a list of the same}"
    if not isinstance(node, dict):
        raise unexpected("prompt", node, fix)
    role, replies = node.get("role"), as_records(node.get("replies") or [], "replies", fix)
    if role not in roles:
        raise unexpected("role", role, fix)
    path = [*before, {"role": roles[role], "content": as_text(node.get("text"), "text")}]
    ranked = [reply for reply in replies if reply.get("rank") is not None]
    rows: list[Row] = []
    if role == "prompter" and len(ranked) > 1:
        expected = "expected 0, the best, 1, ..."
        ranks = ranks_of([-as_number(reply["rank"], "rank", expected) for reply in ranked])
        responses = [as_text(reply.get("text"), "text") for reply in ranked]
        rows.append({"prompt": path, "responses": responses, "ranks": ranks})
    return rows + [row for reply in replies for row in _ranked_siblings(reply, path)]


def format_oasst(row: Row) -> list[Row]:
    """OpenAssistant's trees: `prompt`, the first message, of {text, role, rank, replies}.

    Every user turn with at least two ranked answers becomes one ranking; its prompt is the path
    from the root. Answers without a rank only lead to further turns.
    """
    rankings = _ranked_siblings(row["prompt"], [])
    if not rankings:
        raise DropRow("no turn with two ranked answers")
    return rankings
