"""A language model that judges: 1 to 10 for a response by a rubric, or the better of two.

`scorer.path=judge:helpfulness` names the rubric (`rlhf.rubrics`), `scorer.endpoint` the model: one
behind an OpenAI-compatible endpoint, or a directory that is loaded here. It is asked at temperature
0. Every answer is kept in a file, and the same question is never asked twice.

A verdict that cannot be read counts as the lowest score, so that no policy gains by confusing the
judge; each is counted, and more than a share of `max_unreadable` ends the run. Left out: several
rubrics in one question (components do that), and judges that see tools or pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlhf.checkpoint import hash_weights
from rlhf.config import EndpointConfig, InputError, ScorerConfig, show
from rlhf.http_endpoint import chat_url, complete_chat
from rlhf.inputs import check_judge, endpoint_prefix
from rlhf.policy import Policy, PolicyOptions
from rlhf.rubrics import LOWEST, read_choice, read_rating, read_rubric
from rlhf.sampling import context_length, generate
from rlhf.scorers.answer_file import Answer, AnswerFile
from rlhf.scorers.call import BuiltInScorer, Columns, Scores, Tokens
from rlhf.scorers.remote import at_once

FEWEST = 20  # judgements; a share of fewer says nothing


class Judge(BuiltInScorer):
    """A language model and a rubric.

    Attributes:
        num_judged, num_unreadable: judgements, and those without a verdict.
        num_asked, num_known: answers that the model gave, and those that the file had.
        tokens: read and written by the model, as it says.
    """

    def __init__(
        self, config: ScorerConfig, field: str = "scorer.path", trust_remote_code: bool = False
    ):
        """Read the rubric, and check that the model is there or load it.

        Args:
            config: `path` is `judge:<rubric>`.
            field: configuration key of `path`, for messages.
        """
        self.rubric = read_rubric(str(config.path), field)
        self.endpoint, prefix = config.endpoint, endpoint_prefix(field)
        check_judge(self.endpoint, field, trust_remote_code)
        self.model: Any = None
        if self.endpoint.url is not None:
            self.model = EndpointModel(self.endpoint, f"{prefix}url")
            self.num_at_once = 1  # two calls might pay for the same question
        else:
            self.model = LocalModel(config, f"{prefix}model", trust_remote_code)
        self.file = AnswerFile(self.endpoint.cache, f"{prefix}cache")
        self.num_judged = self.num_unreadable = self.num_asked = self.num_known = 0
        self.tokens = [0, 0]

    def score(
        self, prompts: Any, responses: Any, field: str, tokens: Tokens | None, columns: Columns
    ) -> Scores:
        """Ask for a rating of each response, from 1 to 10."""
        rows = self.rows_of(columns, len(responses), field)
        triples = zip(prompts, responses, rows, strict=True)
        answers = self.answers([self.rubric.ask_to_rate(*triple) for triple in triples])
        ratings = self.read(answers, read_rating)
        scores = [float(LOWEST) if rating is None else rating for rating in ratings]
        return Scores(torch.tensor(scores))

    def compare(
        self, prompts: Sequence[Any], a: Sequence[str], b: Sequence[str], columns: Columns
    ) -> list[tuple[str | None, str]]:
        """Ask which response is better: "a", "b", "tie" or None, and the judge's whole answer."""
        rows = self.rows_of(columns, len(a), "judge")
        asked = zip(prompts, a, b, rows, strict=True)
        answers = self.answers([self.rubric.ask_to_compare(*one) for one in asked])
        return list(zip(self.read(answers, read_choice), answers, strict=True))

    def rows_of(self, columns: Columns, count: int, field: str) -> list[dict[str, Any]]:
        """The columns by row; refuses rows without one that the rubric needs."""
        for name in self.rubric.columns:
            missing = sum(value is None for value in columns.get(name, [None] * count))
            if missing:
                raise InputError(
                    f"{field}: the rubric {self.rubric.name} reads the column `{name}`, which "
                    f"{missing} of {count} rows do not have"
                )
        return [{name: values[i] for name, values in columns.items()} for i in range(count)]

    def answers(self, texts: Sequence[str]) -> list[str]:
        """The model's answers; those that the file has are not asked for again."""
        identity = [self.model.identity, self.endpoint.max_tokens]
        keys = [self.file.key(identity, text) for text in texts]
        known = self.file.read(keys)
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        for key, answer in zip(new, self.model.ask([*new.values()], self._keep(new)), strict=True):
            known[key] = answer
            self.tokens = [self.tokens[0] + answer.tokens_in, self.tokens[1] + answer.tokens_out]
        self.num_asked += len(new)
        self.num_known += len(texts) - len(new)
        return [known[key].text for key in keys]

    def _keep(self, new: dict[str, str]) -> Any:
        """A function that writes an answer to the file as soon as it is there."""
        keys = list(new)
        return lambda i, answer: self.file.write(keys[i], answer)

    def read(self, answers: Sequence[str], verdict: Any) -> list[Any]:
        """The verdicts in answers, None where there is none.

        Raises:
            InputError: too many answers have none.
        """
        found = [verdict(answer) for answer in answers]
        unreadable = [a for a, v in zip(answers, found, strict=True) if v is None]
        self.num_judged += len(found)
        self.num_unreadable += len(unreadable)
        if self.num_unreadable > self.endpoint.max_unreadable * max(self.num_judged, FEWEST):
            raise InputError(
                f"the judge {self.endpoint.model} gave no verdict in {self.num_unreadable} of "
                f"{self.num_judged} answers; the last: {show(unreadable[-1])}. Take a model that "
                "follows the rubric, give max_tokens more room, or raise max_unreadable"
            )
        return found

    def counts(self) -> dict[str, float]:
        """Judgements and answers so far, by the names of metrics."""
        return {
            "judge_unreadable": self.num_unreadable,
            "judge_asked": self.num_asked,
            "judge_known": self.num_known,
            "judge_tokens": sum(self.tokens),
        } | ({"judge_cost": self.cost()} if self.endpoint.prices else {})

    def cost(self) -> float:
        """What the answers cost, by `endpoint.prices`."""
        return sum(n * p / 1e6 for n, p in zip(self.tokens, self.endpoint.prices, strict=False))

    def summary(self) -> str:
        """What the judge did, in one line."""
        parts = [
            f"{self.num_asked:,} answers asked, {self.num_known:,} known from {self.file.path}"
        ]
        parts.append(f"{self.num_unreadable:,} of {self.num_judged:,} without a verdict")
        if any(self.tokens):
            money = f", costing {self.cost():.4g}" if self.endpoint.prices else ""
            parts.append(f"{self.tokens[0]:,} tokens read and {self.tokens[1]:,} written{money}")
        name = f"{self.rubric.name} (version {self.rubric.version})"
        return f"judge {self.endpoint.model}, {name}: {'; '.join(parts)}"


class EndpointModel:
    """A model behind an OpenAI-compatible endpoint."""

    def __init__(self, endpoint: EndpointConfig, field: str):
        self.endpoint, self.field = endpoint, field
        self.url = chat_url(str(endpoint.url))
        self.identity = [str(endpoint.url).rstrip("/"), endpoint.model]

    def ask(self, texts: Sequence[str], keep: Any) -> list[Answer]:
        """Answers to messages of the user, several at once; `keep` gets each as it comes."""

        def one(i: int) -> Answer:
            answer = self._ask(texts[i])
            keep(i, answer)
            return answer

        return at_once([partial(one, i) for i in range(len(texts))], self.endpoint.num_requests)

    def _ask(self, text: str) -> Answer:
        body = {
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0.0,
            "max_tokens": self.endpoint.max_tokens,
        }
        found = complete_chat(self.url, body, self.endpoint, self.field)
        return Answer(found.text, found.tokens_in, found.tokens_out)


class LocalModel:
    """One of our directories, or another model, loaded here."""

    def __init__(self, config: ScorerConfig, field: str, trust_remote_code: bool):
        path, length = str(config.endpoint.model), config.endpoint.max_tokens
        options = PolicyOptions(path, temperature=0.0, response_length=length)
        options.trust_remote_code = trust_remote_code
        self.policy, self.field = Policy(options, path, field), field
        self.batch_size = config.batch_size
        self.identity = [path, hash_weights(Path(path)) if Path(path).is_dir() else None]

    def ask(self, texts: Sequence[str], keep: Any) -> list[Answer]:
        """As `EndpointModel.ask`, a batch at a time."""
        context = context_length(self.policy.model)
        answers: list[Answer] = []
        for start in range(0, len(texts), self.batch_size):
            part = texts[start : start + self.batch_size]
            ids = [self._encode(text) for text in part]
            longest = max(map(len, ids))
            if longest >= context:
                raise InputError(
                    f"{self.field}={self.policy.path}: a question has {longest} tokens, the "
                    f"context {context}; take a judge with a longer one"
                )
            budget = min(self.policy.options.response_length, context - longest)
            sampling = dataclasses.replace(self.policy.sampling, max_new_tokens=budget)
            made = generate(self.policy.model, ids, sampling, None, self.batch_size)
            for prompt, response in zip(ids, made.ids, strict=True):
                answer = Answer(self.policy.text(response), len(prompt), len(response))
                keep(len(answers), answer)
                answers.append(answer)
        return answers

    def _encode(self, text: str) -> list[int]:
        chat = text if self.policy.why_text else [{"role": "user", "content": text}]
        return self.policy.encode_prompt(chat)
