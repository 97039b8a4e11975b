"""One score per response from the scores of several scorers."""

from __future__ import annotations

import torch
from torch import Tensor


def counting(raw: Tensor, gates: Tensor) -> Tensor:
    """Tell which of several scorers count for each response, (K, B) bool.

    A scorer with a gate counts where the sigmoid of its raw score is below the gate. There the
    scorers without a gate do not count; everywhere else only they count.

        the second has gate 0.15, two responses:  raw 1 4 | -2 1 (sigmoid 0.12 0.73)
        counting:                                 False True | True False

    Args:
        raw: (K, B) scores of K scorers, before normalisation.
        gates: (K,) in (0, 1); 0 for a scorer without a gate.

    Source: Llama 2 (arXiv 2307.09288), section 3.2.3: the safety score alone where it is below
        0.15, else the helpfulness score. Left out: its prompts that are tagged as unsafe.
    """
    below = raw.sigmoid() < gates[:, None]
    return torch.where(below.any(dim=0), below, gates[:, None] == 0)


def component_weights(counts: Tensor, weights: Tensor, combine: str) -> Tensor:
    """Weight each scorer for each response; 0 where it does not count.

    Args:
        counts: (K, B) bool, see `counting`.
        weights: (K,) of "weighted_sum"; the other ways weigh the scorers that count alike.
    """
    if combine == "weighted_sum":
        return weights[:, None] * counts
    return counts / counts.sum(dim=0)


def combine_scores(scores: Tensor, weights: Tensor, combine: str, std_coef: float) -> Tensor:
    """Make one score, (B,), of several.

        two scorers, two responses:  scores 1 5 | 3 3,  weights 1 0.5,  std_coef 2
        weighted_sum 2.5 6.5   mean 2 4   min 1 3   mean_minus_std 0 2

    Args:
        scores: (K, B) of K scorers.
        weights: (K, B), see `component_weights`.
        combine: "weighted_sum", "mean", "min" or "mean_minus_std".
        std_coef: how many standard deviations (over the scorers that count, biased) are subtracted.

    Source: Coste et al. 2023 (arXiv 2310.02743): mean is eq. 3, min eq. 4 (WCO). Its eq. 5 (UWO)
        subtracts the variance; we subtract the standard deviation, which has the score's unit.
    """
    if combine == "min":
        return scores.where(weights > 0, torch.inf).amin(dim=0)
    total = (weights * scores).sum(dim=0)
    if combine != "mean_minus_std":
        return total
    return total - std_coef * (weights * (scores - total).square()).sum(dim=0).sqrt()
