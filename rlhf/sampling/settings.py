"""What a response is sampled with: settings, random numbers, and what ends it.

Left out: the sampling itself (`engine`, `token_loop`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.models import unwrap_peft
from rlhf.tokenizer import StopStrings, end_token_ids, forbidden_token_ids
from rlhf.zero import shape_of


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    Attributes:
        max_new_tokens: budget of a response, EOS included.
        stop_ids: a response ends with the first of these ids and includes it.
        forbidden: ids that are never sampled.
        top_p, top_k: restrict the choice (1.0 and 0: off), but not the distribution of log-probs.
        stop_strings: a response also ends with the token that completes one of these.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    forbidden: Tensor
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_strings: StopStrings | None = None


@dataclass
class Generation:
    """Sampled responses, one entry per prompt.

    Attributes:
        ids: response tokens, with the stop token or stop string.
        logprobs: log-probs of these tokens under the sampler, nats, float32.
        finished: False where the budget ended the response, not a stop token or stop string.
    """

    ids: list[list[int]]
    logprobs: list[list[float]]
    finished: list[bool]


def stop_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every EOS id of the model's generation config, and the tokenizer's `end_token_ids`."""
    configured = getattr(unwrap_peft(model).generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return tuple(sorted(end_token_ids(tokenizer) | {i for i in ids if i is not None}))


def sampling_for(
    model: Any,
    tokenizer: Any,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
) -> Sampling:
    """The settings for a model: its stop tokens and the stop strings of its chat template end a
    response, and its unused ids are forbidden."""
    num_logits = shape_of(model.get_output_embeddings().weight)[0]
    stops, stop_ids = StopStrings(tokenizer), stop_token_ids(model, tokenizer)
    return Sampling(
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        forbidden=forbidden_token_ids(tokenizer, num_logits, stop_ids),
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop_strings=stops if stops.strings else None,
    )


def context_length(model: Any) -> int:
    """Longest sequence that the model was built for, tokens; a very large number where unknown."""
    config = unwrap_peft(model).config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or 1 << 30


def uniform_noise(key: Sequence[int], rows: Sequence[int], num_tokens: int) -> Tensor:
    """Draw the random numbers of a batch of responses, (len(rows), num_tokens) float64 in [0, 1).

    Args:
        key: non-negative integers that name the occasion, e.g. (seed, update).
        rows: global row numbers; each row has its own stream.
    """
    draws = [np.random.default_rng([*key, row]).random(num_tokens) for row in rows]
    return torch.from_numpy(np.stack(draws) if draws else np.empty((0, num_tokens)))


class Endings:
    """Tells which responses end, as their tokens arrive."""

    def __init__(self, sampling: Sampling, num_rows: int):
        self._ids, self._strings = {*sampling.stop_ids}, sampling.stop_strings
        self._responses: list[list[int]] = [[] for _ in range(num_rows)]

    def __call__(self, rows: Sequence[int], tokens: Sequence[int]) -> list[bool]:
        """Add one token to each of these rows; return whether it ends the row."""
        done = [token in self._ids for token in tokens]
        if self._strings is None:
            return done
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            self._responses[row].append(token)
            done[i] = self._strings.end(self._responses[row]) or done[i]
        return done
