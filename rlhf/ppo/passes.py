"""Forward passes over the tokens of a rollout: log-probs of a policy and values of a critic, from
one pass where both share a trunk; and the loss of plain texts.

`rollout.py` reads a whole rollout with them, `update.py` one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf.data import pad
from rlhf.distributed import compute_device
from rlhf.functional import masked_sum
from rlhf.models import Reading, token_outputs
from rlhf.sampling import Sampling

if TYPE_CHECKING:
    from rlhf.ppo.rollout import Responses


def policy_outputs(
    model: Any, part: Responses, sampling: Sampling, with_entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the response tokens by the training forward pass, the entropy at each of them
    (else zeros), and the values of a head on the policy's trunk (zeros without one); (B, T) float32
    each, 0 where masked."""
    reading = Reading(
        part.sequence_ids,
        part.sequence_mask,
        part.state_positions,
        part.response_ids,
        part.response_mask,
        sampling.forbidden,
        sampling.temperature,
        with_entropy,
    )
    return token_outputs(model, reading)


def policy_logprobs(
    model: Any, part: Responses, sampling: Sampling, with_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy of `policy_outputs`."""
    return policy_outputs(model, part, sampling, with_entropy)[:2]


def read_policy(
    model: Any, read: Callable[[Callable[[Responses], Tensor]], Tensor], sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Log-probs and values of `policy_outputs` for a whole rollout, from one pass.

    Args:
        read: applies a function to the same parts of the rollout, in the same order, every time.
    """
    kept: list[Tensor] = []

    def logprobs(part: Responses) -> Tensor:
        numbers, _, values = policy_outputs(model, part, sampling)
        kept.append(values)
        return numbers

    return read(logprobs), read(lambda _: kept.pop(0))


def critic_values(critic: Any, part: Responses) -> Tensor:
    """Value of the state before each response token, (B, T) float32."""
    return critic(part.sequence_ids, part.sequence_mask).gather(1, part.state_positions)


def text_loss(model: Any, texts: Sequence[Sequence[int]], denominator: float) -> Tensor:
    """Sum of -log p over all tokens of texts but the first of each, divided by `denominator`."""
    device = compute_device(model)
    ids = pad(texts, 0, device=device)
    mask = pad([[True] * len(text) for text in texts], False, device=device)
    positions = torch.arange(ids.shape[1] - 1, device=device).expand(len(ids), -1)
    none, wanted = positions.new_empty(0), mask[:, 1:]
    reading = Reading(ids, mask, positions, ids[:, 1:], wanted, none)
    logprobs, _, values = token_outputs(model, reading)
    # with several processes, each weight must take part in each backward pass
    return masked_sum(-logprobs, wanted, denominator) + 0.0 * values.sum()
