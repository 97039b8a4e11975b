"""Every formula of the project, as pure functions: tensors in, tensors out.

Left out: I/O, models, processes. Losses take the `denominator` of the whole minibatch and return
statistics as sums, so that a caller with micro-batches or ranks only adds them up.

Shapes: B sequences, T response tokens, V vocabulary, K responses of one prompt. `mask` is a bool
tensor, True where valid; it may have gaps. What stands at masked positions (padding, inf, nan)
changes neither values nor gradients. Inputs may have any floating dtype; every result is float32.
Log-probs, KL and entropy are in nats. Every function raises ValueError for a wrong shape (nothing
broadcasts in silence), an unknown kind or a temperature <= 0, and TypeError for a mask not bool.

    advantages, returns = gae(shape_rewards(scores, kl, mask, kl_coef), values, mask, gamma, lam)
    loss, stats = policy_loss(logprobs, old_logprobs, whiten(advantages, mask), mask, cliprange)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Stats = dict[str, Tensor]  # detached 0-d float32 tensors by name


def _check_shapes(expected: tuple[int, ...], **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != expected:
            raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(tensor.shape)}")


def _check_masked(mask: Tensor, **tensors: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True where valid, got {mask.dtype}; use mask.bool()")
    _check_shapes(mask.shape, **tensors)


def _zero_masked(x: Tensor, mask: Tensor) -> Tensor:
    # Not x * mask: nan * 0 is nan, in the value and in the gradient.
    return torch.where(mask, x.float(), 0.0)


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Average the valid elements of `x`.

    Args:
        x, mask: any one shape.
        dim: dimensions to reduce; None reduces all.

    Returns: float32, `x` without `dim`; 0 where nothing is valid.
    """
    _check_masked(mask, x=x)
    return _zero_masked(x, mask).sum(dim=dim) / mask.sum(dim=dim).clamp(min=1)


def whiten(x: Tensor, mask: Tensor, center: bool = True) -> Tensor:
    """Scale the valid elements of `x` to unit variance and, with `center`, to mean 0.

    Args:
        x, mask: any one shape.
        center: subtract the mean; False adds it back to the scaled deviations.

    Returns: float32, the shape of `x`; 0 where masked, also without `center`.
    Source: openai/lm-human-preferences `utils/core.py::whiten` (biased variance, 1e-8 inside the
        rsqrt); there over all positions, here over the valid ones.
    """
    mean = masked_mean(x, mask)
    deviations = _zero_masked(_zero_masked(x, mask) - mean, mask)
    whitened = deviations * torch.rsqrt(masked_mean(deviations.square(), mask) + 1e-8)
    return whitened if center else _zero_masked(whitened + mean, mask)


def _scaled_row(logits_row: Tensor, temperature: float) -> Tensor:
    return logits_row.to(torch.float32, copy=True).div_(temperature)


class _TokenLogprobs(torch.autograd.Function):
    """log_softmax and gather, saving only the logits as given; upcasts one sequence at a time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(logits, tokens)
        ctx.temperature = temperature
        logprobs = torch.empty(tokens.shape, dtype=torch.float32, device=logits.device)
        for row in range(len(logits)):
            row_logprobs = torch.log_softmax(_scaled_row(logits[row], temperature), dim=-1)
            logprobs[row] = row_logprobs.gather(-1, tokens[row, :, None]).squeeze(-1)
        return logprobs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor) -> tuple[Tensor, None, None]:
        logits, tokens = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for row in range(len(logits)):
            weights = (grad_logprobs[row] / ctx.temperature)[:, None]  # (T, 1)
            grad_row = torch.softmax(_scaled_row(logits[row], ctx.temperature), dim=-1)
            grad_row.mul_(-weights).scatter_add_(-1, tokens[row, :, None], weights)
            # A position that the loss masks out gets 0 even if its logits are nan.
            grad_logits[row] = grad_row.masked_fill_(weights == 0, 0.0)
        return grad_logits, None, None


class _TokenEntropy(torch.autograd.Function):
    """Sum of entr(p) = -p log p, which is 0 at p = 0; upcasts one sequence at a time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: float) -> Tensor:
        entropy = torch.empty(logits.shape[:2], dtype=torch.float32, device=logits.device)
        for row in range(len(logits)):
            probs = torch.softmax(_scaled_row(logits[row], temperature), dim=-1)
            entropy[row] = torch.special.entr(probs).sum(-1)
        ctx.save_for_backward(logits, entropy)
        ctx.temperature = temperature
        return entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_entropy: Tensor) -> tuple[Tensor, None]:
        logits, entropy = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for row in range(len(logits)):
            weights = (grad_entropy[row] / ctx.temperature)[:, None]  # (T, 1)
            probs = torch.softmax(_scaled_row(logits[row], ctx.temperature), dim=-1)
            # d entropy / d logit = -p (log p + entropy) = entr(p) - p * entropy
            grad_row = torch.special.entr(probs).sub_(probs.mul_(entropy[row, :, None]))
            grad_logits[row] = grad_row.mul_(weights).masked_fill_(weights == 0, 0.0)
        return grad_logits, None


def _check_logits(logits: Tensor, temperature: float) -> None:
    if logits.dim() != 3:
        raise ValueError(f"logits must have shape (B, T, V), got {tuple(logits.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute log softmax(logits / temperature) at `tokens` without a float32 copy of the logits.

    Args:
        logits: (B, T, V); position t predicts `tokens[:, t]`: the caller has shifted them. -inf
            forbids a token: probability and gradient 0. Not to be changed before the backward pass.
        tokens: (B, T) int64 ids in [0, V). A forbidden one gives -inf, so mask it (padding).
        temperature: the sampling temperature, > 0.

    Returns: (B, T) float32, differentiable once. The gradient has the dtype of the logits and is
        exactly 0 where the incoming one is.
    """
    _check_logits(logits, temperature)
    _check_shapes(logits.shape[:2], tokens=tokens)
    return _TokenLogprobs.apply(logits, tokens, temperature)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the entropy of softmax(logits / temperature) without a float32 copy of the logits.

    Args:
        logits: (B, T, V); -inf forbids a token: it adds nothing and gets gradient 0.
        temperature: the sampling temperature, > 0.

    Returns: (B, T) float32 in [0, log V]; its gradient is as that of `token_logprobs`.
    """
    _check_logits(logits, temperature)
    return _TokenEntropy.apply(logits, temperature)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """Estimate KL(policy || reference) at each token, from the one token the policy sampled there.

    Args:
        logprobs, ref_logprobs: (B, T) of the sampled tokens under policy and reference.
        kind: with d = logprobs - ref_logprobs, "k1" = d, unbiased, may be negative; "k2" = d^2 / 2,
            biased, >= 0; "k3" = exp(-d) - 1 + d, unbiased, >= 0.

    Returns: (B, T) float32, per token. Takes no mask: garbage comes out where it went in, and goes
        when reduced under a mask. Before differentiating k2 or k3, zero the masked log-probs.
    Source: Schulman, "Approximating KL Divergence", joschu.net/blog/kl-approx.html (r = exp(-d)).
    """
    _check_shapes(logprobs.shape, ref_logprobs=ref_logprobs)
    log_ratio = logprobs.float() - ref_logprobs.float()
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    if kind == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"kind of KL estimate must be k1, k2 or k3, got {kind!r}")


def shape_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Turn one score per response and one KL per token into one reward per token.

    With score 2 and kl_coef 0.1:  kl 1 1 1 9,  mask 1 0 1 0  ->  rewards -0.1 0 1.9 0

    Args:
        scores: (B,).
        kl, mask: (B, T); the mask is True at response tokens, EOS included.
        kl_coef: price of one nat in units of the score, >= 0.

    Returns: (B, T) float32: -kl_coef * kl at valid tokens, plus the score at the last valid one; 0
        where masked. A row without valid tokens is 0: its score goes nowhere.
    Source: Ziegler et al. 2019 (arXiv 1909.08593) eq. 2, spread over tokens. The score is not put
        one step after EOS, where TRL's PPO had it: that would discount it once more.
    """
    _check_masked(mask, kl=kl)
    _check_shapes(mask.shape[:1], scores=scores)
    # Valid tokens from here to the end: mask 1 0 1 0 -> 2 1 1 0. The last valid token counts 1.
    is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return _zero_masked(scores[:, None], is_last) - kl_coef * _zero_masked(kl, mask)


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Estimate advantages and returns by generalised advantage estimation.

    The successor of a valid token is the next valid one of its row, over any gap; the value after
    the last is 0. With gamma = lam = 1:  rewards 1 _ 3,  values 5 _ 7  ->  advantages -1 0 -4

    Args:
        rewards, values, mask: (B, T); a value is the critic's before the token is chosen.
        gamma, lam: discount per token and GAE's lambda, in [0, 1].

    Returns: advantages, and returns = advantages + values: (B, T) float32, 0 if masked, detached.
    Source: Schulman et al. 2016 (arXiv 1506.02438) eq. 16.
    """
    _check_masked(mask, rewards=rewards, values=values)
    rewards, values = _zero_masked(rewards, mask), _zero_masked(values, mask)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = rewards.new_zeros(len(rewards))  # (B,)
    for t in reversed(range(rewards.shape[1])):
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * next_advantage
        # A masked token hands on the state of its successor.
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = next_advantage
    advantages = _zero_masked(advantages, mask)
    return advantages, advantages + values


def _group_deviations(scores: Tensor) -> Tensor:
    if scores.dim() != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores must have shape (P, K), K >= 2, got {tuple(scores.shape)}")
    # Shifted by the first, equal scores give exactly 0; the mean of three 1000.1 is rounded.
    shifted = scores.float() - scores[:, :1].float()
    return shifted - shifted.mean(dim=1, keepdim=True)


def rloo(scores: Tensor) -> Tensor:
    """Compute leave-one-out advantages: each score minus the mean of its prompt's other K - 1.

    Args:
        scores: (P, K) scores of K >= 2 responses to each of P prompts.

    Returns: (P, K) float32 in units of the score; every row sums to 0.
    Source: Ahmadian et al. 2024 (arXiv 2402.14740), RLOO; here K / (K - 1) * (score - mean).
    """
    deviations = _group_deviations(scores)
    return deviations * (scores.shape[1] / (scores.shape[1] - 1))


def grpo(scores: Tensor) -> Tensor:
    """Compute group-relative advantages: scores standardised over the K responses of a prompt.

    Args:
        scores: (P, K) scores of K >= 2 responses to each of P prompts.

    Returns: (P, K) float32, without unit; a prompt whose scores are all equal gets 0.
    Source: DeepSeekMath (arXiv 2402.03300) section 4.1.2, (r - mean) / std. It leaves the std open;
        ours is TRL's GRPOTrainer's: the unbiased one (K - 1), plus 1e-4.
    """
    deviations = _group_deviations(scores)
    return deviations / (deviations.std(dim=1, keepdim=True) + 1e-4)


def _sum_over(losses: Tensor, mask: Tensor, denominator: float | Tensor | None) -> Tensor:
    num_tokens = mask.sum()
    divisor = torch.as_tensor(num_tokens if denominator is None else denominator).to(losses)
    # Without valid tokens the sum is 0 and so is the loss, even if the denominator is 0.
    return losses.sum() / torch.where(num_tokens > 0, divisor, 1.0)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cliprange: float,
    *,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Compute PPO's clipped surrogate, to be minimised: the mean of -min(ratio A, clip(ratio) A).

    Args:
        logprobs: (B, T) under the policy in training; the only input that gets a gradient.
        old_logprobs: (B, T) under the policy that sampled.
        advantages, mask: (B, T).
        cliprange: clips the ratio to [1 - cliprange, 1 + cliprange]; > 0.
        denominator: divides the sum over valid tokens; default their number. Given the number of
            the whole minibatch, the losses of its micro-batches add up to that of the minibatch.

    Returns: the loss (0-d float32, 0 without valid tokens) and statistics. Sums over valid tokens:
        "approx_kl" (ratio - 1 - log ratio), "clip_fraction" (tokens whose gradient the clip
        removes), "ratio", "num_tokens". A maximum: "ratio_max_dev" = max |ratio - 1|.
    Source: Schulman et al. 2017 (arXiv 1707.06347) eq. 7; the mean is over tokens, not sequences.
    """
    _check_masked(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    advantages = _zero_masked(advantages.detach(), mask)
    log_ratio = _zero_masked(logprobs, mask) - _zero_masked(old_logprobs.detach(), mask)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = _sum_over(torch.maximum(unclipped, clipped), mask, denominator)

    ratio, log_ratio = ratio.detach(), log_ratio.detach()
    deviations = (ratio - 1).abs()
    stats = {
        "approx_kl": (torch.expm1(log_ratio) - log_ratio).sum(),
        "clip_fraction": (clipped > unclipped).sum().float(),
        "ratio": _zero_masked(ratio, mask).sum(),
        "ratio_max_dev": deviations.max() if deviations.numel() else deviations.sum(),
        "num_tokens": mask.sum().float(),
    }
    return loss, stats


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
        denominator: see `policy_loss`.

    Returns: the loss (0-d float32, 0 without valid tokens) and statistics, sums over valid tokens:
        "value_clip_fraction" (tokens whose clipped error is the larger), "value_error" (squared
        error, neither clipped nor halved), "num_tokens".
    Source: openai/lm-human-preferences `train_policy.py::PPOTrainer.loss` at 1ab856d.
    """
    _check_masked(mask, values=values, old_values=old_values, returns=returns)
    values, returns = _zero_masked(values, mask), _zero_masked(returns.detach(), mask)
    old_values = _zero_masked(old_values.detach(), mask)
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
    return _sum_over(0.5 * larger_errors, mask, denominator), stats


def ranking_loss(
    scores: Tensor,
    ranks: Tensor,
    groups: Tensor,
    margin: float | Tensor | None = None,
    kind: str = "pairwise",
) -> tuple[Tensor, Stats]:
    """Compute a reward model's loss on ranked responses, averaged over prompts with non-tied pairs.

    "pairwise": per prompt, the mean over non-tied pairs of -log sigmoid(better - worse - margin).
    "plackett_luce": per prompt, the mean over responses i that have strictly worse ones j of
    log(1 + sum_j exp(s_j - s_i + margin)): without ties the K - 1 stages of the ranking's negative
    log-likelihood; tied responses do not compete. With K = 2 both kinds agree.

    Args:
        scores: (N,) of all responses of all prompts.
        ranks: (N,) *lower is better*, 0 is best; only the order within a group counts.
        groups: (N,) integer id of the prompt, in any order.
        margin: a number, or a tensor that broadcasts to (N, N), read at [better, worse].

    Returns: the loss (0-d float32) and statistics over all pairs of the batch: "accuracy" (share
        ordered right, equal scores count half), "margin" (mean s_better - s_worse), "num_pairs",
        "num_groups" (prompts in the mean). Memory is O(N^2).
    Raises: ValueError where no two responses of one prompt differ in rank.
    Source: InstructGPT (arXiv 2203.02155) eq. 1; margin: Llama 2 (arXiv 2307.09288) eq. 2;
        Plackett-Luce: ListMLE (Xia et al. 2008), but ties and division by the stages are ours.
    """
    if kind not in ("pairwise", "plackett_luce"):
        raise ValueError(f"kind of ranking loss must be pairwise or plackett_luce, got {kind!r}")
    _check_shapes((len(scores),), scores=scores, ranks=ranks, groups=groups)
    wins = (groups[:, None] == groups) & (ranks[:, None] < ranks)  # (N, N): row better than column
    if not wins.any():
        raise ValueError("no two responses of one prompt differ in rank; drop tied prompts first")
    leads = scores.float()[:, None] - scores.float()  # (N, N)
    leads_over_margin = leads if margin is None else (leads - margin).float()
    terms, num_terms = _ranking_terms(leads_over_margin, wins, kind)
    group_index = groups.unique(return_inverse=True)[1]
    num_in_group = torch.zeros_like(num_terms).index_add(0, group_index, num_terms)
    num_groups = (num_in_group > 0).sum()
    loss = (terms / num_in_group[group_index].clamp(min=1)).sum() / num_groups
    pair_leads = leads.detach()[wins]
    stats = {
        "accuracy": ((pair_leads > 0).float() + 0.5 * (pair_leads == 0)).mean(),
        "margin": pair_leads.mean(),
        "num_pairs": wins.sum().float(),
        "num_groups": num_groups.float(),
    }
    return loss, stats


def _ranking_terms(leads: Tensor, wins: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return each response's loss against its worse ones and how many terms that is, (N,) each."""
    if kind == "pairwise":
        losses = -logsigmoid(_zero_masked(leads, wins))
        return _zero_masked(losses, wins).sum(1), wins.sum(1)
    has_worse = wins.any(1)
    losses = torch.zeros_like(leads[:, 0])
    rivals = torch.where(wins, -leads, -torch.inf)[has_worse].logsumexp(1)
    losses[has_worse] = -logsigmoid(-rivals)
    return losses, has_worse.long()


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Measure how well values predict returns: 1 - Var(returns - values) / Var(returns).

    Args:
        values, returns, mask: (B, T).

    Returns: 0-d float32: 1 is perfect, 0 as good as a constant, negative worse. 0 also where the
        returns do not vary or nothing is valid: there is nothing to explain.
    """
    _check_masked(mask, values=values, returns=returns)
    targets = returns[mask].float()
    errors = targets - values[mask].float()
    if not len(targets):
        return errors.sum()
    # Shifted by the first, returns that do not vary have a variance of exactly 0.
    target_variance = (targets - targets[0]).var(unbiased=False)
    return torch.where(target_variance == 0, 0.0, 1 - errors.var(unbiased=False) / target_variance)
