"""A scorer that another process serves over HTTP: the client of the protocol in docs/scorers.md.

    {"prompts": [...], "responses": [...], "columns": {"answer": [...]}}  ->  {"scores": [...]}

`rlhf.scorers.scoring_server` serves any of our scorers; one of your own may be in any language.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch

from rlhf.config import InputError, ScorerConfig, show
from rlhf.http_endpoint import ask, check_endpoint
from rlhf.scorers.call import BuiltInScorer, Columns, Scores, Tokens, require_valid_scores

Result = TypeVar("Result")


class RemoteScorer(BuiltInScorer):
    """A scorer behind a URL; it gets texts, and so scores complete responses.

    Attributes:
        num_requests, num_retries: requests so far, and further tries of those that failed.
    """

    def __init__(self, config: ScorerConfig, field: str = "scorer.path"):
        """Check that something listens at `config.path`.

        Args:
            field: configuration key of `path`, for messages.
        """
        self.url, self.field = str(config.path), field
        self.endpoint, self.batch_size = config.endpoint, config.batch_size
        self.num_at_once = self.endpoint.num_requests
        self.num_requests = self.num_retries = 0
        self._lock = threading.Lock()
        check_endpoint(self.url, self.endpoint, field)

    def score(
        self, prompts: Any, responses: Any, field: str, tokens: Tokens | None, columns: Columns
    ) -> Scores:
        """Ask for the scores of `batch_size` responses at a time, several batches at once."""

        def ask_batch(start: int) -> list[float]:
            part = slice(start, start + self.batch_size)
            own = {name: list(values[part]) for name, values in columns.items()}
            body = {"prompts": list(prompts[part]), "responses": list(responses[part])}
            return self._scores(body | {"columns": own})

        starts = range(0, len(responses), self.batch_size)
        batches = at_once([partial(ask_batch, i) for i in starts], self.endpoint.num_requests)
        scores = torch.tensor([score for scores in batches for score in scores])
        return Scores(require_valid_scores(scores, responses, f"{self.field}={self.url}"))

    def counts(self) -> dict[str, float]:
        """Requests so far, by the names of metrics."""
        return {"remote_requests": self.num_requests, "remote_retries": self.num_retries}

    def _count(self, requests: int = 0, retries: int = 0) -> None:
        with self._lock:
            self.num_requests += requests
            self.num_retries += retries

    def _scores(self, body: dict[str, Any]) -> list[float]:
        self._count(requests=1)
        retried = partial(self._count, retries=1)
        answer = ask(self.url, body, self.endpoint, self.field, retried)
        scores = answer.get("scores") if isinstance(answer, dict) else None
        count, where = len(body["responses"]), f"{self.field}={self.url}"
        if not isinstance(scores, list) or any(type(score) not in (int, float) for score in scores):
            expected = f'{{"scores": [...]}} with {count} numbers'
            raise InputError(f"{where} answered {show(answer)}; expected {expected}")
        if len(scores) != count:
            raise InputError(f"{where} answered {len(scores)} scores for {count} responses")
        return scores


def at_once(tasks: Sequence[Callable[[], Result]], num_threads: int) -> list[Result]:
    """Do tasks in several threads; return their results in order. After the first error, no further
    task begins."""
    errors: list[Exception] = []

    def attempt(task: Callable[[], Result]) -> Result:
        if errors:
            raise errors[0]
        try:
            return task()
        except Exception as error:
            errors.append(error)
            raise

    pool = ThreadPoolExecutor(num_threads)
    try:
        return list(pool.map(attempt, tasks))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
