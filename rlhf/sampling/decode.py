"""The decode loop: prompt ids in; response ids, log-probs and a `finished` flag out.

It is our own loop on the cache of transformers, and drops rows as soon as they finish. Sampling is
inverse-CDF with one uniform number per token, from a generator keyed by (seed, update, row): a
response does not depend on its batch, on the number of processes, or on earlier samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf.data import pad
from rlhf.models import accepts, eval_mode, prefill_inputs, unwrap_peft
from rlhf.tokenizer import StopStrings, end_token_ids, forbidden_token_ids


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
    num_logits = model.get_output_embeddings().weight.shape[0]
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
    return getattr(unwrap_peft(model).config, "max_position_embeddings", None) or 1 << 30


def uniform_noise(key: Sequence[int], rows: Sequence[int], num_tokens: int) -> Tensor:
    """Draw the random numbers of a batch of responses, (len(rows), num_tokens) float64 in [0, 1).

    Args:
        key: non-negative integers that name the occasion, e.g. (seed, update).
        rows: global row numbers; each row has its own stream.
    """
    draws = [np.random.default_rng([*key, row]).random(num_tokens) for row in rows]
    return torch.from_numpy(np.stack(draws) if draws else np.empty((0, num_tokens)))


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
            for step in _steps(model, [prompt_ids[i] for i in rows], sampling, draws):
                columns = [column.tolist() for column in step]
                for active, token, logprob, done in zip(*columns, strict=True):
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
        for _, token, _, _ in _steps(model, [prompt_ids], sampling, noise):
            yield int(token)


def _steps(
    model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, noise: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """At each step, yield the rows that are still active, and for each of them its next token, the
    token's log-prob, and whether the token ends the row."""
    device = next(model.parameters()).device
    tokens = pad(prompts, 0, side="left", device=device)
    mask = pad([[True] * len(prompt) for prompt in prompts], False, side="left", device=device)
    stop_ids = torch.tensor(sampling.stop_ids, device=device)
    forbidden = sampling.forbidden.to(device)
    noise = None if noise is None else noise.to(device)
    active = torch.arange(len(prompts), device=device)
    responses: list[list[int]] = [[] for _ in prompts]  # kept where stop strings are looked for
    cache = DynamicCache(config=unwrap_peft(model).config)
    last_only = {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}
    for t in range(sampling.max_new_tokens):
        inputs = prefill_inputs(model, tokens, mask)
        if t and "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"][:, -1:]
        output = model(**inputs, **last_only, past_key_values=cache, use_cache=True)
        draws = None if noise is None else noise[active, t]
        token, logprob = _choose(output.logits[:, -1].float(), sampling, forbidden, draws)
        done = torch.isin(token, stop_ids)
        if sampling.stop_strings is not None:
            for row, next_token in zip(active.tolist(), token.tolist(), strict=True):
                responses[row].append(next_token)
            ended = [sampling.stop_strings.end(responses[row]) for row in active.tolist()]
            done |= torch.tensor(ended, device=device)
        yield active, token, logprob, done
        if done.any():
            keep = (~done).nonzero().squeeze(1)
            if not len(keep):
                break
            cache.batch_select_indices(keep)
            active, mask, token = active[keep], mask[keep], token[keep]
        tokens = token[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)


def _choose(
    logits: Tensor, sampling: Sampling, forbidden: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Pick one token per row of (B, V) logits; return it with its log-prob."""
    logits = logits.index_fill(-1, forbidden, -math.inf) / sampling.temperature
    logprobs = logits.log_softmax(dim=-1)
    if noise is None:
        token = logprobs.argmax(dim=-1)
    else:
        cdf = _restrict(logprobs, sampling).double().exp().cumsum(dim=-1)
        # right=True: the first token whose cdf exceeds the draw; it has positive probability
        token = torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True).squeeze(1)
        token = token.clamp(max=logits.shape[-1] - 1)
    return token, logprobs.gather(-1, token[:, None]).squeeze(1)


def _restrict(logprobs: Tensor, sampling: Sampling) -> Tensor:
    """Set the log-probs (B, V) outside top_k and top_p to -inf."""
    if sampling.top_k:
        kth = logprobs.topk(min(sampling.top_k, logprobs.shape[-1]), dim=-1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < kth, -math.inf)
    if sampling.top_p < 1.0:
        sorted_logprobs, order = logprobs.softmax(dim=-1).log().sort(dim=-1, descending=True)
        probs = sorted_logprobs.exp()
        mass_before = probs.cumsum(dim=-1) - probs  # of the tokens that are more likely
        dropped = torch.zeros_like(logprobs, dtype=torch.bool)
        dropped = dropped.scatter(-1, order, mass_before >= sampling.top_p)
        logprobs = logprobs.masked_fill(dropped, -math.inf)
    return logprobs
