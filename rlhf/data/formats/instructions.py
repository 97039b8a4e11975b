"""Formats of demonstrations and prompts: messages, plain text, instruction and conversation sets.

A conversation set is cleaned only as far as its rows would otherwise be unusable: each format says
what it cuts, and a row that stays unusable is dropped and counted. Left out: language filters, word
filters and the conversion of HTML, which belong before training.
"""

from __future__ import annotations

import re
from typing import Any

from rlhf.config import nearest
from rlhf.data.rows import (
    TOOL_ROLES,
    DropRow,
    Row,
    as_content,
    as_list,
    as_messages,
    as_prompt,
    as_records,
    as_text,
    as_turns,
    bad_field,
    unexpected,
    with_extras,
)
from rlhf.tokenizer import Message

_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant"}
_SPEAKERS |= {"assistant": "assistant", "system": "system"}
_OTHER_BOTS = ("bing", "bard")  # speakers in the published dumps other than ChatGPT


# --- Formats without a data set's name ----------------------------------------------------------


def format_messages(row: Row) -> Row:
    """`messages` of {role, content}; or ShareGPT's `conversations` of {from, value}.

    An answer of weight 0 carries no loss.
    """
    name = "conversations" if "messages" not in row and "conversations" in row else "messages"
    messages = as_messages(row[name], name)
    return with_extras(_weighted(messages, as_turns(row[name], name), name), row, [name])


def _weighted(messages: list[Message], turns: list[Any], name: str) -> Row:
    """Leave loss on the answers whose weight is not 0, as OpenAI's fine-tuning does.

    A canonical row can express that only for the last answer, as its completion.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    weights = {i: turns[i].get("weight") for i in answers}
    for i, weight in weights.items():
        if weight not in (None, 0, 1):
            raise unexpected(f"{name}[{i}].weight", weight, "expected 0 or 1")
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
    return with_extras(canonical, row)


def format_question_answer(row: Row) -> Row:
    """`question` and `answer`: a user turn and the assistant's; PPO needs the question alone.

    `answer` also stays a column, for scorers that compare with it.
    """
    question = as_text(row["question"], "question")
    canonical: Row = {"prompt": [{"role": "user", "content": question}]}
    if "answer" in row:
        answer = as_text(row["answer"], "answer")
        canonical["completion"] = [{"role": "assistant", "content": answer}]
    return with_extras(canonical, row, ["question"])


def format_text(row: Row) -> Row:
    """`text`, without prompt and response: for SFT with loss on every token, and for PPO-ptx."""
    return with_extras({"text": as_text(row["text"], "text")}, row)


# --- Instructions -------------------------------------------------------------------------------


def _instruction(row: Row, name: str, marker: str) -> list[Message]:
    """`instruction` and, where it is not empty, the field `name` after `marker`: a user message.

    The templates alpaca, alpaca_nl and dolly of conf/chat_template look for the marker.
    """
    content, extra = as_text(row["instruction"], "instruction"), as_text(row.get(name, ""), name)
    return [{"role": "user", "content": content + marker + extra if extra.strip() else content}]


def alpaca_prompt(row: Row) -> list[Message]:
    return _instruction(row, "input", "\n\n### Input:\n")


def format_alpaca(row: Row) -> Row:
    """`instruction`, `input` (may be empty), `output` -> one user and one assistant message.

    A non-empty input follows the instruction under "### Input:". So the `alpaca` template renders
    Alpaca's own prompt, and the text stays plain {role, content} for other templates and servers.
    """
    answer = {"role": "assistant", "content": as_text(row["output"], "output")}
    canonical = {"messages": [*alpaca_prompt(row), answer]}
    return with_extras(canonical, row, ["instruction", "input", "output"])


def format_instruction(row: Row) -> Row:
    """`instruction` and `input` (may be empty) as the prompt of PPO; see `format_alpaca`."""
    return with_extras({"prompt": alpaca_prompt(row)}, row, ["instruction", "input"])


def format_self_instruct(row: Row) -> Row:
    """Self-Instruct's tasks: `instruction` and one entry {input, output} in `instances`."""
    instances = row["instances"]
    as_records(instances, "instances", "expected [{input, output}]")
    if len(instances) != 1:
        what = f"has {len(instances)} instances"
        raise bad_field("instances", what, "write one row per instance, each with the instruction")
    [given] = instances
    if given.get("output") is None:
        raise bad_field("instances[0].output", "missing or null", "expected text")
    rest = {name: value for name, value in row.items() if name != "instances"}
    extra = "" if given.get("input") is None else given["input"]
    return format_alpaca({**rest, "input": extra, "output": given["output"]})


def format_dolly15k(row: Row) -> Row:
    """databricks-dolly-15k: `instruction`, `context` (may be empty or absent), `response`.

    A context follows the instruction under "Input:", as in Dolly 2.0's own prompt (Alpaca's is
    "### Input:"). References such as [42], left over from Wikipedia, stay.
    """
    answer = {"role": "assistant", "content": as_text(row["response"], "response")}
    canonical = {"messages": [*_instruction(row, "context", "\n\nInput:\n"), answer]}
    return with_extras(canonical, row, ["instruction", "context", "response"])


def format_chatllama_actor(row: Row) -> Row:
    """ChatLLaMA's actor file: `user_input` and `completion`, joined unchanged."""
    canonical = format_chatllama_rlhf(row)
    return canonical | {"completion": as_prompt(row["completion"], "completion")}


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
    and questions after the last answer. A system message may come first. Rows are
    dropped if nothing is left, a turn is empty, or the speakers do not alternate.
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
        raise unexpected(name, turn, "expected {from, value}")
    speaker = str(turn.get("from")).lower()
    if speaker in TOOL_ROLES:
        raise DropRow("tool calls")
    if speaker in _OTHER_BOTS:
        raise DropRow("a speaker other than human, gpt and system")
    if speaker not in _SPEAKERS:
        fix = f"known speakers are {', '.join(_SPEAKERS)}.{nearest(speaker, _SPEAKERS)}"
        raise unexpected(f"{name}.from", turn.get("from"), fix)
    return {"role": _SPEAKERS[speaker], "content": as_content(turn.get("value"), f"{name}.value")}


def format_sharegpt(row: Row) -> Row:
    """ShareGPT's `conversations` of {from, value}, cleaned as Vicuna's were; `items` is read too.

    Rows with bing or bard as a speaker are dropped.
    """
    name = "items" if "items" in row and "conversations" not in row else "conversations"
    given = as_list(row[name])
    if not isinstance(given, list):
        raise unexpected(name, given, "expected a list of {from, value}")
    turns = [_sharegpt_turn(turn, f"{name}[{i}]") for i, turn in enumerate(given)]
    return with_extras({"messages": _cleaned(turns)}, row, [name])


def as_tagged(parts: list[str], roles: dict[str, str]) -> list[Message]:
    """Read the turns of a text that `re.split` cut at the tags of the speakers."""
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": roles[tag], "content": text.strip()} for tag, text in turns]


def format_baize(row: Row) -> Row:
    """Baize's self-chats: `input`, one text with the tags [|Human|] and [|AI|]; `topic`.

    The text before the first tag is left out because the `baize` template writes it, and so is the
    tag at the end, where the next question would follow.
    """
    parts = re.split(r"\[\|(Human|AI)\|\]", as_text(row["input"], "input"))
    if len(parts) < 3:
        fix = "expected text with [|Human|] and [|AI|] before the turns"
        raise unexpected("input", row["input"], fix)
    turns = as_tagged(parts, {"Human": "user", "AI": "assistant"})
    return with_extras({"messages": _cleaned(turns)}, row, ["input"])
