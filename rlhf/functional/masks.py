"""Sums, means and whitening over the valid elements only, and refusals of wrong shapes."""

from __future__ import annotations

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
    """Average the valid elements of `x`.

    Args:
        x, mask: any one shape.
        dim: dimensions to reduce; None reduces all.

    Returns: float32, `x` without `dim`; 0 where nothing is valid.
    """
    check_masked(mask, x=x)
    return zero_masked(x, mask).sum(dim=dim) / mask.sum(dim=dim).clamp(min=1)


def masked_sum(x: Tensor, mask: Tensor, denominator: float | Tensor | None = None) -> Tensor:
    """Sum the valid elements of `x` and divide by `denominator`.

    All losses are reduced like this. Terms that join them should be too: an entropy bonus, a KL in
    the loss, the pretraining loss of PPO-ptx.

    Args:
        x, mask: any one shape.
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
    """Scale the valid elements of `x` to unit variance and, with `center`, to mean 0.

    Args:
        x, mask: any one shape.
        center: subtract the mean; False adds it back to the scaled deviations.

    Returns: float32, the shape of `x`; 0 where masked, also without `center`.
    Source: openai/lm-human-preferences `utils/core.py::whiten` (biased variance, 1e-8 inside the
        rsqrt); there over all positions, here over the valid ones.
    """
    mean = masked_mean(x, mask)
    deviations = zero_masked(zero_masked(x, mask) - mean, mask)
    whitened = deviations * torch.rsqrt(masked_mean(deviations.square(), mask) + 1e-8)
    return whitened if center else zero_masked(whitened + mean, mask)
