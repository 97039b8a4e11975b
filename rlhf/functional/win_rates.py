"""Comparing two models by judgements: win rates, the part that length explains, errors of a judge.

A preference is 1 where the second model's answer is better, 0 where the first's is, 0.5 for a tie.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.functional.summary_statistics import _resamples
from rlhf.functional.tokens import check_shapes

RIDGE = 1e-3  # of the regression; keeps it finite where one model always wins
NUM_STEPS = 50


def win_rate(wins: float, losses: float, ties: float = 0) -> float:
    """Return the share of comparisons that are won, a tie counting one half.

    Source: AlpacaEval (github.com/tatsu-lab/alpaca_eval, metrics/winrate.py). Its alpaca-7b:
        205 wins, 584 losses, 16 ties of 805 -> 0.2646.
    """
    if min(wins, losses, ties) < 0 or not wins + losses + ties:
        raise ValueError(f"counts must be >= 0 and not all 0, got {wins}, {losses}, {ties}")
    return (wins + ties / 2) / (wins + losses + ties)


def geometric_mean(x: Tensor) -> float:
    """Return the geometric mean of positive numbers; one weak task pulls it down.

    Source: the last column of Dolly's table (huggingface.co/databricks/dolly-v2-12b).
    """
    if not len(x) or not (x >= 0).all():
        raise ValueError(f"x must be numbers >= 0, at least one, got {x.tolist()}")
    return float(x.double().log().mean().exp())


class LengthControlled(NamedTuple):
    """A win rate as if all answers were equally long; see `length_controlled`."""

    win_rate: float
    low: float  # 95 % bootstrap interval
    high: float
    quality: float  # theta: log-odds of a win at equal length
    length: float  # phi: what a longer answer adds to the log-odds, at most


@torch.no_grad()
def length_controlled(
    preferences: Tensor, length_gaps: Tensor, num_resamples: int = 500, seed: int = 0
) -> LengthControlled:
    """Estimate the win rate that is left when the answers' length plays no part.

    It fits P(win) = sigmoid(theta + phi tanh(gap / std(gap))) by logistic regression with a tiny
    ridge, and returns sigmoid(theta).

    Args:
        preferences: (N,) of the second model, in [0, 1].
        length_gaps: (N,) characters of the second model's answer minus those of the first's.

    Source: AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475) eq. 2. Their term for the difficulty
        of an instruction, and the games against a longer and a shorter self that regularise phi,
        need the judgements of their leaderboard; they are left out.
    """
    check_shapes((len(preferences),), preferences=preferences, length_gaps=length_gaps)
    if not len(preferences) or not ((preferences >= 0) & (preferences <= 1)).all():
        raise ValueError("preferences must lie in [0, 1], at least one")
    y, gap = preferences.detach().cpu().double(), length_gaps.detach().cpu().double()
    spread = gap.std(unbiased=True) if len(gap) > 1 else gap.new_zeros(())
    z = torch.tanh(gap / spread) if spread > 0 else torch.zeros_like(gap)
    x = torch.stack([torch.ones_like(z), z], dim=1)  # (N, 2)
    quality, length = _fit(x[None], y[None])[0].tolist()
    draws = _resamples(len(y), num_resamples, seed)
    rates = torch.cat([_fit(x[draw], y[draw])[:, 0].sigmoid() for draw in draws])
    low, high = rates.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return LengthControlled(1 / (1 + math.exp(-quality)), low, high, quality, length)


def _fit(x: Tensor, y: Tensor) -> Tensor:
    """Coefficients of R logistic regressions, (R, 2), by Newton's method from (R, N, 2), (R, N)."""
    ridge = RIDGE * torch.eye(x.shape[2], dtype=x.dtype)
    weights = x.new_zeros(x.shape[0], x.shape[2])
    for _ in range(NUM_STEPS):
        p = (x @ weights[:, :, None])[:, :, 0].sigmoid()
        gradient = ((y - p)[:, None] @ x)[:, 0] - RIDGE * weights
        hessian = (x * (p * (1 - p))[:, :, None]).mT @ x + ridge
        step = torch.linalg.solve(hessian, gradient)
        weights += step / step.norm(dim=1, keepdim=True).clamp(min=1)
        if step.abs().max() < 1e-9:
            break
    return weights


class Corrected(NamedTuple):
    """A mean with the judge's error taken out; see `prediction_powered_mean`."""

    mean: float
    low: float
    high: float
    trust: float  # lambda: weight of the judge's labels; 0: only the gold labels count


@torch.no_grad()
def prediction_powered_mean(
    gold: Tensor, judged: Tensor, judged_rest: Tensor, z: float = 1.96
) -> Corrected:
    """Estimate a mean from few gold labels and many labels of a judge that may be wrong.

    mean = mean(gold) + lambda (mean(judged_rest) - mean(judged)): the gold labels measure what the
    judge gets wrong on their rows. lambda has the smallest variance; it is near 1 for a judge that
    agrees with the labels, near 0 for one that does not.

    Args:
        gold, judged: (n,) labels in [0, 1] of the same rows, n >= 2.
        judged_rest: (N,) labels by the judge of the other rows, N >= 1.
        z: two-sided quantile of the normal distribution; widened to Student's t with n - 1 degrees.

    Source: Angelopoulos et al. 2023, PPI++ (arXiv 2311.01453) section 2 and 6. Ours counts one
        disagreement more than there is: few labels without any would give an interval of width 0.
        Quantile of t: Abramowitz and Stegun 26.7.5.
    """
    check_shapes((len(gold),), gold=gold, judged=judged)
    n, num_rest = len(gold), len(judged_rest)
    if n < 2 or num_rest < 1:
        raise ValueError(f"expected 2 gold labels and 1 other row or more, got {n} and {num_rest}")
    gold, judged, rest = (x.detach().cpu().double() for x in (gold, judged, judged_rest))
    everything = torch.cat([judged, rest])
    variance = everything.var()
    trust = 0.0
    if variance > 0:
        covariance = ((gold - gold.mean()) * (judged - judged.mean())).sum() / (n - 1)
        trust = float((covariance / (variance * (1 + n / num_rest))).clamp(0, 1))
    mean = float(gold.mean() + trust * (rest.mean() - judged.mean()))
    error = gold - trust * judged
    squares = float((error - error.mean()).square().sum()) + 1
    spread = squares / (n - 1) / n + trust**2 * float(variance) / num_rest
    degrees = n - 1
    t = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    half = t * math.sqrt(spread)
    mean = min(1.0, max(0.0, mean))
    return Corrected(mean, max(0.0, mean - half), min(1.0, mean + half), trust)
