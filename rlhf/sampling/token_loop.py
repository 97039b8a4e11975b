"""The engine `loop`: a forward pass per token, on a cache that grows.

It drops rows as soon as they finish.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from rlhf.data import pad
from rlhf.distributed import compute_device
from rlhf.models import accepts, prefill_inputs, unwrap_peft
from rlhf.sampling.cache import roomy_cache
from rlhf.sampling.settings import Endings, Sampling
from rlhf.sampling.token_choice import choose


class Step(NamedTuple):
    """One token for each row that is still active.

    Attributes:
        rows: numbers of these rows.
        tokens, logprobs: the next token of each, and its log-prob, nats.
        done: whether the token ends the row.
    """

    rows: list[int]
    tokens: list[int]
    logprobs: list[float]
    done: list[bool]


def loop(
    model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, noise: Tensor | None
) -> Iterator[Step]:
    """Sample a response to each prompt, a token at a time, with the model in eval mode.

    Args:
        noise: (B, max_new_tokens) from `uniform_noise`; None takes the most likely token.
    """
    device = compute_device(model)
    forbidden = sampling.forbidden.to(device)
    noise = None if noise is None else noise.to(device)
    active, ends = torch.arange(len(prompts), device=device), Endings(sampling, len(prompts))
    cache = roomy_cache(unwrap_peft(model).config)
    logits, mask = prefill(model, prompts, cache)
    for t in range(sampling.max_new_tokens):
        draws = None if noise is None else noise[active, t]
        token, logprob = choose(logits, sampling, forbidden, draws)
        rows, chosen = active.tolist(), token.tolist()
        done = ends(rows, chosen)
        yield Step(rows, chosen, logprob.tolist(), done)
        if all(done) or t + 1 == sampling.max_new_tokens:
            break
        if any(done):
            keep = torch.tensor([i for i, end in enumerate(done) if not end], device=device)
            cache.batch_select_indices(keep)
            active, mask, token = active[keep], mask[keep], token[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = _read(model, token[:, None], mask, cache)


def prefill(model: Any, prompts: Sequence[Sequence[int]], cache: Cache) -> tuple[Tensor, Tensor]:
    """Read the prompts into an empty cache, equal ones once.

    Returns:
        Logits of the token after each prompt, (B, V) float32, and the mask of the prompts, (B, P)
        bool, left-padded.
    """
    device = compute_device(model)
    different = list(dict.fromkeys(map(tuple, prompts)))
    tokens = pad(different, 0, side="left", device=device)
    mask = pad([[True] * len(prompt) for prompt in different], False, side="left", device=device)
    logits = _read(model, tokens, mask, cache)
    if len(different) < len(prompts):
        number = {prompt: i for i, prompt in enumerate(different)}
        rows = torch.tensor([number[tuple(prompt)] for prompt in prompts], device=device)
        cache.batch_select_indices(rows)
        logits, mask = logits[rows], mask[rows]
    return logits, mask


def _read(model: Any, tokens: Tensor, mask: Tensor, cache: Cache) -> Tensor:
    """Read tokens (B, N) after those in the cache; return the logits after the last, (B, V)."""
    inputs = prefill_inputs(model, tokens, mask)
    if "position_ids" in inputs:
        inputs["position_ids"] = inputs["position_ids"][:, -tokens.shape[1] :]
    last_only = {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}
    output = model(**inputs, **last_only, past_key_values=cache, use_cache=True)
    return output.logits[:, -1].float()
