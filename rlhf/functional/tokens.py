"""Numbers per token: sums, means and whitening over the valid ones; log-probs, entropy and KL."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

LEAST = -1e4  # of a log-prob: its exp is 0, and 0 x this is 0; 0 x -inf would be nan


def check_shapes(expected: tuple[int, ...], **tensors: Tensor) -> None:
    """Refuse tensors whose shape is not `expected`; keywords name them in the message."""
    for name, tensor in tensors.items():
        if tensor.shape != expected:
            raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(tensor.shape)}")


def check_masked(mask: Tensor, **tensors: Tensor) -> None:
    """Refuse a mask that is not bool, and tensors whose shape is not the mask's."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True where valid, got {mask.dtype}; use mask.bool()")
    check_shapes(mask.shape, **tensors)


def zero_masked(x: Tensor, mask: Tensor) -> Tensor:
    """Upcast to float32 and put 0 where masked."""
    # Not x * mask: nan * 0 is nan, in the value and in the gradient.
    return torch.where(mask, x.float(), 0.0)


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Average the valid elements of `x` over the dimensions `dim` (None: all of them); 0 where
    nothing is valid."""
    check_masked(mask, x=x)
    return zero_masked(x, mask).sum(dim=dim) / mask.sum(dim=dim).clamp(min=1)


def masked_sum(x: Tensor, mask: Tensor, denominator: float | Tensor | None = None) -> Tensor:
    """Sum the valid elements of `x` and divide by `denominator`. All losses are reduced like this.

    Args:
        denominator: a number or 0-d tensor; default the number of valid elements. With the number
            of the whole minibatch, the results of its micro-batches add up to the minibatch's mean.

    Returns: 0-d float32; 0 where nothing is valid, for any denominator.
    """
    check_masked(mask, x=x)
    num_valid = mask.sum()
    total = zero_masked(x, mask).sum()
    divisor = torch.as_tensor(num_valid if denominator is None else denominator).to(total)
    check_shapes((), denominator=divisor)
    return total / torch.where(num_valid > 0, divisor, 1.0)


def whiten(x: Tensor, mask: Tensor, center: bool = True) -> Tensor:
    """Scale the valid elements of `x` to unit variance and mean 0; `center=False` keeps their mean.

    Returns: float32, the shape of `x`; 0 where masked.
    Source: openai/lm-human-preferences `utils/core.py::whiten` (biased variance, 1e-8 inside the
        rsqrt); there over all positions, here over the valid ones.
    """
    mean = masked_mean(x, mask)
    deviations = zero_masked(zero_masked(x, mask) - mean, mask)
    whitened = deviations * torch.rsqrt(masked_mean(deviations.square(), mask) + 1e-8)
    return whitened if center else zero_masked(whitened + mean, mask)


BLOCK = 256  # positions whose logits are float32 at once


def _blocks(logits: Tensor) -> Iterator[tuple[int, slice]]:
    for row in range(len(logits)):
        for start in range(0, logits.shape[1], BLOCK):
            yield row, slice(start, start + BLOCK)


def _scaled_logprobs(logits: Tensor, temperature: float, forbidden: Tensor | None) -> Tensor:
    scaled = logits.to(torch.float32, copy=True).div_(temperature)
    if forbidden is not None and len(forbidden):
        scaled.index_fill_(-1, forbidden, -math.inf)
    return torch.log_softmax(scaled, dim=-1)


class _LogprobsAndEntropy(torch.autograd.Function):
    """Saves only the logits as given, and upcasts a block of positions at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        tokens: Tensor,
        temperature: float,
        forbidden: Tensor | None,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.zeros(tokens.shape, dtype=torch.float32, device=logits.device)
        entropy = torch.zeros_like(logprobs)
        for block in _blocks(logits):
            every = _scaled_logprobs(logits[block], temperature, forbidden)  # (T, V)
            logprobs[block] = every.gather(-1, tokens[block][:, None]).squeeze(-1)
            if with_entropy:
                entropy[block] = -every.exp().mul_(every.clamp_(min=LEAST)).sum(-1)
            del every  # before the next block
        ctx.save_for_backward(logits, tokens, entropy, forbidden)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # the gradient of what a loss does not read is None
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Any:
        logits, tokens, entropy, forbidden = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        grads = [
            torch.zeros_like(entropy) if g is None else g for g in (grad_logprobs, grad_entropy)
        ]
        for block in _blocks(logits):
            weights, slopes = ((grad[block] / ctx.temperature)[:, None] for grad in grads)  # (T, 1)
            grad = _scaled_logprobs(logits[block], ctx.temperature, forbidden)
            # d log p of the token / d logit = [it is the token's] - p
            # d entropy / d logit = -p (log p + entropy)
            if grad_entropy is None:
                grad.exp_().mul_(-weights)
            else:
                probs = grad.exp()
                grad.clamp_(min=LEAST).add_(entropy[block][:, None])
                grad.mul_(slopes).add_(weights).mul_(probs).neg_()
                del probs
            grad.scatter_add_(-1, tokens[block][:, None], weights)
            # A position that the loss masks out gets 0 even if its logits are nan.
            grad_logits[block] = grad.masked_fill_((weights == 0) & (slopes == 0), 0.0)
            del grad  # before the next block
        return grad_logits, None, None, None, None


def _check_logits(logits: Tensor, temperature: float) -> None:
    if logits.dim() != 3:
        raise ValueError(f"logits must have shape (B, T, V), got {tuple(logits.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")


def logprobs_and_entropy(
    logits: Tensor,
    tokens: Tensor,
    temperature: float = 1.0,
    forbidden: Tensor | None = None,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute log softmax(logits / temperature) at `tokens`, and the entropy of the softmax, in one
    pass and without a float32 copy of the logits.

    Args:
        logits: (B, T, V); position t predicts `tokens[:, t]`: the caller has shifted them. -inf
            forbids a token: probability and gradient 0. Not to be changed before the backward pass.
        tokens: (B, T) int64 ids in [0, V). A forbidden one gives -inf, so mask it (padding).
        forbidden: ids whose logits count as -inf.
        with_entropy: false gives zeros in its place.

    Returns: log-probs and entropy, nats, (B, T) float32 each, differentiable once. The gradient has
        the dtype of the logits and is exactly 0 where the incoming ones are.
    """
    _check_logits(logits, temperature)
    check_shapes(logits.shape[:2], tokens=tokens)
    return _LogprobsAndEntropy.apply(logits, tokens, temperature, forbidden, with_entropy)


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs of `logprobs_and_entropy` alone, (B, T)."""
    return logprobs_and_entropy(logits, tokens, temperature, with_entropy=False)[0]


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of `logprobs_and_entropy` alone, (B, T)."""
    _check_logits(logits, temperature)
    tokens = torch.zeros(logits.shape[:2], dtype=torch.long, device=logits.device)
    return logprobs_and_entropy(logits, tokens, temperature)[1]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """Estimate KL(policy || reference) at each token, from the one token the policy sampled there.

    Args:
        logprobs, ref_logprobs: (B, T) of the sampled tokens under policy and reference.
        kind: with d = logprobs - ref_logprobs, "k1" = d, unbiased, may be negative; "k2" = d^2 / 2,
            biased, >= 0; "k3" = exp(-d) - 1 + d, unbiased, >= 0.

    Returns: (B, T) float32, per token. It takes no mask: masked positions give garbage, which a
        reduction under the mask removes. Before differentiating k2 or k3, zero masked log-probs.
    Source: Schulman, "Approximating KL Divergence", joschu.net/blog/kl-approx.html (r = exp(-d)).
    """
    check_shapes(logprobs.shape, ref_logprobs=ref_logprobs)
    log_ratio = logprobs.float() - ref_logprobs.float()
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    if kind == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"kind of KL estimate must be k1, k2 or k3, got {kind!r}")
