"""A language model that writes data, and what all modes that ask one share: begin, save, report.

The model is one of our directories, or one behind an endpoint. Every answer goes into
`<out>.answers.sqlite` as soon as it is there. A command that is given again, after a stop or with
another num_rows, asks for those alone that are not in it.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.console import say
from rlhf.generate.options import AuthorOptions, GenerateOptions, check_author
from rlhf.generate.sample import Answerer, Question
from rlhf.http_endpoint import chat_url, complete_chat
from rlhf.option_parser import check_options
from rlhf.row_file import new_file

THOUGHTS_END = "</think>"  # what a model thinks before its answer is not read


class Reply(NamedTuple):
    """An answer; `refused` says why there is none."""

    text: str
    ended: bool  # by itself, not by the longest length
    refused: str | None = None

    @property
    def said(self) -> str:
        """The answer without what the model thought before it."""
        return self.text.rpartition(THOUGHTS_END)[2].strip()


@contextmanager
def begun(
    options: AuthorOptions, source: str, suffix: str, read: Callable[[Path], Any]
) -> Iterator[tuple[Path, Any, Author]]:
    """Begin a command: check its options, read its rows, load the model, and say what was found.

    Args:
        source: file of the rows.
        suffix: of the file to write, where `out` is not given.

    Returns:
        Path of the file to write, the rows, and the model; other processes are kept from the file.
    """
    check_options(options)
    check_author(options)
    file = Path(source).expanduser()
    out = Path(options.out or file.with_suffix(suffix))
    with new_file(out):
        rows = read(file)
        with closing(Author(options, out)) as author:
            say(f"{author.describe()}\n{len(rows):,} rows in {file}")
            yield out, rows, author


def save_rows(out: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as they come, and give the file its name; return their number.

    Without any row there is no file: the caller says why.
    """
    partial, count = out.with_name(f"{out.name}.partial"), 0
    with partial.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            stream.flush()
            count += 1
        os.fsync(stream.fileno())
    os.replace(partial, out) if count else partial.unlink()
    return count


def left_out(dropped: Counter[str]) -> str:
    """What was left out and why, for the end of a line."""
    reasons = [f"\n  {count:>6,}  {reason}" for reason, count in dropped.most_common()]
    return f"; left out:{''.join(reasons)}" if reasons else ""


def refusal(reply: Reply) -> str | None:
    """Why there is no answer, in words that are the same for prompts of all lengths."""
    text = "is longer than the model's context; fewer or shorter examples fit"
    return reply.refused and re.sub(r"has \d+ tokens, the model's context \d+", text, reply.refused)


class Author:
    """A model that answers numbered prompts, texts or conversations; each answer is kept.

    Attributes:
        stop: texts at which an endpoint ends an answer.
        continues: the model continues text; it answers no conversation.
        num_asked, num_known: answers that the model gave, and those that the file had.
    """

    def __init__(self, options: AuthorOptions, out: Path):
        """Load the model, or take the endpoint; open the file of answers next to `out`."""
        from rlhf.checkpoint import hash_weights
        from rlhf.scorers.answer_file import AnswerFile

        self.options, self.stop = options, list[str]()
        self.answerer: Any = None
        self.temperature, identity = options.temperature, [options.url, options.model]
        if options.path:
            self.answerer = Answerer(GenerateOptions.like(options, prompts=""))
            self.temperature = self.answerer.policy.temperature
            is_here = Path(options.path).is_dir()
            identity = [hash_weights(Path(options.path)) if is_here else options.path]
        elif self.temperature is None:
            self.temperature = 1.0
        self.continues = bool(self.answerer and self.answerer.policy.why_text)
        names = ("top_p", "top_k", "response_length", "seed", "system", "chat_template")
        self.identity = [*identity, self.temperature, *(getattr(options, n) for n in names)]
        self.file = AnswerFile(f"{out}.answers.sqlite", "out")
        self.num_asked = self.num_known = 0

    @property
    def num_together(self) -> int:
        """Prompts that are best asked together."""
        return self.options.batch_size if self.options.path else self.options.num_requests

    def describe(self) -> str:
        """Say what writes."""
        if self.answerer is not None:
            return str(self.answerer.policy.describe())
        return f"{self.options.model} at {self.options.url}; temperature {self.temperature:g}"

    def close(self) -> None:
        """Close the file of answers."""
        self.file.database.close()

    def ask(self, numbers: Sequence[int], prompts: Sequence[Any]) -> list[Reply]:
        """Answers to prompts; a number, which chooses the random ones, and its prompt are asked
        once."""
        from rlhf.scorers.remote import at_once

        identity = [*self.identity, *([self.stop] if self.stop and self.answerer is None else [])]
        keys = [
            self.file.key([*identity, number], prompt)
            for number, prompt in zip(numbers, prompts, strict=True)
        ]
        known = self.file.read(keys)
        missing = [i for i, key in enumerate(keys) if key not in known]
        self.num_asked += len(missing)
        self.num_known += len(keys) - len(missing)
        if missing and self.answerer is not None:
            self._sample(numbers, prompts, keys)
        elif missing:
            asked = [partial(self._request, keys[i], prompts[i]) for i in missing]
            at_once(asked, self.options.num_requests)  # each answer is kept as it comes
        found = self.file.read(keys)
        return [Reply(**json.loads(found[key].text)) for key in keys]

    def _keep(self, key: str, reply: Reply, tokens: Sequence[int] = (0, 0)) -> None:
        from rlhf.scorers.answer_file import Answer

        self.file.write(key, Answer(json.dumps(reply._asdict()), *tokens))

    def _sample(self, numbers: Sequence[int], prompts: Sequence[Any], keys: Sequence[str]) -> None:
        """Answer all prompts, also those that are known: batches stay as they were."""
        pairs = zip(numbers, prompts, strict=True)
        questions = [Question(number, {}, prompt) for number, prompt in pairs]
        self.answerer.prepare(questions, Path("prompts"))
        for key, row in zip(keys, self.answerer(questions), strict=True):
            reply = Reply(row["response"], row.get("ended", True), row.get("not_answered"))
            self._keep(key, reply)

    def _request(self, key: str, prompt: Any) -> None:
        options, system = self.options, self.options.system
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if system is not None:
            turns = [{"role": "system", "content": system}, *turns]
        body: dict[str, Any] = {
            "model": options.model,
            "messages": turns,
            "temperature": self.temperature,
            "max_tokens": options.response_length,
        }
        if options.top_p is not None:
            body["top_p"] = options.top_p
        if self.stop:
            body["stop"] = self.stop
        found = complete_chat(chat_url(str(options.url)), body, options.endpoint, "url")
        tokens = found.tokens_in, found.tokens_out
        self._keep(key, Reply(found.text, found.is_whole), tokens)
