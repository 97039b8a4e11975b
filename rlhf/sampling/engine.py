"""The way in: prompt ids in; response ids, log-probs and a `finished` flag out.

Sampling is inverse-CDF with one uniform number per token, from a generator keyed by (seed, update,
row): a response does not depend on its batch, on the number of processes, or on earlier samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.models import eval_mode
from rlhf.sampling.loop import loop
from rlhf.sampling.settings import Generation, Sampling


@torch.no_grad()
def generate(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    noise: Tensor | None,
    batch_size: int = 64,
) -> Generation:
    """Sample one response per prompt.

    Args:
        model: a causal LM (PEFT allowed, no distributed wrapper).
        prompt_ids: token ids per prompt, not padded, not empty.
        noise: (B, max_new_tokens) from `uniform_noise`; None takes the most likely token.
        batch_size: sequences decoded together.
    """
    count = len(prompt_ids)
    result = Generation([[] for _ in prompt_ids], [[] for _ in prompt_ids], [False] * count)
    order = sorted(range(count), key=lambda i: len(prompt_ids[i]))  # similar lengths: less padding
    with eval_mode(model):
        for start in range(0, count, batch_size):
            rows = order[start : start + batch_size]
            draws = None if noise is None else noise[rows]
            for step in loop(model, [prompt_ids[i] for i in rows], sampling, draws):
                for active, token, logprob, done in zip(*step, strict=True):
                    result.ids[rows[active]].append(token)
                    result.logprobs[rows[active]].append(logprob)
                    result.finished[rows[active]] = done
    return result


@torch.no_grad()
def stream(
    model: Any, prompt_ids: Sequence[int], sampling: Sampling, noise: Tensor | None
) -> Iterator[int]:
    """As `generate` for one prompt, but yield each token as soon as it is chosen."""
    with eval_mode(model):
        for step in loop(model, [prompt_ids], sampling, noise):
            yield step.tokens[0]
