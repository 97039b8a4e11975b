"""Measures and controls of a run: critic, running moments, KL coefficient, best-of-n, win rate."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.functional.masks import check_masked, check_shapes


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

    Returns: the moments of both together, computed in float64. Batch by batch gives what all at
        once gives. A nan stays in them for good.
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


def adaptive_kl_coef(
    kl_coef: float, kl: float, target: float, horizon: float, num_sequences: int
) -> float:
    """Move the price of KL so that the measured KL approaches a target.

    With target 6, horizon 10000, 512 sequences: KL 12 multiplies the coefficient by 1.01024.

    Args:
        kl_coef: the coefficient that the rollout was sampled under, >= 0.
        kl, target: measured and wanted KL(policy || reference), nats per sequence; target > 0.
        horizon: sequences over which a KL 20 % or more off changes the coefficient by about 20 %.
        num_sequences: sequences since the last update, on all ranks together.

    Returns: the coefficient for the next rollout, >= 0; at most 20 % * num_sequences / horizon off.
    Source: Ziegler et al. 2019 (arXiv 1909.08593) section 2.2; openai/lm-human-preferences
        `train_policy.py::AdaptiveKLController`, which a horizon under 0.2 * num_sequences could
        make negative.
    """
    if not (target > 0 and horizon > 0):
        raise ValueError(f"target and horizon must be > 0, got {target} and {horizon}")
    error = min(max(kl / target - 1, -0.2), 0.2)
    # In this order max hands on a nan.
    return max(kl_coef * (1 + error * num_sequences / horizon), 0.0)


@torch.no_grad()
def best_of_n(scores: Tensor, n: int, other: Tensor | None = None) -> Tensor:
    """Estimate, from N samples of each prompt, the expected score of the best of n, unbiased.

    It is the mean over all subsets of n of the N samples. A sample with l lower ones among the N
    is the best of a share (C(l + 1, n) - C(l, n)) / C(N, n) of them. With n = 2 and scores 1 5 3:
    shares 0 2/3 1/3, best of two 13/3.

    Args:
        scores: (P, N), finite.
        n: samples to choose from, 1 <= n <= N.
        other: (P, N); given, the result is the expected `other` of the sample that `scores` picks:
            the gold score of the reward model's choice. Ties of `scores` are broken at random: tied
            samples share alike, whatever their order.

    Returns: (P,) float32, computed in float64. n = 1 is the mean, n = N the best.
    Source: WebGPT (arXiv 2112.09332), appendix on best-of-n; Gao et al. 2022 (arXiv 2210.10760).
        There without ties.
    """
    if scores.dim() != 2:
        raise ValueError(f"scores must have shape (P, N), got {tuple(scores.shape)}")
    num_samples = scores.shape[1]
    if not 1 <= n <= num_samples:
        raise ValueError(f"n must be in 1 .. {num_samples}, the samples of a prompt, got {n}")
    other = scores if other is None else other
    check_shapes(tuple(scores.shape), other=other)
    scores = scores.double().contiguous()
    num_subsets = math.comb(num_samples, n)
    # Share of the subsets that lie within the k lowest samples, for k = 0 .. N.
    within = [math.comb(k, n) / num_subsets for k in range(num_samples + 1)]
    shares = torch.tensor(within, dtype=torch.float64, device=scores.device)
    ordered = scores.sort(dim=1).values
    num_lower = torch.searchsorted(ordered, scores)
    num_not_higher = torch.searchsorted(ordered, scores, right=True)
    weights = (shares[num_not_higher] - shares[num_lower]) / (num_not_higher - num_lower)
    return (weights * other.double()).sum(dim=1).float()


def best_of_n_kl(n: int) -> float:
    """Return log n - (n - 1) / n: how far, in nats per sequence, best-of-n is from its policy.

    It is exact where no two samples are the same, and an upper bound of the true KL otherwise.

    Args:
        n: samples to choose from, >= 1.

    Source: WebGPT (arXiv 2112.09332) and Gao et al. 2022 (arXiv 2210.10760), as an equality;
        Beirami et al. 2024 (arXiv 2401.01879): it is only an upper bound.
    """
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n}")
    return math.log(n) - (n - 1) / n


def bootstrap_interval(
    x: Tensor, level: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Estimate a confidence interval of the mean by the percentile bootstrap.

    Args:
        x: (N,) independent measurements, N >= 1: one per prompt, not one per sample of a prompt.
        level: probability that the interval covers the mean, in (0, 1); lower if N is small.
        num_resamples: means of N draws with replacement, >= 1.
        seed: of the draws; the same gives the same interval.

    Returns: lower and upper end, computed in float64; both x where N = 1 or all are equal.
    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    if x.dim() != 1 or not len(x):
        raise ValueError(f"x must have shape (N,), N >= 1, got {tuple(x.shape)}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    x = x.detach().cpu().double()
    generator = torch.Generator().manual_seed(seed)
    # Shifted by the first, equal elements have a mean of exactly 0.
    shifted = x - x[0]
    draws = (torch.randint(len(x), (len(x),), generator=generator) for _ in range(num_resamples))
    means = torch.stack([shifted[draw].mean() for draw in draws])
    tail = (1 - level) / 2
    lower, upper = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return x[0].item() + lower, x[0].item() + upper


@torch.no_grad()
def wins(scores: Tensor, baseline: Tensor) -> Tensor:
    """Compare scores pairwise; the mean is a win rate.

    Args:
        scores, baseline: (B,) of two responses to the same prompt.

    Returns: (B,) float32: 1 where `scores` is higher, 0.5 where equal, 0 where lower, nan where
        either is nan.
    """
    check_shapes(tuple(scores.shape), baseline=baseline)
    won = (scores > baseline).float() + 0.5 * (scores == baseline)
    return torch.where(scores.isnan() | baseline.isnan(), torch.nan, won)
