"""A language model that writes data: one of our directories, or one behind an endpoint.

Every answer goes into `<out>.answers.sqlite` as soon as it is there. A command that is given again,
after a stop or with another num_rows, asks for those alone that are not in it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.config import EndpointConfig, InputError, knob
from rlhf.endpoint import chat_url, check_endpoint, complete_chat
from rlhf.generate.sample import Answerer, GenerateOptions, Question
from rlhf.policy import PolicyOptions, check_policies


@dataclass(kw_only=True)
class AuthorOptions(PolicyOptions):
    """Options of every mode in which a model writes data."""

    path: str | None = None  # type: ignore[assignment]
    """The model that writes: stage directory, other model directory or Hub id."""
    url: str | None = None
    """Or an OpenAI-compatible endpoint that writes, such as http://127.0.0.1:8000/v1."""
    model: str | None = None
    """Name of the model at url."""
    key_env: str | None = None
    """Environment variable that holds the key of the endpoint; the key is never written."""
    timeout: float = knob(300.0, gt=0)
    """Seconds to wait for an answer of the endpoint."""
    retries: int = knob(5, ge=0)
    """Number of further tries after no answer, a broken one, 429 or 5xx."""
    num_requests: int = knob(8, ge=1)
    """Requests that are under way at once."""
    batch_size: int = knob(8, ge=1)
    """Answers of the model at path that are sampled together."""

    @property
    def endpoint(self) -> EndpointConfig:
        names = ("model", "url", "key_env", "timeout", "retries", "num_requests")
        return EndpointConfig(**{name: getattr(self, name) for name in names})


class Reply(NamedTuple):
    """An answer; `refused` says why there is none."""

    text: str
    ended: bool  # by itself, not by the longest length
    refused: str | None = None


def check_author(options: AuthorOptions) -> None:
    """Check, before a model loads, that there is one, and one only.

    Raises:
        InputError: says what is wrong.
    """
    if bool(options.path) == bool(options.url):
        given = "both are given" if options.path else "neither is given"
        raise InputError(f"add path=<model directory>, or url=<endpoint> and model=<name>; {given}")
    if options.path:
        check_policies(options, {"path": options.path})
        return
    if not options.model:
        raise InputError(f"model is missing; add model=<name of the model at {options.url}>")
    check_endpoint(str(options.url), options.endpoint, "url")


def refusal(reply: Reply) -> str | None:
    """Why there is no answer, in words that are the same for prompts of all lengths."""
    text = "is longer than the model's context; fewer or shorter examples fit"
    return reply.refused and re.sub(r"has \d+ tokens, the model's context \d+", text, reply.refused)


class Author:
    """A model that answers numbered prompts; each answer is kept.

    Attributes:
        continues: the model continues text; it answers no conversation.
        num_asked, num_known: answers that the model gave, and those that the file had.
    """

    def __init__(self, options: AuthorOptions, out: Path):
        """Load the model, or take the endpoint; open the file of answers next to `out`."""
        from rlhf.checkpoint import hash_weights
        from rlhf.scorers.answer_file import AnswerFile

        self.options = options
        self.answerer: Any = None
        self.temperature, identity = options.temperature, [options.url, options.model]
        if options.path:
            self.answerer = self._answerer(options)
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

    @staticmethod
    def _answerer(options: AuthorOptions) -> Answerer:
        known = {field.name for field in dataclasses.fields(GenerateOptions)}
        shared = {name: value for name, value in vars(options).items() if name in known}
        return Answerer(GenerateOptions(**(shared | {"prompts": ""})))

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

    def ask(self, first: int, prompts: Sequence[str]) -> list[Reply]:
        """Answers to prompts, numbered from `first`; a number and its prompt are asked once."""
        keys = [
            self.file.key([*self.identity, number], prompt)
            for number, prompt in enumerate(prompts, start=first)
        ]
        known = self.file.read(keys)
        missing = [i for i, key in enumerate(keys) if key not in known]
        self.num_asked += len(missing)
        self.num_known += len(keys) - len(missing)
        if missing and self.answerer is not None:
            self._sample(first, prompts, keys)
        elif missing:
            self._request([(keys[i], prompts[i]) for i in missing])
        found = self.file.read(keys)
        return [Reply(**json.loads(found[key].text)) for key in keys]

    def _keep(self, key: str, reply: Reply, tokens: Sequence[int] = (0, 0)) -> None:
        from rlhf.scorers.answer_file import Answer

        self.file.write(key, Answer(json.dumps(reply._asdict()), *tokens))

    def _sample(self, first: int, prompts: Sequence[str], keys: Sequence[str]) -> None:
        """Answer all prompts, also those that are known: batches stay as they were."""
        questions = [Question(first + i, {}, prompt) for i, prompt in enumerate(prompts)]
        self.answerer.prepare(questions, Path("prompts"))
        for key, row in zip(keys, self.answerer(questions), strict=True):
            reply = Reply(row["response"], row.get("ended", True), row.get("not_answered"))
            self._keep(key, reply)

    def _request(self, asked: Sequence[tuple[str, str]]) -> None:
        """Ask the endpoint, several prompts at once; keep each answer as it comes."""
        from rlhf.scorers.remote import at_once

        at_once([partial(self._request_one, *one) for one in asked], self.options.num_requests)

    def _request_one(self, key: str, prompt: str) -> None:
        options, system = self.options, self.options.system
        messages = [{"role": "system", "content": system}] if system is not None else []
        body = {
            "model": options.model,
            "messages": [*messages, {"role": "user", "content": prompt}],
            "temperature": self.temperature,
            "max_tokens": options.response_length,
        }
        if options.top_p is not None:
            body["top_p"] = options.top_p
        found = complete_chat(chat_url(str(options.url)), body, options.endpoint, "url")
        tokens = found.tokens_in, found.tokens_out
        self._keep(key, Reply(found.text, found.is_whole), tokens)
