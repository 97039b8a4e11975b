"""Numbers per token: sums, means and whitening over the valid ones; log-probs, entropy and KL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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


def _scaled_row(logits_row: Tensor, temperature: float) -> Tensor:
    return logits_row.to(torch.float32, copy=True).div_(temperature)


class _TokenLogprobs(torch.autograd.Function):
    """log_softmax and gather, saving only the logits as given; upcasts one sequence at a time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(logits, tokens)
        ctx.temperature = temperature
        logprobs = torch.empty(tokens.shape, dtype=torch.float32, device=logits.device)
        for row in range(len(logits)):
            row_logprobs = torch.log_softmax(_scaled_row(logits[row], temperature), dim=-1)
            logprobs[row] = row_logprobs.gather(-1, tokens[row, :, None]).squeeze(-1)
        return logprobs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor) -> tuple[Tensor, None, None]:
        logits, tokens = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for row in range(len(logits)):
            weights = (grad_logprobs[row] / ctx.temperature)[:, None]  # (T, 1)
            grad_row = torch.softmax(_scaled_row(logits[row], ctx.temperature), dim=-1)
            grad_row.mul_(-weights).scatter_add_(-1, tokens[row, :, None], weights)
            # A position that the loss masks out gets 0 even if its logits are nan.
            grad_logits[row] = grad_row.masked_fill_(weights == 0, 0.0)
        return grad_logits, None, None


class _TokenEntropy(torch.autograd.Function):
    """Sum of entr(p) = -p log p, which is 0 at p = 0; upcasts one sequence at a time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: float) -> Tensor:
        entropy = torch.empty(logits.shape[:2], dtype=torch.float32, device=logits.device)
        for row in range(len(logits)):
            probs = torch.softmax(_scaled_row(logits[row], temperature), dim=-1)
            entropy[row] = torch.special.entr(probs).sum(-1)
        ctx.save_for_backward(logits, entropy)
        ctx.temperature = temperature
        return entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_entropy: Tensor) -> tuple[Tensor, None]:
        logits, entropy = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for row in range(len(logits)):
            weights = (grad_entropy[row] / ctx.temperature)[:, None]  # (T, 1)
            probs = torch.softmax(_scaled_row(logits[row], ctx.temperature), dim=-1)
            # d entropy / d logit = -p (log p + entropy) = entr(p) - p * entropy
            grad_row = torch.special.entr(probs).sub_(probs.mul_(entropy[row, :, None]))
            grad_logits[row] = grad_row.mul_(weights).masked_fill_(weights == 0, 0.0)
        return grad_logits, None


def _check_logits(logits: Tensor, temperature: float) -> None:
    if logits.dim() != 3:
        raise ValueError(f"logits must have shape (B, T, V), got {tuple(logits.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute log softmax(logits / temperature) at `tokens` without a float32 copy of the logits.

    Args:
        logits: (B, T, V); position t predicts `tokens[:, t]`: the caller has shifted them. -inf
            forbids a token: probability and gradient 0. Not to be changed before the backward pass.
        tokens: (B, T) int64 ids in [0, V). A forbidden one gives -inf, so mask it (padding).

    Returns: (B, T) float32, differentiable once. The gradient has the dtype of the logits and is
        exactly 0 where the incoming one is.
    """
    _check_logits(logits, temperature)
    check_shapes(logits.shape[:2], tokens=tokens)
    return _TokenLogprobs.apply(logits, tokens, temperature)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the entropy of softmax(logits / temperature), (B, T) float32.

    Args and gradient: as `token_logprobs`. A forbidden token adds nothing and gets gradient 0.
    """
    _check_logits(logits, temperature)
    return _TokenEntropy.apply(logits, temperature)


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
