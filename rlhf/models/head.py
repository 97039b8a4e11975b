"""The output head on the tokens that a loss reads: their log-probs and entropy.

A causal LM makes a logit for each token of its vocabulary at each position. Here its head reads
only the positions that are asked for, and the logits of a chunk of them exist at once: those of
other chunks are computed again in the backward pass. A model that changes its logits after the
head, such as Gemma 2 (soft capping) and Cohere (scaling), makes all logits that are read at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from rlhf.distributed import compute_device
from rlhf.functional import logprobs_and_entropy
from rlhf.models.forward import eval_mode, forward_inputs, positions_in_hidden, unwrap_peft

Head = Callable[[Tensor], Tensor]
CHUNK, CHUNK_TOKENS = "_rlhf_chunk_tokens", 1024


class Reading(NamedTuple):
    """Which response tokens of a batch are read, and how.

    Attributes:
        sequence_ids, mask: (B, L) int64, right-padded, and bool.
        positions: (B, T) int64, T < L; the position of the token before each response token.
        tokens, wanted: (B, T) int64 and bool; which response tokens are read.
        forbidden: ids of probability 0.
        temperature: divides the logits.
        with_entropy: false gives zeros in its place.
    """

    sequence_ids: Tensor
    mask: Tensor
    positions: Tensor
    tokens: Tensor
    wanted: Tensor
    forbidden: Tensor
    temperature: float = 1.0
    with_entropy: bool = False


def response_logprobs(
    model: Any, reading: Reading, on_states: Callable[[Tensor], None] | None = None
) -> tuple[Tensor, Tensor]:
    """Return log-probs of response tokens, and the entropy of what could be in their place.

    Args:
        model: a causal LM, possibly wrapped by PEFT or by a distributed wrapper.
        on_states: gets the hidden states of the N wanted tokens, (N, H), row by row.

    Returns:
        (B, T) float32 each, nats; 0 where not wanted.
    """
    mask, tokens, wanted = reading.mask, reading.tokens, reading.wanted
    inputs = forward_inputs(model, reading.sequence_ids, mask)
    rows, steps = wanted.nonzero(as_tuple=True)
    index = positions_in_hidden(inputs["input_ids"], mask, rows, reading.positions[rows, steps])
    asked, forbidden = tokens[rows, steps], reading.forbidden.to(tokens.device)  # (N,)

    def read(logits: Tensor, ids: Tensor) -> Tensor:
        both = logprobs_and_entropy(
            logits[None], ids[None], reading.temperature, forbidden, reading.with_entropy
        )
        return torch.cat(both).T  # (N, 2)

    numbers = _read(model, inputs, index, asked, read, on_states)
    results = numbers.new_zeros(*wanted.shape, 2).index_put((rows, steps), numbers)
    return results[..., 0], results[..., 1]


def _read(
    model: Any,
    inputs: dict[str, Tensor],
    index: Any,
    tokens: Tensor,
    read: Callable[[Tensor, Tensor], Tensor],
    on_states: Callable[[Tensor], None] | None,
) -> Tensor:
    """Apply `read` to logits (N, V) and tokens (N,) at an index of the hidden states."""

    def choose(hidden: Tensor) -> Tensor:
        chosen = hidden[index]
        if on_states is not None:
            on_states(chosen)
        return chosen

    def in_chunks(head: Head, hidden: Tensor) -> Tensor:
        size, chosen = _unwrapped(model).__dict__.get(CHUNK, CHUNK_TOKENS), choose(hidden)
        if len(tokens) <= size:
            return read(head(chosen), tokens)
        parts = zip(chosen.split(size), tokens.split(size), strict=True)
        function = partial(checkpoint, lambda part, ids: read(head(part), ids))
        return torch.cat([function(*part, use_reentrant=False) for part in parts])

    # The head reads a copy of the hidden states. With a slice, a frozen head would use another
    # kernel, and the KL to an equal reference would be 1e-6 instead of 0.
    head = _unwrapped(model).get_output_embeddings()
    if ends_with_head(model):
        with _in_place_of(head, in_chunks):
            return model(**inputs, use_cache=False).logits
    with _in_place_of(head, lambda plain, hidden: plain(choose(hidden))):
        return read(model(**inputs, use_cache=False).logits, tokens)


def choose_chunk_tokens(model: Any, number: int) -> None:
    """Set how many tokens of `response_logprobs` have logits at once, in place. It also measures
    `ends_with_head`, so that no later pass does."""
    ends_with_head(model)
    setattr(_unwrapped(model), CHUNK, number)


@contextmanager
def chunk_tokens(model: Any, number: int) -> Iterator[None]:
    """As `choose_chunk_tokens`, inside the block."""
    before = _unwrapped(model).__dict__.get(CHUNK, CHUNK_TOKENS)
    choose_chunk_tokens(model, number)
    try:
        yield
    finally:
        choose_chunk_tokens(model, before)


@torch.no_grad()
def ends_with_head(model: Any) -> bool:
    """True if a causal LM returns what its head returns; measured once for each model, with numbers
    that the head does not make itself, and that soft capping would change."""
    inner = _unwrapped(model)
    if not hasattr(inner, "_rlhf_ends_with_head"):
        made: list[Tensor] = []
        reader: Any = model if isinstance(model, FSDPModule) else inner

        def replaced(_: Any, __: Any, logits: Tensor) -> Tensor:
            numbers = torch.linspace(-100, 100, logits.numel(), device=logits.device)
            made.append(numbers.view(logits.shape).to(logits.dtype))
            return made[-1]

        hook = inner.get_output_embeddings().register_forward_hook(replaced)
        try:
            with eval_mode(inner):
                ids = torch.zeros(1, 2, dtype=torch.long, device=compute_device(inner))
                logits = reader(input_ids=ids, use_cache=False).logits
        finally:
            hook.remove()
        inner._rlhf_ends_with_head = len(made) == 1 and torch.equal(logits, made[0].to(logits))
    return inner._rlhf_ends_with_head


@contextmanager
def _in_place_of(head: nn.Module, function: Callable[[Head, Tensor], Tensor]) -> Iterator[None]:
    """Let the head return `function` of its own forward pass and of its input, inside the block."""
    plain, patched = head.forward, head.__dict__.get("forward")
    head.forward = partial(function, plain)
    try:
        yield
    finally:
        del head.forward
        if patched is not None:
            head.forward = patched


def _unwrapped(model: Any) -> Any:
    return unwrap_peft(getattr(model, "module", model))
