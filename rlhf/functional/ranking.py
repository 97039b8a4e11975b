"""The reward model's loss on ranked responses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.functional.losses import Stats
from rlhf.functional.masks import check_shapes, zero_masked


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
    check_shapes((len(scores),), scores=scores, ranks=ranks, groups=groups)
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
        losses = -logsigmoid(zero_masked(leads, wins))
        return zero_masked(losses, wins).sum(1), wins.sum(1)
    has_worse = wins.any(1)
    losses = torch.zeros_like(leads[:, 0])
    rivals = torch.where(wins, -leads, -torch.inf)[has_worse].logsumexp(1)
    losses[has_worse] = -logsigmoid(-rivals)
    return losses, has_worse.long()
