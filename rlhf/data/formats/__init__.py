"""Formats: functions from one row of a source to a canonical row.

A new data set is one function `row -> canonical row`, given as a dotted path in `dataset.format`.
It raises `DropRow` for a row that is well formed but unusable, and KeyError, TypeError or
InputError for a malformed one. Fields that are null in the source are absent from `row`.

`plain` has those without a set's name, `preferences` those of ranked responses, `instructions`
those of named instruction and conversation sets. `rlhf.data.rows` says what a canonical row holds.
"""

from __future__ import annotations

from collections.abc import Callable

from rlhf.config import InputError, load_object, nearest
from rlhf.data.formats.instructions import (
    format_alpaca,
    format_baize,
    format_chatllama_actor,
    format_chatllama_rlhf,
    format_dolly15k,
    format_self_instruct,
    format_sharegpt,
    format_tldr,
)
from rlhf.data.formats.plain import format_messages, format_prompt_completion, format_text
from rlhf.data.formats.preferences import (
    format_alpaca_farm,
    format_chatllama_reward,
    format_hh,
    format_hh_chosen,
    format_oasst,
    format_pair,
    format_ranked,
    format_ratings,
    format_stack_exchange,
    format_summarize_from_feedback,
    format_ultrafeedback,
    merge_by_prompt,
    split_rankings,
)
from rlhf.data.rows import Row

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
    "summarize_from_feedback": format_summarize_from_feedback,
    "oasst": format_oasst,
    "hh_chosen": format_hh_chosen,
    "dolly15k": format_dolly15k,
    "self_instruct": format_self_instruct,
    "sharegpt": format_sharegpt,
    "baize": format_baize,
    "chatllama_actor": format_chatllama_actor,
    "chatllama_rlhf": format_chatllama_rlhf,
    "tldr": format_tldr,
}


# Formats whose rows are parts of canonical rows, or hold several, and what makes these of them.
GROUPED: dict[str, Callable[[list[Row]], list[Row]]] = {
    "chatllama_reward": merge_by_prompt,
    "oasst": split_rankings,
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
