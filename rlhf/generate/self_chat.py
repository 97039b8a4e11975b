"""Let a model write both sides of conversations that begin with given questions (as Baize did).

    python -m rlhf.generate mode=self_chat url=http://127.0.0.1:8000/v1 model=Qwen/Qwen3-8B prompts=questions.txt out=chats.jsonl
    python -m rlhf.generate mode=self_chat path=runs/mine/sft/final prompts=questions.jsonl

Questions are the prompts that `python -m rlhf.generate` answers: rows, or a .txt file of lines. Each
begins one conversation, which the model writes as a transcript in one answer. A last turn that is
cut off or has no reply is left out; a transcript without an answer to the question is counted.

Rows of the output have `messages`, which `python -m rlhf.sft` reads as they are, and `topic`, the
question. A stopped command continues when it is given again; all answers of the model are kept in
<out>.answers.sqlite, which may be deleted at the end. Left out: several processes.
"""  # noqa: E501

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import InputError, knob
from rlhf.console import progress_bar, say
from rlhf.generate.author import Author, Reply, begun, left_out, refusal, save_rows
from rlhf.generate.options import AuthorOptions
from rlhf.generate.sample import Question, read_prompts

PROMPT = """\
Below is the beginning of a transcript: a person talks with an assistant. Lines of the person \
begin with [|Human|], lines of the assistant with [|AI|]. The person goes on with questions that \
follow from what was said, {turns} in all at most, and stops when nothing is left to ask. The \
assistant answers them well and in full, and asks none itself. Complete the transcript in this form.

[|Human|] {question}
[|AI|]"""
TO_BEGIN = "\n\nBegin with the first answer of the assistant."
MARKER = re.compile(r"\[\|(Human|AI)\|\]")
ROLES = {"Human": "user", "AI": "assistant"}


@dataclass(kw_only=True)
class SelfChatOptions(AuthorOptions):
    """The command line."""

    prompts: str
    """Questions: a .jsonl, .json, .csv or .parquet file, or a .txt file of lines."""
    out: str | None = None
    """File to write (default: <name>.chats.jsonl in the folder of the questions)."""
    max_turns: int = knob(4, ge=1)
    """Most questions in a conversation, with the given one."""
    response_length: int = knob(2048, ge=1)
    """Longest transcript, tokens; less where the prompt leaves less of the context."""


def run(options: SelfChatOptions) -> None:
    """Write the file."""
    dropped: Counter[str] = Counter()
    with begun(options, options.prompts, ".chats.jsonl", questions_of) as (out, questions, author):
        rows = list(_rows(questions, options, author, dropped))
        line = f"{len(rows):,} conversations from {len(questions):,} questions{left_out(dropped)}"
        if not rows:
            raise InputError(f"no conversation was written; {line}")
        save_rows(out, rows)
    num_turns = sum(len(row["messages"]) for row in rows) / 2 / len(rows)
    known = f", {author.num_known:,} answers known before" if author.num_known else ""
    say(f"{line}\n{num_turns:.1f} questions a conversation{known}\nsaved {out}")


def questions_of(source: Path) -> list[Question]:
    """The questions that begin conversations."""
    return read_prompts(source)[0]


def _rows(
    questions: list[Question], options: SelfChatOptions, author: Author, dropped: Counter[str]
) -> Iterator[dict[str, Any]]:
    with progress_bar(len(questions), 0, "conversation") as bar:
        asked = topics_of(questions, dropped)
        for start in range(0, len(asked), author.num_together):
            part = asked[start : start + author.num_together]
            prompts = []
            for topic in part:
                prompt = PROMPT.format(question=topic, turns=options.max_turns)
                prompts.append(prompt if author.continues else prompt + TO_BEGIN)
            replies = author.ask(range(start, start + len(part)), prompts)
            for topic, reply in zip(part, replies, strict=True):
                messages = read_transcript(topic, reply, options.max_turns, author.continues)
                if messages:
                    yield {"topic": topic, "messages": messages}
                else:
                    why = "no transcript" if reply.ended else "cut off by response_length"
                    dropped[f"without an answer ({refusal(reply) or why})"] += 1
                bar.update(1)


def topics_of(questions: list[Question], dropped: Counter[str]) -> list[str]:
    """The texts of the questions; those without one are counted."""
    topics = []
    for question in questions:
        if topic := _topic(question):
            topics.append(topic)
        else:
            dropped[f"questions without text ({question.not_answered or 'no user turn'})"] += 1
    return topics


def _topic(question: Question) -> str | None:
    """The text of the question: of a conversation, its last user turn."""
    if question.not_answered is not None:
        return None
    if isinstance(question.prompt, str):
        return question.prompt.strip() or None
    turns = [turn["content"] for turn in question.prompt if turn["role"] == "user"]
    return turns[-1].strip() if turns else None


def read_transcript(
    question: str, reply: Reply, max_turns: int, continues: bool
) -> list[dict[str, str]]:
    """The turns of a transcript; the first is the question, the last one of the assistant.

    A transcript may begin with the question again. Returns [] where there is no answer to it.
    """
    before, *parts = MARKER.split(reply.said)
    turns = list(zip(parts[::2], parts[1::2], strict=True))
    if (continues or not turns or turns[0][0] == "Human") and before.strip():
        turns.insert(0, ("AI", before))  # the prompt ends with the marker of the assistant
    if not reply.ended:
        turns = turns[:-1]
    if turns and turns[0][0] == "Human":
        turns = turns[1:]
    messages = [{"role": "user", "content": question}]
    for name, text in turns:
        role = ROLES[name]
        if not text.strip() or role == messages[-1]["role"]:
            break  # out of form; what came before it is good
        messages.append({"role": role, "content": text.strip()})
    messages = messages[: 2 * max_turns]
    return messages[: len(messages) // 2 * 2]
