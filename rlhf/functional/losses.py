"""PPO's losses of policy and critic.

Both divide the sum over valid tokens by `denominator` and return statistics as sums, so that a
caller with micro-batches or ranks only adds them up; extremes combine as extremes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.functional.masks import check_masked, masked_sum, zero_masked

Stats = dict[str, Tensor]  # detached 0-d float32 tensors by name


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cliprange: float,
    *,
    dual_clip: float | None = None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Compute PPO's clipped surrogate, to be minimised: the mean of -min(ratio A, clip(ratio) A).

    With `dual_clip` c, a token with A < 0 costs at most c |A|; the clip alone does not bound it.

    Args:
        logprobs: (B, T) under the policy in training; the only input that gets a gradient.
        old_logprobs, advantages, mask: (B, T); log-probs under the policy that sampled.
        cliprange: clips the ratio to [1 - cliprange, 1 + cliprange]; > 0.
        dual_clip: the bound c > 1 on the ratio where A < 0 (the paper has 3); None: no bound.
        denominator: see `masked_sum`.

    Returns: the loss (0-d float32, 0 without valid tokens) and statistics. Sums over valid
        tokens: "approx_kl" (ratio - 1 - log ratio), "clip_fraction" (its gradient is clipped away),
        "dual_clip_fraction" (by the dual clip), "ratio", "num_tokens"; and `_extremes`.
    Raises: ValueError for a dual_clip <= 1: it would remove gradients inside the range.
    Source: Schulman et al. 2017 (arXiv 1707.06347) eq. 7; the mean is over tokens, not sequences.
        Dual clip: Ye et al. 2020 (arXiv 1912.09729) eq. 5.
    """
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be > 1, got {dual_clip}; None turns it off")
    check_masked(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    advantages = zero_masked(advantages.detach(), mask)
    log_ratio = zero_masked(logprobs, mask) - zero_masked(old_logprobs.detach(), mask)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    losses = clipped_losses = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        bounds = torch.where(advantages < 0, -dual_clip * advantages, torch.inf)
        losses = torch.minimum(clipped_losses, bounds)
    ratio, log_ratio = ratio.detach(), log_ratio.detach()
    stats = {
        "approx_kl": (torch.expm1(log_ratio) - log_ratio).sum(),
        "clip_fraction": (clipped > unclipped).sum().float(),
        "dual_clip_fraction": (losses < clipped_losses).sum().float(),
        "ratio": zero_masked(ratio, mask).sum(),
        **_extremes(ratio, mask),
        "num_tokens": mask.sum().float(),
    }
    return masked_sum(losses, mask, denominator), stats


def _extremes(ratio: Tensor, mask: Tensor) -> Stats:
    """Return the extremes of the valid ratios, 0-d each; ratio 1 where nothing is valid."""
    least = greatest = ratio.new_ones(())
    if ratio.numel():
        least = torch.where(mask, ratio, torch.inf).min()
        greatest = torch.where(mask, ratio, -torch.inf).max()
    ratio_min, ratio_max = (torch.where(mask.any(), x, 1.0) for x in (least, greatest))
    deviation = torch.maximum(ratio_max - 1, 1 - ratio_min)
    return {"ratio_max": ratio_max, "ratio_min": ratio_min, "ratio_max_dev": deviation}


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    cliprange_value: float | None,
    *,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Compute PPO's clipped value loss: the mean of half the larger of two squared errors.

    Args:
        values: (B, T) of the critic in training; the only input that gets a gradient.
        old_values, returns, mask: (B, T): the critic's values at rollout time, and the targets.
        cliprange_value: clips values to old +- this, in units of the return, > 0; None: no clip.
        denominator: see `masked_sum`.

    Returns: the loss (0-d float32, 0 without valid tokens) and statistics, sums over valid tokens:
        "value_clip_fraction" (tokens whose clipped error is the larger), "value_error" (squared
        error, neither clipped nor halved), "num_tokens".
    Source: openai/lm-human-preferences `train_policy.py::PPOTrainer.loss` at 1ab856d.
    """
    check_masked(mask, values=values, old_values=old_values, returns=returns)
    values, returns = zero_masked(values, mask), zero_masked(returns.detach(), mask)
    old_values = zero_masked(old_values.detach(), mask)
    errors = larger_errors = (values - returns).square()
    if cliprange_value is not None:
        # Not old + clamp(values - old): rounding would count unclipped values as clipped.
        clipped = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
        larger_errors = torch.maximum(errors, (clipped - returns).square())
    stats = {
        "value_clip_fraction": (larger_errors > errors).sum().float(),
        "value_error": errors.detach().sum(),
        "num_tokens": mask.sum().float(),
    }
    return masked_sum(0.5 * larger_errors, mask, denominator), stats
