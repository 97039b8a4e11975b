"""The choice of the next token: logits in, one token per row and its log-prob out.

Nothing here depends on the values of a tensor, so that a CUDA graph can hold it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf.sampling.settings import Sampling


def choose(
    logits: Tensor, sampling: Sampling, forbidden: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Pick one token per row of (B, V) logits; return it with its log-prob."""
    logits = logits.index_fill(-1, forbidden, -math.inf) / sampling.temperature
    logprobs = logits.log_softmax(dim=-1)
    if noise is None:
        token = logprobs.argmax(dim=-1)
    else:
        cdf = restrict(logprobs, sampling).double().exp().cumsum(dim=-1)
        # right=True: the first token whose cdf exceeds the draw; it has positive probability
        token = torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True).squeeze(1)
        token = token.clamp(max=logits.shape[-1] - 1)
    return token, logprobs.gather(-1, token[:, None]).squeeze(1)


def restrict(logprobs: Tensor, sampling: Sampling) -> Tensor:
    """Set the log-probs (B, V) outside top_k and top_p to -inf."""
    if sampling.top_k:
        kth = logprobs.topk(min(sampling.top_k, logprobs.shape[-1]), dim=-1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < kth, -math.inf)
    if sampling.top_p < 1.0:
        sorted_logprobs, order = logprobs.softmax(dim=-1).log().sort(dim=-1, descending=True)
        probs = sorted_logprobs.exp()
        mass_before = probs.cumsum(dim=-1) - probs  # of the tokens that are more likely
        dropped = torch.zeros_like(logprobs, dtype=torch.bool)
        # the likeliest token always stays: top_p=0 means that alone
        dropped = dropped.scatter(-1, order, (mass_before >= sampling.top_p) & (mass_before > 0))
        logprobs = logprobs.masked_fill(dropped, -math.inf)
    return logprobs
