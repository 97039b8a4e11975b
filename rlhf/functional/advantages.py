"""From scores to rewards per token, and from those to advantages, in this order.

`tokens.py` comes before: log-probs and KL. `ppo_losses.py` comes after.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.functional.tokens import check_masked, check_shapes, masked_mean, whiten, zero_masked


def final_scores(
    scores: Tensor,
    finished: Tensor,
    missing_eos_penalty: float | None,
    dense_totals: Tensor | None = None,
    whiten_over: Tensor | None = None,
) -> Tensor:
    """Whiten the scores if asked, then replace those of unfinished responses by the penalty.

    Rewards per token stay: an unfinished response has their sum plus the penalty. With penalty -1:
    scores 2 5,  dense totals 0.5 0,  finished 0 1  ->  -0.5 5

    Args:
        scores: (B,) of the scorer, with the sum of its rewards per token.
        finished: (B,) bool, True where a stop token or stop string ended the response.
        missing_eos_penalty: None leaves the scores of unfinished responses.
        dense_totals: (B,) sum of each response's rewards per token; None: no such rewards.
        whiten_over: (B,) bool, the responses whose scores get mean 0 and variance 1, all others 0;
            None: no whitening. The penalty is then on the new scale.

    Source: N implementation details (ICLR blog track 2024) and arXiv 2403.17031: the penalty
        replaces the score. Llama 2 (2307.09288): whitening of logit(R), which is our score.
    """
    check_shapes(tuple(scores.shape), finished=finished)
    if whiten_over is not None:
        scores = whiten(scores, whiten_over)
    if missing_eos_penalty is None:
        return scores
    totals = torch.zeros_like(scores) if dense_totals is None else dense_totals
    return torch.where(finished, scores, missing_eos_penalty + totals)


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
    """Add the elements of `x`, of any shape, to running moments, in float64. A nan stays for good.

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


def shape_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Turn one score per response and one KL per token into one reward per token.

    With score 2 and kl_coef 0.1:  kl 1 1 1 9,  mask 1 0 1 0  ->  rewards -0.1 0 1.9 0

    Args:
        scores: (B,).
        kl, mask: (B, T); the mask is True at response tokens, EOS included.
        kl_coef: price of one nat in units of the score, >= 0.

    Returns: (B, T) float32: -kl_coef * kl at valid tokens, plus the score at the last valid one; 0
        where masked.
    Source: Ziegler et al. 2019 (arXiv 1909.08593) eq. 2, spread over tokens. The score is not put
        one step after EOS, where TRL's PPO had it: that would discount it once more.
    """
    check_masked(mask, kl=kl)
    check_shapes(mask.shape[:1], scores=scores)
    # Valid tokens from here to the end: mask 1 0 1 0 -> 2 1 1 0. The last valid token counts 1.
    is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return zero_masked(scores[:, None], is_last) - kl_coef * zero_masked(kl, mask)


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Estimate advantages and returns by generalised advantage estimation.

    The successor of a valid token is the next valid one of its row, over any gap; the value after
    the last is 0. With gamma = lam = 1:  rewards 1 _ 3,  values 5 _ 7  ->  advantages -1 0 -4

    Args:
        rewards, values, mask: (B, T); a value is the critic's before the token is chosen.

    Returns: advantages, and returns = advantages + values: (B, T) float32, 0 if masked, detached.
    Source: Schulman et al. 2016 (arXiv 1506.02438) eq. 16.
    """
    check_masked(mask, rewards=rewards, values=values)
    rewards, values = zero_masked(rewards, mask), zero_masked(values, mask)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = rewards.new_zeros(len(rewards))  # (B,)
    for t in reversed(range(rewards.shape[1])):
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * next_advantage
        # A masked token hands on the state of its successor.
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = next_advantage
    advantages = zero_masked(advantages, mask)
    return advantages, advantages + values


def reinforce_pp(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Compute REINFORCE++'s advantages before normalisation: each token's discounted reward-to-go.

    With gamma 0.5:  rewards 1 _ 2 4,  mask 1 0 1 1  ->  1 + 0.5 * 4, 0, 2 + 0.5 * 4, 4

    Args:
        rewards: (B, T) from `shape_rewards`: they contain the KL, as k1.
        mask: (B, T); a gap is skipped and costs no discount.

    Returns: (B, T) float32, 0 where masked, detached. The paper then normalises over the whole
        batch: the caller's `whiten`.
    Source: REINFORCE++ (arXiv 2501.03262), A_t = r - beta * sum_{i >= t} KL_i: that at gamma 1.
    """
    # Without a critic and with lambda 1, GAE is the reward-to-go.
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, lam=1.0)[0]


def returns_minus_mean(returns: Tensor, mask: Tensor) -> Tensor:
    """Subtract the mean over all valid tokens from each return: advantages without a critic.

    With returns 1 3 _ 5 and 3 _ _ _ , the mean is 3:  -2 0 0 2 and 0 0 0 0

    Args:
        returns, mask: (B, T); the returns are those of `reinforce_pp`.

    Returns: (B, T) float32, 0 where masked.
    Source: Williams 1992, REINFORCE with a baseline.
    """
    check_masked(mask, returns=returns)
    return zero_masked(zero_masked(returns, mask) - masked_mean(returns, mask), mask)


def _group_deviations(scores: Tensor) -> Tensor:
    if scores.dim() != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores must have shape (P, K), K >= 2, got {tuple(scores.shape)}")
    # Shifted by the first, equal scores give exactly 0; the mean of three 1000.1 is rounded.
    shifted = scores.float() - scores[:, :1].float()
    return shifted - shifted.mean(dim=1, keepdim=True)


def rloo(scores: Tensor) -> Tensor:
    """Subtract from each score, (P, K), K >= 2, the mean of its prompt's other K - 1.

    Source: Ahmadian et al. 2024 (arXiv 2402.14740), RLOO; here K / (K - 1) * (score - mean).
    """
    deviations = _group_deviations(scores)
    return deviations * (scores.shape[1] / (scores.shape[1] - 1))


def grpo(scores: Tensor) -> Tensor:
    """Standardise scores, (P, K), K >= 2, over the K responses of a prompt; equal scores give 0.

    Source: DeepSeekMath (arXiv 2402.03300) section 4.1.2, (r - mean) / std. It leaves the std open;
        ours is TRL's GRPOTrainer's: the unbiased one (K - 1), plus 1e-4.
    """
    deviations = _group_deviations(scores)
    return deviations / (deviations.std(dim=1, keepdim=True) + 1e-4)
