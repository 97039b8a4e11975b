"""How far annotators agree: Krippendorff's alpha and pairwise agreement, with intervals.

Plain numbers and numpy, without torch: the page shows them while people work. The intervals
resample whole prompts, because the ranks of one prompt depend on each other. Left out: nominal and
interval scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

NUM_RESAMPLES = 1000
AT_A_TIME = 100  # resamples, so that memory stays small with many prompts

Ranks = Sequence[float]  # of the answers to one prompt, by one annotator; 0 is best


class Estimate(NamedTuple):
    """A number with its 95 % interval; nan where the data do not determine it."""

    value: float
    low: float
    high: float


def mean_ranks(ranks: Ranks) -> list[float]:
    """Give tied answers the mean of the places that they take: [0, 1, 1, 2] -> [0, 1.5, 1.5, 3]."""
    return [
        sum(other < rank for other in ranks) + (sum(other == rank for other in ranks) - 1) / 2
        for rank in ranks
    ]


def ordinal_alpha(prompts: Sequence[Sequence[Ranks]]) -> Estimate:
    """Krippendorff's alpha of the places that annotators give to answers, on the ordinal scale.

    1 is perfect agreement, 0 that of chance. A unit is an answer, its values are its places.

    Args:
        prompts: for each prompt the ranks by each annotator who ranked it; those that only one
            annotator ranked say nothing about agreement and are left out.

    Source: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C with the
        ordinal metric. The interval resamples prompts; his resamples pairs of values.
    """
    ranked = [[mean_ranks(ranks) for ranks in prompt] for prompt in prompts if len(prompt) > 1]
    units = [[list(unit) for unit in zip(*prompt, strict=True)] for prompt in ranked]
    return alpha_of_units(units)


def alpha_of_units(prompts: Sequence[Sequence[Sequence[float]]]) -> Estimate:
    """Ordinal alpha of units in groups that are resampled together.

    Args:
        prompts: groups of units; a unit is the values that observers gave it, any number of them.
    """
    values = sorted({value for prompt in prompts for unit in prompt for value in unit})
    index = {value: i for i, value in enumerate(values)}
    pairs = np.zeros((len(prompts), len(values), len(values)))  # coincidences of each group
    for group, prompt in zip(pairs, prompts, strict=True):
        for unit in prompt:
            for i, j in combinations([index[value] for value in unit], 2):
                group[i, j] += 1 / (len(unit) - 1)
                group[j, i] += 1 / (len(unit) - 1)
    return _with_interval(pairs.reshape(len(prompts), len(values) ** 2), _alpha)


def _alpha(sums: np.ndarray) -> np.ndarray:
    """Alpha from coincidences (R, V * V), summed over the prompts of each of R resamples."""
    size = math.isqrt(sums.shape[1])
    pairs = sums.reshape(-1, size, size)
    counts = pairs.sum(2)  # (R, V) how often each value occurs
    # the ordinal metric: values that lie between two values, plus half of each of the two, squared
    middle = counts.cumsum(1) - counts / 2
    distance = (middle[:, :, None] - middle[:, None, :]) ** 2
    observed = (pairs * distance).sum((1, 2))
    expected = (counts[:, :, None] * counts[:, None, :] * distance).sum((1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1 - (counts.sum(1) - 1) * observed / expected


def pairwise_agreement(prompts: Sequence[Sequence[Ranks]]) -> Estimate:
    """Share of pairs of answers that two annotators order alike.

    Both may call the pair a tie, which counts as alike. Where only one does, it counts half.

    Args:
        prompts: as in `ordinal_alpha`.
    """
    return share(
        [
            [one for a, b in combinations(prompt, 2) for one in agreements(a, b)]
            for prompt in prompts
        ]
    )


def agreements(a: Ranks, b: Ranks) -> Iterator[float]:
    """For each pair of answers: 1 if two rankings order it alike, 0.5 if one says tie, else 0."""
    for i, j in combinations(range(len(a)), 2):
        first, second = (a[i] > a[j]) - (a[i] < a[j]), (b[i] > b[j]) - (b[i] < b[j])
        yield 1 - abs(first - second) / 2


def share(prompts: Sequence[Sequence[float]]) -> Estimate:
    """The mean of all numbers, in groups that are resampled together."""
    sums = np.array([[sum(prompt), len(prompt)] for prompt in prompts], dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        return _with_interval(sums.reshape(-1, 2), lambda total: total[:, 0] / total[:, 1])


def _with_interval(parts: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """A statistic of the sum of the rows of `parts`, with its percentile bootstrap."""
    parts = parts[parts.any(1)]  # a prompt without a pair changes nothing
    num = len(parts)
    if not num:
        return Estimate(math.nan, math.nan, math.nan)
    value = float(statistic(parts.sum(0, keepdims=True))[0])
    random = np.random.default_rng(0)
    starts = num * np.arange(AT_A_TIME)[:, None]
    found = []
    for _ in range(NUM_RESAMPLES // AT_A_TIME):
        drawn = (random.integers(num, size=(AT_A_TIME, num)) + starts).ravel()
        counts = np.bincount(drawn, minlength=num * AT_A_TIME).reshape(AT_A_TIME, num)
        found.append(statistic(counts.astype(float) @ parts))
    known = np.concatenate(found)
    known = known[np.isfinite(known)]
    if num < 2 or not len(known):
        return Estimate(value, math.nan, math.nan)
    low, high = np.quantile(known, [0.025, 0.975])
    return Estimate(value, float(low), float(high))
