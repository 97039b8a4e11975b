"""Formats: functions from one row of a source to a canonical row.

A new data set is one function `row -> canonical row`, given as a dotted path in `dataset.format`.
It may return a list of rows. It raises `DropRow` for a row that is well formed but unusable, and
KeyError, TypeError or InputError for a malformed one. Fields that are null in the source are absent
from `row`.

`preferences` has the formats of ranked responses, `instructions` all others. `rlhf.data.rows` says
what a canonical row holds.
"""

from __future__ import annotations

from collections.abc import Callable

from rlhf.config import InputError, load_object, nearest
from rlhf.data.formats import instructions, preferences
from rlhf.data.formats.preferences import merge_by_prompt
from rlhf.data.rows import Row

Format = Callable[[Row], Row | list[Row]]

# name -> the function, and the fields that a row must have
TABLE: dict[str, tuple[Format, tuple[str, ...]]] = {
    "messages": (instructions.format_messages, ("messages",)),
    "prompt_completion": (instructions.format_prompt_completion, ("prompt", "completion")),
    "question_answer": (instructions.format_question_answer, ("question", "answer")),
    "instruction": (instructions.format_instruction, ("instruction",)),
    "chosen": (preferences.format_chosen, ("chosen",)),
    "text": (instructions.format_text, ("text",)),
    "alpaca": (instructions.format_alpaca, ("instruction", "output")),
    "hh": (preferences.format_hh, ("chosen", "rejected")),
    "ranked": (preferences.format_ranked, ("prompt", "responses")),
    "pair": (preferences.format_pair, ("prompt", "chosen", "rejected")),
    "ratings": (preferences.format_ratings, ("prompt", "responses", "ratings")),
    "alpaca_farm": (
        preferences.format_alpaca_farm,
        ("instruction", "output_1", "output_2", "preference"),
    ),
    "ultrafeedback": (preferences.format_ultrafeedback, ("instruction",)),
    "stack_exchange": (preferences.format_stack_exchange, ("question", "response_j", "response_k")),
    "chatllama_reward": (
        preferences.format_chatllama_reward,
        ("user_input", "completion", "score"),
    ),
    "summarize_from_feedback": (
        preferences.format_summarize_from_feedback,
        ("info", "summaries", "choice"),
    ),
    "oasst": (preferences.format_oasst, ("prompt",)),
    "hh_chosen": (preferences.format_hh_chosen, ("chosen",)),
    "dolly15k": (instructions.format_dolly15k, ("instruction", "response")),
    "self_instruct": (instructions.format_self_instruct, ("instruction", "instances")),
    "sharegpt": (instructions.format_sharegpt, ("conversations",)),
    "baize": (instructions.format_baize, ("input",)),
    "chatllama_actor": (instructions.format_chatllama_actor, ("user_input", "completion")),
    "chatllama_rlhf": (instructions.format_chatllama_rlhf, ("user_input",)),
    "tldr": (instructions.format_tldr, ("subreddit", "title", "post", "summary")),
}
FORMATS = {name: format for name, (format, _) in TABLE.items()}
FIELDS = {name: fields for name, (_, fields) in TABLE.items()}  # PPO needs the first one alone

# Formats whose rows hold one scored response each; `merge_by_prompt` makes rankings of them
ONE_RESPONSE_PER_ROW = {"chatllama_reward"}


def resolve_format(name: str) -> Format:
    """Return the format function: a name in `FORMATS`, or a dotted path to the user's own."""
    if name in FORMATS:
        return FORMATS[name]
    if "." in name:
        return load_object(name, "dataset.format")
    raise InputError(
        f"dataset.format={name!r} is neither one of {', '.join(FORMATS)} nor a dotted path such as "
        f"my_module.my_format.{nearest(name, FORMATS)}"
    )
