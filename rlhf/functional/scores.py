"""One score per response: from the scores of several scorers, and for responses without an end."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.functional.masks import check_shapes, whiten


def counting(raw: Tensor, gates: Tensor) -> Tensor:
    """Tell which of several scorers count for each response.

    A scorer with a gate counts where the sigmoid of its raw score is below the gate. There the
    scorers without a gate do not count; everywhere else only they count.

        the second has gate 0.15, two responses:  raw 1 4 | -2 1 (sigmoid 0.12 0.73)
        counting:                                 False True | True False

    Args:
        raw: (K, B) scores of K scorers, before normalisation.
        gates: (K,) in (0, 1); 0 for a scorer without a gate.

    Returns: (K, B) bool, at least one True for each response.
    Source: Llama 2 (arXiv 2307.09288), section 3.2.3: the safety score alone where it is below
        0.15, else the helpfulness score. Left out: its prompts tagged as unsafe, for which the
        safety score always counts.
    """
    below = raw.sigmoid() < gates[:, None]
    return torch.where(below.any(dim=0), below, gates[:, None] == 0)


def component_weights(counts: Tensor, weights: Tensor, combine: str) -> Tensor:
    """Weight each scorer for each response; 0 where it does not count.

    Args:
        counts: (K, B) bool, see `counting`.
        weights: (K,); used by "weighted_sum" only.
        combine: see `combine_scores`.

    Returns: (K, B) float32: `weights` for "weighted_sum", else 1 / (number of scorers that count).
    """
    if combine == "weighted_sum":
        return weights[:, None] * counts
    return counts / counts.sum(dim=0)


def combine_scores(scores: Tensor, weights: Tensor, combine: str, std_coef: float) -> Tensor:
    """Make one score of several.

        two scorers, two responses:  scores 1 5 | 3 3,  weights 1 0.5,  std_coef 2
        weighted_sum 2.5 6.5   mean 2 4   min 1 3   mean_minus_std 0 2

    Args:
        scores: (K, B) of K scorers.
        weights: (K, B), see `component_weights`.
        combine: "weighted_sum", "mean", "min" or "mean_minus_std".
        std_coef: how many standard deviations (over the scorers that count, biased) are subtracted.

    Returns: (B,).
    Source: Coste et al. 2023 (arXiv 2310.02743): mean is eq. 3, min eq. 4 (WCO). Its eq. 5 (UWO)
        subtracts the variance. We subtract the standard deviation, which has the unit of the score,
        so that scaling all scores changes nothing.
    """
    if combine == "min":
        return scores.where(weights > 0, torch.inf).amin(dim=0)
    total = (weights * scores).sum(dim=0)
    if combine != "mean_minus_std":
        return total
    return total - std_coef * (weights * (scores - total).square()).sum(dim=0).sqrt()


def final_scores(
    scores: Tensor,
    finished: Tensor,
    missing_eos_penalty: float | None,
    dense_totals: Tensor | None = None,
    whiten_over: Tensor | None = None,
) -> Tensor:
    """Whiten the scores where asked, then give unfinished responses the penalty instead of theirs.

    Rewards that a scorer gave at the tokens stay: an unfinished response has their sum plus the
    penalty. With penalty -1:  scores 2 5,  dense totals 0.5 0,  finished 0 1  ->  -0.5 5

    Args:
        scores: (B,) of the scorer, the sum of its rewards per token included.
        finished: (B,) bool, True where a stop token or stop string ended the response.
        missing_eos_penalty: None leaves the scores of unfinished responses.
        dense_totals: (B,) sum of each response's rewards per token; None: no such rewards.
        whiten_over: (B,) bool, the responses whose scores get mean 0 and variance 1, all others 0;
            None: no whitening. It comes before the penalty, which is then on the new scale.

    Returns: (B,) float32.
    Source: N implementation details (ICLR blog track 2024) and arXiv 2403.17031: the penalty
        replaces the score. Llama 2 (2307.09288): whitening of logit(R), with R the sigmoid of the
        reward model's output; that output is our score.
    """
    check_shapes(tuple(scores.shape), finished=finished)
    if whiten_over is not None:
        scores = whiten(scores, whiten_over)
    if missing_eos_penalty is None:
        return scores
    totals = torch.zeros_like(scores) if dense_totals is None else dense_totals
    return torch.where(finished, scores, missing_eos_penalty + totals)
