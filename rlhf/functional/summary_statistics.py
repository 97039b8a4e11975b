"""Statistics that reports show: best-of-n, bootstrap intervals, win rates, and the order and
calibration of a reward model's scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.functional.tokens import check_shapes


def normal_score(t: float, degrees: int) -> float:
    """The value of a standard normal variable that is as rare as `t` under Student's t.

    The mean of few numbers, over its standard error, is often far from 0: 3 at 7 degrees of freedom
    is as rare as 2.3 of a normal variable.

    Args:
        t: a mean over its standard error, the latter from an unbiased variance.
        degrees: of freedom, one less than the numbers in the mean, at least 1.

    Source: Wallace 1959, Annals of Mathematical Statistics 30(4), within 0.1 of the exact value
        from 3 degrees on.
    """
    size = math.sqrt(degrees * math.log1p(t * t / degrees)) * (8 * degrees + 1) / (8 * degrees + 3)
    return math.copysign(size, t)


@torch.no_grad()
def best_of_n(scores: Tensor, n: int, other: Tensor | None = None) -> Tensor:
    """Estimate, from N samples of each prompt, the expected score of the best of n, unbiased.

    It is the mean over all subsets of n of the N samples. A sample with l lower ones among the N
    is the best of a share (C(l + 1, n) - C(l, n)) / C(N, n) of them. With n = 2 and scores 1 5 3:
    shares 0 2/3 1/3, best of two 13/3.

    Args:
        scores: (P, N), finite.
        other: (P, N); if given, the result is the expected `other` of the sample that `scores`
            picks, e.g. the gold score of the reward model's choice. Tied samples have equal shares.

    Returns: (P,) float32, computed in float64.
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

    Source: WebGPT (arXiv 2112.09332) and Gao et al. 2022 (arXiv 2210.10760), as an equality;
        Beirami et al. 2024 (arXiv 2401.01879): it is only an upper bound.
    """
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n}")
    return math.log(n) - (n - 1) / n


def bootstrap_interval(
    x: Tensor,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
    clusters: Tensor | None = None,
) -> tuple[float, float]:
    """Estimate a confidence interval of the mean by the percentile bootstrap.

    Args:
        x: (N,) measurements, N >= 1. Without `clusters` they must be independent: one per prompt,
            not one per sample of a prompt.
        level: probability that the interval covers the mean, in (0, 1); lower if N is small.
        num_resamples: means of N draws with replacement, >= 1.
        clusters: (N,) integer id of the independent unit, e.g. the prompt of a pair. Whole clusters
            are drawn. The mean is over all their measurements: a cluster of ten weighs ten times as
            much as a cluster of one.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13; clusters:
        Field and Welsh 2007, "Bootstrapping clustered data", section 2 (cluster bootstrap).
    """
    if x.dim() != 1 or not len(x):
        raise ValueError(f"x must have shape (N,), N >= 1, got {tuple(x.shape)}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    x = x.detach().cpu().double()
    # Shifted by the first, equal elements have a mean of exactly 0.
    sums = shifted = x - x[0]
    counts = torch.ones_like(x)
    if clusters is not None:
        check_shapes(tuple(x.shape), clusters=clusters)
        ids, index = clusters.cpu().unique(return_inverse=True)
        empty = torch.zeros(len(ids), dtype=torch.float64)
        sums, counts = empty.index_add(0, index, shifted), empty.index_add(0, index, counts)
    draws = _resamples(len(sums), num_resamples, seed)
    means = torch.cat([sums[draw].sum(1) / counts[draw].sum(1) for draw in draws])
    tail = (1 - level) / 2
    lower, upper = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return x[0].item() + lower, x[0].item() + upper


def _resamples(size: int, num_resamples: int, seed: int) -> Iterator[Tensor]:
    """Yield draws of `size` indices with replacement, (num, size) at a time to bound memory."""
    generator = torch.Generator().manual_seed(seed)
    at_a_time = max(1, 2**20 // size)
    for done in range(0, num_resamples, at_a_time):
        num = min(at_a_time, num_resamples - done)
        yield torch.randint(size, (num, size), generator=generator)


@torch.no_grad()
def correlation(x: Tensor, y: Tensor, kind: str = "pearson") -> float:
    """Measure how x and y vary together, in [-1, 1]; nan where either does not vary.

    "spearman" is the correlation of the ranks; ties share the mean of their ranks. With x 1 2 3 and
    y 1 2 9: Pearson 0.918, Spearman 1.
    """
    if kind not in ("pearson", "spearman"):
        raise ValueError(f"kind of correlation must be pearson or spearman, got {kind!r}")
    check_shapes((len(x),), x=x, y=y)
    columns = [column.detach().cpu().double() for column in (x, y)]
    if kind == "spearman":
        columns = [_mean_ranks(column) for column in columns]
    # Shifted by the first, equal elements have deviations of exactly 0.
    columns = [column - column[:1] for column in columns]
    x, y = (column - column.mean() for column in columns)
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return float(((x * y).sum() / scale).clamp(-1, 1)) if scale != 0 else math.nan


def _mean_ranks(x: Tensor) -> Tensor:
    """Return ranks from 0; 5 7 7 9 gives 0 1.5 1.5 3."""
    _, index, counts = x.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return torch.where(x.isnan(), x, (ends - (counts + 1) / 2)[index])


@torch.no_grad()
def kendall_tau(x: Tensor, y: Tensor) -> float:
    """Measure how alike x and y order the N elements, in [-1, 1]; nan where either has one value.

    Without ties it is the share of pairs ordered alike minus the share ordered differently. Memory
    is O(N^2).

    Source: Kendall 1945, "The treatment of ties in ranking problems": tau-b.
    """
    check_shapes((len(x),), x=x, y=y)
    if x.isnan().any() or y.isnan().any():
        return math.nan
    x, y = ((v[:, None] > v).double() - (v[:, None] < v).double() for v in (x.cpu(), y.cpu()))
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / scale) if scale != 0 else math.nan


class Calibration(NamedTuple):
    """How well predicted probabilities match what was preferred; see `calibration`."""

    predicted: Tensor  # (num_bins,) mean probability of a bin; nan where it is empty
    observed: Tensor  # (num_bins,) share of pairs whose higher score is the better response
    counts: Tensor  # (num_bins,) pairs
    ece: float  # expected calibration error: mean |predicted - observed| over pairs
    brier: float  # mean squared error of the probabilities


@torch.no_grad()
def calibration(gaps: Tensor, num_bins: int = 10) -> Calibration:
    """Compare sigmoid(score difference), the Bradley-Terry probability, with what was preferred.

    The prediction for each pair is that its higher score wins, with a probability in [0.5, 1]. The
    bins divide that range evenly. The prediction is right if the better response has the higher
    score; equal scores predict 0.5 and count as half right. A coin has a Brier score of 0.25.

    Args:
        gaps: (N,) score of the better response minus that of the worse, N >= 1.

    Source: Bradley-Terry as in InstructGPT (arXiv 2203.02155) eq. 1; ECE: Guo et al. 2017
        (arXiv 1706.04599) eq. 3; Brier 1950.
    """
    if gaps.dim() != 1 or not len(gaps) or gaps.isnan().any():
        raise ValueError(f"gaps must be (N,) numbers, N >= 1, got {tuple(gaps.shape)} or a nan")
    gaps = gaps.detach().cpu().double()
    probs = gaps.abs().sigmoid()
    right = (gaps > 0).double() + 0.5 * (gaps == 0)
    index = ((probs - 0.5) * 2 * num_bins).long().clamp(max=num_bins - 1)
    empty = torch.zeros(num_bins, dtype=torch.float64)
    counts = empty.index_add(0, index, torch.ones_like(probs))
    predicted = empty.index_add(0, index, probs) / counts
    observed = empty.index_add(0, index, right) / counts
    ece = ((predicted - observed).abs() * counts).nansum() / len(gaps)
    # sigmoid(-gap) is the probability that went to the worse response.
    return Calibration(
        predicted, observed, counts.long(), float(ece), float((-gaps).sigmoid().square().mean())
    )


@torch.no_grad()
def wins(scores: Tensor, baseline: Tensor) -> Tensor:
    """Compare (B,) scores: 1 where `scores` is higher, 0.5 where equal, 0 where lower, nan where
    either is nan. The mean is a win rate."""
    check_shapes(tuple(scores.shape), baseline=baseline)
    won = (scores > baseline).float() + 0.5 * (scores == baseline)
    return torch.where(scores.isnan() | baseline.isnan(), torch.nan, won)
