"""Calling a scorer and checking what it returns.

`BuiltInScorer` is the base of reward models (`reward_model`) and of several scorers as one
(`combined`); any other scorer is a Python function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.config import InputError
from rlhf.scorers.functions import call_function, parameters_of, require_columns

Scorer = Callable[..., Any]
Columns = Mapping[str, Sequence[Any]]  # name of a column of the rows -> a value for each response
NO_COLUMNS: Columns = MappingProxyType({})


class Tokens(NamedTuple):
    """Token ids as a policy saw and sampled them, B lists each."""

    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]  # stop token included
    rendering: str  # `hash_rendering` of the policy's tokenizer


@dataclass
class Scores:
    """Scores of B responses; float32 on the CPU, every number finite.

    Attributes:
        cut: (B,) bool, True where a reward model read only the beginning of a response, because
            prompt and response are longer than its context; None without a reward model.
    """

    total: Tensor  # (B,), rewards per token included
    dense: list[Tensor] | None = None  # rewards per token, (num_tokens,) for each response
    components: dict[str, Tensor] = field(default_factory=dict)  # totals, by component
    cut: Tensor | None = None

    @property
    def dense_total(self) -> Tensor:
        """(B,) sums of the rewards per token; zeros without any."""
        if self.dense is None:
            return torch.zeros_like(self.total)
        return torch.stack([rewards.sum() for rewards in self.dense])


class BuiltInScorer:
    """A scorer of this package: it can be given token ids, and returns `Scores`.

    Attributes:
        num_at_once: calls of `score` that may be under way while this process does something else;
            0 where it needs the process itself.
    """

    num_at_once = 0

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> Tensor:
        """Score complete responses given as text, (B,) float32 on the CPU."""
        return uncut_scores(self, prompts, responses, "the scorer")

    def score(
        self, prompts: Any, responses: Any, field: str, tokens: Tokens | None, columns: Columns
    ) -> Scores:
        """See `score_responses`."""
        raise NotImplementedError

    def counts(self) -> dict[str, float]:
        """What it was asked so far, by the names of metrics; empty for one that does not count."""
        return {}


def counts_of(scorer: Any) -> dict[str, float]:
    """The counts of a scorer; a Python function and None have none."""
    return scorer.counts() if isinstance(scorer, BuiltInScorer) else {}


def uncut_scores(
    scorer: Scorer,
    prompts: Sequence[Any],
    responses: Sequence[str],
    field: str,
    columns: Columns = NO_COLUMNS,
) -> Tensor:
    """As `score_responses`, for responses given as text, (B,) float32 on the CPU; also refuse those
    that are longer, with their prompts, than a reward model's context."""
    scores = score_responses(scorer, prompts, responses, field, columns=columns)
    if scores.cut is not None and scores.cut.any():
        raise InputError(
            f"{int(scores.cut.sum())} of {len(responses)} responses, with their prompts, exceed "
            f"the context of {field}; shorten them"
        )
    return scores.total


def score_responses(
    scorer: Scorer,
    prompts: Sequence[Any],
    responses: Sequence[str],
    field: str,
    tokens: Tokens | None = None,
    columns: Columns = NO_COLUMNS,
) -> Scores:
    """Call a scorer and check what comes back.

    A reward model scores the token ids if it renders conversations as their tokenizer does. If not,
    it scores the text as a complete response, by its own tokenizer and template. A response that is
    too long for its context is cut, and marked in `cut`. A Python function with a parameter
    `response_ids` gets the ids, and may return a list of rewards for each response, one per token.

    Args:
        field: name of the scorer in messages.
        tokens: the token ids, if the responses were sampled.
        columns: what a Python function gets by the names of its parameters.

    Raises:
        InputError: the scorer failed, or did not return one finite number per response (or per
            token), or a prompt leaves no room in a reward model's context. A failure is never
            turned into a score of 0.
    """
    if isinstance(scorer, BuiltInScorer):
        return scorer.score(prompts, responses, field, tokens, columns)
    return _score_by_function(scorer, prompts, responses, field, tokens, columns)


def _score_by_function(
    scorer: Scorer,
    prompts: Sequence[Any],
    responses: Sequence[str],
    field: str,
    tokens: Tokens | None,
    columns: Columns,
) -> Scores:
    """As `score_responses`, for a Python function."""
    if tokens is None and "response_ids" in parameters_of(scorer).required:
        raise InputError(
            f"{field} needs response_ids, but these responses are text; give the parameter a "
            "default, or score them where they are sampled"
        )
    require_columns(field, scorer, list(columns))
    ids = None if tokens is None else [list(row) for row in tokens.responses]
    try:
        result = call_function(scorer, prompts, responses, ids, columns)
        rows = [torch.as_tensor(row, dtype=torch.float32).detach().cpu() for row in result]
    except Exception as error:
        raise InputError(
            f"{field} failed on a batch of {len(responses)} responses: "
            f"{type(error).__name__}: {error}"
        ) from error
    dense = [row for row in rows if row.dim()]
    if not dense:
        scores = torch.stack(rows) if rows else torch.zeros(0)
        return Scores(require_valid_scores(scores, responses, field))
    if ids is None or not parameters_of(scorer).takes_ids:
        raise InputError(
            f"{field} must return one score per response: expected shape ({len(responses)},), got "
            f"{(len(rows), *dense[0].shape)}; rewards per token need the parameter response_ids, "
            "and responses that were sampled"
        )
    _require_valid_rewards(rows, ids, responses, field)
    return Scores(torch.stack([row.sum() for row in rows]), rows)


def require_valid_scores(scores: Tensor, responses: Sequence[Any], field: str) -> Tensor:
    """Refuse scores that are not one finite number for each response."""
    if scores.shape != (len(responses),):
        raise InputError(
            f"{field} must return one score per response: expected shape ({len(responses)},), got "
            f"{tuple(scores.shape)}"
        )
    bad = (~scores.isfinite()).nonzero()
    if len(bad):
        row = int(bad[0])
        raise InputError(
            f"{field} returned {scores[row].item()} for {len(bad)} of {len(responses)} responses, "
            f"the first being {str(responses[row])[:200]!r}; a score must be a finite number"
        )
    return scores


def _require_valid_rewards(
    rows: list[Tensor], ids: Sequence[Sequence[int]], responses: Sequence[str], field: str
) -> None:
    """Refuse rewards that are not one finite number for each token."""
    if len(rows) != len(ids):
        raise InputError(f"{field} must return {len(ids)} lists of rewards, got {len(rows)}")
    for row, tokens, response in zip(rows, ids, responses, strict=True):
        if row.shape != (len(tokens),):
            raise InputError(
                f"{field} must return one reward per token of response_ids, stop token included: "
                f"expected shape ({len(tokens)},), got {tuple(row.shape)} for {response[:200]!r}"
            )
        if not row.isfinite().all():
            raise InputError(
                f"{field} returned {row.tolist()} for {response[:200]!r}; a reward must be a "
                "finite number"
            )
