"""PPO's losses of policy and critic, and how their learning rate and the price of KL change.

Both losses divide the sum over valid tokens by `denominator` and return statistics as sums, so that
a caller with micro-batches or ranks only adds them up; extremes combine as extremes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.functional.tokens import check_masked, masked_sum, zero_masked

Stats = dict[str, Tensor]  # detached 0-d float32 tensors by name


def importance_weights(
    old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, cap: float
) -> Tensor:
    """Weight of each token that a sampler drew from other probabilities than the policy's, at most
    `cap`: min(p(policy) / p(sampler), cap), float32; 0 where masked.

    Advantages times these weights have the expectation that tokens of the policy would give, up to
    the cap, which bounds the variance, and to what was drawn before a token.

    Source: Ionides 2008, "Truncated importance sampling", J. Comp. Graph. Stat. 17(2); per token,
        as TRL's `vllm_importance_sampling_mode=token_truncate`.
    """
    if not cap >= 1:
        raise ValueError(f"cap must be >= 1, got {cap}")
    check_masked(mask, old_logprobs=old_logprobs, sampler_logprobs=sampler_logprobs)
    log_weights = zero_masked(old_logprobs, mask) - zero_masked(sampler_logprobs, mask)
    return zero_masked(log_weights.exp().clamp(max=cap), mask)


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
        cliprange: clips the ratio to [1 - cliprange, 1 + cliprange].
        dual_clip: the bound c > 1 on the ratio where A < 0 (the paper has 3); else it would remove
            gradients inside the range. None: no bound.
        denominator: see `masked_sum`.

    Returns: the loss (0-d float32, 0 without valid tokens) and statistics. Sums over valid
        tokens: "approx_kl" (ratio - 1 - log ratio), "clip_fraction" (its gradient is clipped away),
        "dual_clip_fraction" (by the dual clip), "ratio", "num_tokens"; and `_extremes`.
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
    """The extremes of the valid ratios, 0-d each; 1 if nothing is valid."""
    least = greatest = ratio.new_ones(())
    if ratio.numel():
        least = torch.where(mask, ratio, torch.inf).min()
        greatest = torch.where(mask, ratio, -torch.inf).max()
    ratio_min, ratio_max = (torch.where(mask.any(), x, 1.0) for x in (least, greatest))
    return {"ratio_max": ratio_max, "ratio_min": ratio_min}


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
        cliprange_value: clips values to old +- this, in units of the return; None: no clip.

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


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Measure how well values predict returns: 1 - Var(returns - values) / Var(returns).

    Returns: 0-d float32: 1 is perfect, 0 as good as a constant, negative worse. It is also 0 if the
        returns do not vary or nothing is valid.
    """
    check_masked(mask, values=values, returns=returns)
    targets = returns[mask].float()
    errors = targets - values[mask].float()
    if not len(targets):
        return errors.sum()
    # Shifted by the first, returns that do not vary have a variance of exactly 0.
    target_variance = (targets - targets[0]).var(unbiased=False)
    return torch.where(target_variance == 0, 0.0, 1 - errors.var(unbiased=False) / target_variance)


def learning_rate_factor(
    update: int,
    num_updates: int,
    schedule: str = "linear",
    num_warmup: int = 0,
    warmup_start: float = 0.0,
) -> float:
    """Compute an update's share of the learning rate, from its number alone: no state to resume.

    The warm-up rises linearly from `warmup_start` in the first update to 1 in the first one after
    it; a start of 0 means 1 / (num_warmup + 1), because an update at 0 would train nothing. After
    it, "linear" falls to 0, which it would reach one update after the last.

        6 updates, 2 of them warm-up, linear: 1/3 2/3 1 3/4 1/2 1/4;  start 0.1: 0.1 0.55 1 ...

    Args:
        update: number of finished updates, with those that train the critic alone.

    Source: linear: N implementation details, arXiv 2403.17031. InstructGPT (2203.02155): 10 updates
        from 0.1, then constant; AlpacaFarm (2305.14387): 5, then linear.
    """
    if update < num_warmup:
        start = warmup_start or 1 / (num_warmup + 1)
        return start + (1.0 - start) * update / num_warmup
    if schedule == "constant":
        return 1.0
    return 1.0 - (update - num_warmup) / (num_updates - num_warmup)


def adaptive_kl_coef(
    kl_coef: float, kl: float, target: float, horizon: float, num_sequences: int
) -> float:
    """Move the price of KL so that the measured KL approaches a target.

    With target 6, horizon 10000, 512 sequences: KL 12 multiplies the coefficient by 1.01024.

    Args:
        kl, target: measured and wanted KL(policy || reference), nats per sequence; target > 0.
        horizon: sequences over which a KL 20 % or more off changes the coefficient by about 20 %.
        num_sequences: sequences since the last update, on all ranks together.

    Source: Ziegler et al. 2019 (arXiv 1909.08593) section 2.2; openai/lm-human-preferences
        `train_policy.py::AdaptiveKLController`, which a horizon under 0.2 * num_sequences could
        make negative.
    """
    if not (target > 0 and horizon > 0):
        raise ValueError(f"target and horizon must be > 0, got {target} and {horizon}")
    error = min(max(kl / target - 1, -0.2), 0.2)
    # In this order max hands on a nan.
    return max(kl_coef * (1 + error * num_sequences / horizon), 0.0)
