"""Numbers that a run watches and acts on: explained variance and running moments.

Left out: statistics that are only reported (`rlhf.functional.summary_statistics`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.functional.masks import check_masked


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Measure how well values predict returns: 1 - Var(returns - values) / Var(returns).

    Args:
        values, returns, mask: (B, T).

    Returns: 0-d float32: 1 is perfect, 0 as good as a constant, negative worse. 0 also where the
        returns do not vary or nothing is valid: there is nothing to explain.
    """
    check_masked(mask, values=values, returns=returns)
    targets = returns[mask].float()
    errors = targets - values[mask].float()
    if not len(targets):
        return errors.sum()
    # Shifted by the first, returns that do not vary have a variance of exactly 0.
    target_variance = (targets - targets[0]).var(unbiased=False)
    return torch.where(target_variance == 0, 0.0, 1 - errors.var(unbiased=False) / target_variance)


class Moments(NamedTuple):
    """Running mean and variance of all numbers seen so far, as plain floats: JSON keeps them."""

    count: float = 0.0  # type: ignore[assignment]  # hides the method of tuple
    mean: float = 0.0
    m2: float = 0.0  # sum of squared deviations from the mean

    @property
    def std(self) -> float:
        """Biased standard deviation (divides by `count`); 0 before anything was seen."""
        return math.sqrt(self.m2 / max(self.count, 1.0))


def update_moments(moments: Moments, x: Tensor) -> Moments:
    """Add the elements of `x` to running moments, e.g. the scores of a rollout to scale the next.

    Args:
        moments: those so far; `Moments()` at the start.
        x: any shape, possibly empty; all elements count.

    Returns: the moments of both together, computed in float64. Batches in turn give the same as all
        elements at once. A nan stays in the moments for good.
    Source: Chan, Golub, LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing
        Sample Variances": the parallel form of Welford's update.
    """
    x = x.detach().cpu().double()
    if not x.numel():
        return moments
    batch_mean = x.mean()
    delta = batch_mean.item() - moments.mean
    count = moments.count + x.numel()
    return Moments(
        count=count,
        mean=moments.mean + delta * x.numel() / count,
        m2=moments.m2
        + (x - batch_mean).square().sum().item()
        + delta**2 * moments.count * x.numel() / count,
    )
