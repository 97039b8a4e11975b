"""Let two models talk, one as the person and one as the assistant (as in ChatLLaMA).

    python -m rlhf.generate mode=two_agents url=http://127.0.0.1:8000/v1 model=Qwen/Qwen3-8B prompts=questions.txt out=talks.jsonl
    python -m rlhf.generate mode=two_agents path=runs/mine/sft/final user_path=runs/other/sft/final prompts=questions.jsonl

path=, or url= and model=, is the assistant. user_path=, or user_url= and user_model=, is the person;
without them the same model plays both, as with mode=self_chat, but turn by turn: each sees the
conversation from its own side. Questions are the prompts that `python -m rlhf.generate` answers:
rows, or a .txt file of lines. Each begins one conversation.

A conversation ends after max_turns questions, when the person has nothing left to ask, or when a
turn is cut off or empty, which is then left out. Rows of the output have `messages`, which
`python -m rlhf.sft` reads as they are, and `topic`, the question. A stopped command continues when
it is given again; all answers of the models are kept in <out>.answers.sqlite, which may be deleted
at the end. Left out: several processes.
"""  # noqa: E501

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config import InputError, knob
from rlhf.console import progress_bar, say
from rlhf.generate.author import Author, Reply, begun, left_out, refusal, save_rows
from rlhf.generate.options import AuthorOptions, check_author
from rlhf.generate.sample import STRIDE
from rlhf.generate.self_chat import questions_of, topics_of
from rlhf.option_parser import check_options

END = "[END]"
PERSONA = f"""\
You play a person who talks with an assistant. Write what the person says next and nothing else: \
one question or remark that follows from the last answer. Do not answer questions and do not help; \
that is the assistant's part. When nothing is left to ask, write {END}. Begin the conversation."""


@dataclass(kw_only=True)
class TwoAgentsOptions(AuthorOptions):
    """The command line."""

    prompts: str
    """Questions: a .jsonl, .json, .csv or .parquet file, or a .txt file of lines."""
    out: str | None = None
    """File to write (default: <name>.talks.jsonl in the folder of the questions)."""
    user_path: str | None = None
    """The model that plays the person: stage directory, other model directory or Hub id (default:
    the assistant)."""
    user_url: str | None = None
    """Or an OpenAI-compatible endpoint that plays the person (default: url, with user_model)."""
    user_model: str | None = None
    """Name of the model at user_url."""
    persona: str = PERSONA
    """What the model that plays the person is told first (default: ask on, and write [END] when
    nothing is left to ask)."""
    max_turns: int = knob(4, ge=1)
    """Most questions in a conversation, with the given one."""
    response_length: int = knob(512, ge=1)
    """Longest turn, tokens; less where the conversation leaves less of the context."""


@dataclass
class Talk:
    """A conversation that grows."""

    number: int
    topic: str
    messages: list[dict[str, str]] = field(default_factory=list)
    end: str | None = None  # why it ended; None: it goes on

    def add(self, role: str, reply: Reply) -> None:
        """Add a turn, or end the conversation."""
        text = reply.said
        if reply.refused is not None:
            self.end = f"a conversation that {refusal(reply)}"
        elif not reply.ended:
            self.end = "a turn cut off by response_length"
        elif role == "user" and END in text:
            self.end = "the person, who had nothing left to ask"
        elif not text:
            self.end = f"an empty turn of the {'person' if role == 'user' else 'assistant'}"
        else:
            self.messages.append({"role": role, "content": text})


def run(options: TwoAgentsOptions) -> None:
    """Write the file."""
    check_options(options)
    user_options = _user_options(options)
    plain = dataclasses.replace(options, system=None)  # the person gets no system message
    with begun(plain, options.prompts, ".talks.jsonl", questions_of) as (out, questions, author):
        user = author
        if user_options is not None:
            user = Author(user_options, out)
            say(f"the person: {user.describe()}")
        with closing(user):
            for one, name in ((author, "path"), (user, "user_path")):
                if one.continues:
                    why = one.answerer.policy.why_text
                    raise InputError(
                        f"{name}={one.options.path} cannot talk: {why}; add chat_template=plain, "
                        "or take a chat model"
                    )
            dropped: Counter[str] = Counter()
            talks = _talks(topics_of(questions, dropped), options, author, user)
        _save(out, talks, len(questions), dropped)
    if num_known := sum(one.num_known for one in {author, user}):
        say(f"  {num_known:,} answers were known before")


def _user_options(options: TwoAgentsOptions) -> TwoAgentsOptions | None:
    """The options of the model that plays the person; None where it is the assistant's."""
    path, url, model = options.user_path, options.user_url, options.user_model
    if not (path or url or model):
        return None
    url = url or (options.url if model else None)
    found = dataclasses.replace(options, path=path, url=url, model=model, system=None)
    check_author(found, "user_")
    return found


def _talks(
    topics: Sequence[str], options: TwoAgentsOptions, author: Author, user: Author
) -> list[Talk]:
    """Have the conversations, some at a time; all of these go on turn by turn."""
    with progress_bar(len(topics), 0, "conversation") as bar:
        talks = [
            Talk(i, topic, [{"role": "user", "content": topic}]) for i, topic in enumerate(topics)
        ]
        for start in range(0, len(talks), author.num_together):
            part = talks[start : start + author.num_together]
            for turn in range(2 * options.max_turns - 1):
                open_talks = [talk for talk in part if talk.end is None]
                who, role = (user, "user") if turn % 2 else (author, "assistant")
                prompts = [_seen_by(role, talk, options) for talk in open_talks]
                numbers = [talk.number + turn * STRIDE for talk in open_talks]
                for talk, reply in zip(open_talks, who.ask(numbers, prompts), strict=True):
                    talk.add(role, reply)
            bar.update(len(part))
    return talks


def _seen_by(role: str, talk: Talk, options: TwoAgentsOptions) -> list[dict[str, str]]:
    """The conversation as a model sees it: its own turns are those of an assistant."""
    if role == "assistant":
        first = [] if options.system is None else [{"role": "system", "content": options.system}]
        return [*first, *talk.messages]
    swapped = {"user": "assistant", "assistant": "user"}
    turns = [{"role": swapped[turn["role"]], "content": turn["content"]} for turn in talk.messages]
    return [{"role": "user", "content": options.persona}, *turns]


def _save(out: Path, talks: list[Talk], num_questions: int, dropped: Counter[str]) -> None:
    """Write the conversations that have an answer, and say how they ended."""
    rows: list[dict[str, Any]] = []
    ends: Counter[str] = Counter()
    for talk in talks:
        messages = talk.messages[: len(talk.messages) // 2 * 2]
        if messages:
            rows.append({"topic": talk.topic, "messages": messages})
            ends[talk.end or "max_turns"] += 1
        else:
            dropped[f"without an answer ({talk.end})"] += 1
    line = f"{len(rows):,} conversations from {num_questions:,} questions{left_out(dropped)}"
    if not rows:
        raise InputError(f"no conversation was written; {line}")
    save_rows(out, rows)
    num_turns = sum(len(row["messages"]) for row in rows) / 2 / len(rows)
    listed = ", ".join(f"{why} ({count:,})" for why, count in ends.most_common())
    say(f"{line}\n{num_turns:.1f} questions a conversation; ended by: {listed}\nsaved {out}")
