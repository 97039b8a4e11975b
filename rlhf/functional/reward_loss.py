"""The reward model's loss on ranked responses.

"pairwise" compares the non-tied pairs of a prompt: -log sigmoid(d), d = better - worse - margin,
averaged over the pairs. With targets p it is -p log sigmoid(d) - (1 - p) log sigmoid(-d); label
smoothing e makes p (1 - e) + (1 - p) e of p.

"plackett_luce" compares each response i with all strictly worse ones j:
log(1 + sum_j exp(s_j - s_i + margin)), averaged over the responses that have worse ones. Without
ties these are the K - 1 stages of the ranking's negative log-likelihood; tied responses do not
compete. With K = 2 both kinds agree.

Sources: InstructGPT (arXiv 2203.02155) eq. 1; margin: Llama 2 (arXiv 2307.09288) eq. 2; smoothing:
conservative DPO (Mitchell 2023); centring: Eisenstein et al. 2023 (arXiv 2312.09244), as TRL's
`center_rewards_coefficient`; Plackett-Luce: ListMLE (Xia et al. 2008), but ties and division by the
stages are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.functional.ppo_losses import Stats
from rlhf.functional.tokens import check_shapes, zero_masked


def ranking_loss(
    scores: Tensor,
    ranks: Tensor,
    groups: Tensor,
    margin: float | Tensor | None = None,
    kind: str = "pairwise",
    *,
    targets: Tensor | None = None,
    label_smoothing: float = 0.0,
    center_coef: float = 0.0,
) -> tuple[Tensor, Stats]:
    """Compute a reward model's loss, averaged over the prompts that have non-tied pairs.

    Args:
        scores: (N,) of all responses of all prompts.
        ranks: (N,) *lower is better*, 0 is best; only the order within a group counts.
        groups: (N,) integer id of the prompt, in any order.
        margin: a number, or a tensor that broadcasts to (N, N), read at [better, worse].
        targets: as `margin`: the probability, in [0, 1], that the better one is preferred; default
            1. Pairwise only.
        label_smoothing: probability, in [0, 0.5), that a label is wrong. Pairwise only.
        center_coef: weight, >= 0, of the mean over the same pairs of (better + worse)^2.

    Returns: the loss (0-d float32) and statistics over all pairs of the batch: "accuracy" (share
        ordered right, equal scores count half), "margin" (mean s_better - s_worse), "num_pairs",
        "num_groups" (prompts in the mean). Memory is O(N^2).
    """
    _check_options(kind, targets, label_smoothing)
    check_shapes((len(scores),), scores=scores, ranks=ranks, groups=groups)
    wins = (groups[:, None] == groups) & (ranks[:, None] < ranks)  # (N, N): row better than column
    if not wins.any():
        raise ValueError("no two responses of one prompt differ in rank; drop tied prompts first")
    leads = scores.float()[:, None] - scores.float()  # (N, N)
    leads_over_margin = leads if margin is None else (leads - margin).float()
    if kind == "pairwise":
        terms = _pairwise_terms(leads_over_margin, wins, targets, label_smoothing)
    else:
        terms = _plackett_luce_terms(leads_over_margin, wins)
    loss, num_groups = _mean_over_groups(*terms, groups)
    if center_coef:
        sums = zero_masked(scores.float()[:, None] + scores.float(), wins)
        center, _ = _mean_over_groups(sums.square().sum(1), wins.sum(1), groups)
        loss = loss + center_coef * center
    return loss, _statistics(leads.detach()[wins], num_groups)


def _check_options(kind: str, targets: Tensor | None, label_smoothing: float) -> None:
    if kind not in ("pairwise", "plackett_luce"):
        raise ValueError(f"kind of ranking loss must be pairwise or plackett_luce, got {kind!r}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
    if kind == "plackett_luce" and (targets is not None or label_smoothing):
        raise ValueError(
            "plackett_luce is the likelihood of a whole ranking: it has no targets or "
            "label_smoothing of single pairs; use kind='pairwise'"
        )


def _pairwise_terms(
    leads: Tensor, wins: Tensor, targets: Tensor | None, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Each response's loss against its worse ones, and how many these are, (N,) each."""
    leads = zero_masked(leads, wins)
    losses = -logsigmoid(leads)
    if targets is not None or label_smoothing:
        targets = torch.ones_like(leads) if targets is None else targets
        right = zero_masked(targets.expand(wins.shape), wins)
        if not ((right >= 0) & (right <= 1)).all():
            raise ValueError("targets must be probabilities in [0, 1]; that of a pair is not")
        right = right * (1 - label_smoothing) + (1 - right) * label_smoothing
        losses = right * losses - (1 - right) * logsigmoid(-leads)
    return zero_masked(losses, wins).sum(1), wins.sum(1)


def _plackett_luce_terms(leads: Tensor, wins: Tensor) -> tuple[Tensor, Tensor]:
    """Each response's loss against its worse ones, and 1 where there are any, (N,) each."""
    has_worse = wins.any(1)
    losses = torch.zeros_like(leads[:, 0])
    rivals = torch.where(wins, -leads, -torch.inf)[has_worse].logsumexp(1)
    losses[has_worse] = -logsigmoid(-rivals)
    return losses, has_worse.long()


def _mean_over_groups(terms: Tensor, counts: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Average (N,) `terms`, sums of `counts` each, within each group, then over the groups that
    have any; and count those groups."""
    index = groups.unique(return_inverse=True)[1]
    counts_of_group = torch.zeros_like(counts).index_add(0, index, counts)
    num_groups = (counts_of_group > 0).sum()
    return (terms / counts_of_group[index].clamp(min=1)).sum() / num_groups, num_groups


def _statistics(leads: Tensor, num_groups: Tensor) -> Stats:
    return {
        "accuracy": ((leads > 0).float() + 0.5 * (leads == 0)).mean(),
        "margin": leads.mean(),
        "num_pairs": torch.tensor(float(len(leads)), device=leads.device),
        "num_groups": num_groups.float(),
    }
