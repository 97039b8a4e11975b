"""Formats of named instruction and conversation sets: one row to one canonical SFT row.

A conversation set is cleaned only as far as its rows would otherwise be unusable: each format says
what it cuts, and a row that stays unusable is dropped and counted. Left out: language filters, word
filters and the conversion of HTML, which belong before training.
"""

from __future__ import annotations

import re
from typing import Any

from rlhf.config import nearest, show
from rlhf.data.rows import (
    TOOL_ROLES,
    DropRow,
    Row,
    as_content,
    as_list,
    as_prompt,
    as_text,
    bad_field,
    with_extras,
)
from rlhf.tokenizer import Message

# conf/chat_template/alpaca.jinja, alpaca_nl.jinja and dolly.jinja look for it
_INPUT_MARKER = "\n\n### Input:\n"
_CONTEXT_MARKER = "\n\nInput:\n"
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_OTHER_BOTS = ("bing", "bard")  # speakers in the published dumps other than ChatGPT


# --- Instructions -------------------------------------------------------------------------------


def alpaca_prompt(row: Row) -> list[Message]:
    """`instruction` and `input` (may be empty) as one user message."""
    content = as_text(row["instruction"], "instruction")
    extra = as_text(row.get("input", ""), "input")
    if extra.strip():
        content += _INPUT_MARKER + extra
    return [{"role": "user", "content": content}]


def format_alpaca(row: Row) -> Row:
    """`instruction`, `input` (may be empty), `output` -> one user and one assistant message.

    A non-empty input follows the instruction under "### Input:". So the `alpaca` template renders
    Alpaca's own prompt, and the text stays plain {role, content} for other templates and servers.
    """
    answer = {"role": "assistant", "content": as_text(row["output"], "output")}
    canonical = {"messages": [*alpaca_prompt(row), answer]}
    return with_extras(canonical, row, ["instruction", "input", "output"])


def format_self_instruct(row: Row) -> Row:
    """Self-Instruct's tasks: `instruction` and one entry {input, output} in `instances`."""
    instances = row["instances"]
    if not isinstance(instances, list) or not all(isinstance(one, dict) for one in instances):
        raise bad_field("instances", f"got {show(instances)}", "expected [{input, output}]")
    if len(instances) != 1:
        what = f"has {len(instances)} instances"
        raise bad_field("instances", what, "write one row per instance, each with the instruction")
    given = {k: v for k, v in instances[0].items() if v is not None}
    if "output" not in given:
        raise bad_field("instances[0].output", "missing or null", "expected text")
    rest = {name: value for name, value in row.items() if name != "instances"}
    return format_alpaca({**rest, "input": given.get("input", ""), "output": given["output"]})


def format_dolly15k(row: Row) -> Row:
    """databricks-dolly-15k: `instruction`, `context` (may be empty or absent), `response`.

    A context follows the instruction under "Input:", as in Dolly 2.0's own prompt (Alpaca's is
    "### Input:"). References such as [42], left over from Wikipedia, stay.
    """
    content = as_text(row["instruction"], "instruction")
    context = as_text(row.get("context", ""), "context")
    if context.strip():
        content += _CONTEXT_MARKER + context
    answer = {"role": "assistant", "content": as_text(row["response"], "response")}
    canonical = {"messages": [{"role": "user", "content": content}, answer]}
    return with_extras(canonical, row, ["instruction", "context", "response"])


def format_chatllama_actor(row: Row) -> Row:
    """ChatLLaMA's actor file: `user_input` and `completion`, joined unchanged."""
    canonical = {
        "prompt": as_prompt(row["user_input"], "user_input"),
        "completion": as_prompt(row["completion"], "completion"),
    }
    return with_extras(canonical, row, ["user_input", "completion"])


def format_chatllama_rlhf(row: Row) -> Row:
    """ChatLLaMA's file for PPO: `user_input`."""
    canonical = {"prompt": as_prompt(row["user_input"], "user_input")}
    return with_extras(canonical, row, ["user_input"])


def tldr_prompt(post: Row) -> str:
    """The post as text, up to where the summary begins (Stiennon et al. 2020, arXiv 2009.01325)."""
    names = ("subreddit", "title", "post")
    subreddit, title, body = (as_text(post.get(name), name).strip() for name in names)
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {body}\n\nTL;DR:"


def format_tldr(row: Row) -> Row:
    """Reddit posts with their author's summary: `subreddit`, `title`, `post`, `summary`; as text.

    The answer begins with a space, so that no token reaches across "TL;DR:".
    """
    summary = as_text(row["summary"], "summary").strip()
    canonical = {"prompt": tldr_prompt(row), "completion": f" {summary}" if summary else ""}
    return with_extras(canonical, row, ["subreddit", "title", "post", "summary", "query_token"])


# --- Conversations ------------------------------------------------------------------------------


def _cleaned(turns: list[Message]) -> list[Message]:
    """Make a conversation start with the user, end with the assistant and alternate.

    A turn that repeats the one before it is left out, and so are answers before the first question
    and questions after the last answer. A system message may come first.

    Raises:
        DropRow: nothing is left, or the speakers do not alternate.
    """
    system = turns[:1] if turns and turns[0]["role"] == "system" else []
    turns = turns[len(system) :]
    turns = [turn for i, turn in enumerate(turns) if i == 0 or turn != turns[i - 1]]
    while turns and turns[0]["role"] == "assistant":
        turns = turns[1:]
    while turns and turns[-1]["role"] == "user":
        turns = turns[:-1]
    if not turns:
        raise DropRow("no question with an answer")
    expected = ["user", "assistant"] * (len(turns) // 2)
    if [turn["role"] for turn in turns] != expected:
        raise DropRow("speakers do not alternate")
    if any(not turn["content"].strip() for turn in turns):
        raise DropRow("empty turn")
    return system + turns


def _sharegpt_turn(turn: Any, name: str) -> Message:
    if not isinstance(turn, dict):
        raise bad_field(name, f"got {show(turn)}", "expected {from, value}")
    speaker = str(turn.get("from")).lower()
    if speaker in TOOL_ROLES:
        raise DropRow("tool calls")
    if speaker in _OTHER_BOTS:
        raise DropRow("a speaker other than human, gpt and system")
    if speaker not in _SPEAKERS:
        fix = f"known speakers are {', '.join(_SPEAKERS)}.{nearest(speaker, _SPEAKERS)}"
        raise bad_field(f"{name}.from", f"got {turn.get('from')!r}", fix)
    return {"role": _SPEAKERS[speaker], "content": as_content(turn.get("value"), f"{name}.value")}


def format_sharegpt(row: Row) -> Row:
    """ShareGPT's `conversations` of {from, value}, cleaned as Vicuna's were; `items` is read too.

    Turns before the first question, after the last answer and repeated ones are left out. Rows
    without a question and its answer, with bing or bard as a speaker, with an empty turn or
    without alternation are dropped.
    """
    name = "items" if "items" in row and "conversations" not in row else "conversations"
    given = as_list(row[name])
    if not isinstance(given, list):
        raise bad_field(name, f"got {show(given)}", "expected a list of {from, value}")
    turns = [_sharegpt_turn(turn, f"{name}[{i}]") for i, turn in enumerate(given)]
    return with_extras({"messages": _cleaned(turns)}, row, [name])


def format_baize(row: Row) -> Row:
    """Baize's self-chats: `input`, one text with the tags [|Human|] and [|AI|]; `topic`.

    The text before the first tag is left out because the `baize` template writes it, and so is the
    tag at the end, where the next question would follow.
    """
    parts = re.split(r"\[\|(Human|AI)\|\]", as_text(row["input"], "input"))
    if len(parts) < 3:
        fix = "expected text with [|Human|] and [|AI|] before the turns"
        raise bad_field("input", f"got {show(row['input'])}", fix)
    roles = {"Human": "user", "AI": "assistant"}
    turns = [
        {"role": roles[tag], "content": text.strip()}
        for tag, text in zip(parts[1::2], parts[2::2], strict=True)
    ]
    return with_extras({"messages": _cleaned(turns)}, row, ["input"])
