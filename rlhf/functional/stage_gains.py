"""Which stage of a run costs most: what swapping its output for a known-good one would gain, and
where best-of-n turns down. All numbers are means over prompts, with bootstrap resamples of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.functional.summary_statistics import _resamples, best_of_n, best_of_n_kl


class Estimate(NamedTuple):
    """A mean over prompts with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def estimate(draws: Tensor) -> Estimate:
    """The first of (R + 1,) draws, with the interval of all others that are numbers."""
    others = draws[1:][draws[1:].isfinite()]
    if not len(others):
        return Estimate(float(draws[0]), float("nan"), float("nan"))
    low, high = others.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return Estimate(float(draws[0]), low, high)


def resampled_means(columns: Tensor, num_resamples: int = 1000, seed: int = 0) -> Tensor:
    """Means of columns over prompts, nan left out.

    Args:
        columns: (P, C) numbers of P prompts.

    Returns: (R + 1, C) float64: of the prompts as they are, then of R draws with replacement, the
        same prompts in all columns.
    """
    columns = columns.detach().cpu().double()
    draws = [columns[draw].nanmean(dim=1) for draw in _resamples(len(columns), num_resamples, seed)]
    return torch.cat([columns.nanmean(dim=0, keepdim=True), *draws])


def doublings(num_samples: int) -> list[int]:
    """1, 2, 4, ... and the number itself."""
    powers = [2**k for k in range(num_samples.bit_length()) if 2**k < num_samples]
    return [*powers, num_samples]


def at(x: Tensor, y: Tensor, wanted: Tensor) -> Tensor:
    """Read y where x has the wanted value, on the line between two neighbours, (R,).

    x 0 1 3 and y 0 10 20: at 2 it is 15, at 9 it is 20, at -1 it is 0.

    Args:
        x: (R, C), not falling along each row.
        y: (R, C).
    """
    right = torch.searchsorted(x.contiguous(), wanted[:, None].contiguous())
    right = right.clamp(1, x.shape[1] - 1)
    x0, x1 = (x.gather(1, i)[:, 0] for i in (right - 1, right))
    y0, y1 = (y.gather(1, i)[:, 0] for i in (right - 1, right))
    share = ((wanted - x0) / (x1 - x0)).nan_to_num(0.0).clamp(0, 1)
    return y0 + share * (y1 - y0)


class Levels(NamedTuple):
    """Mean scores, (R + 1,) each or (R + 1, C) for the C values of `counts`; see `score_levels`."""

    counts: list[int]
    proxy: Tensor  # of the best of n by the proxy, (R + 1, C)
    gold: Tensor  # gold score of the same, (R + 1, C)
    ceiling: Tensor  # gold score of the best of all N by gold
    ppo_proxy: Tensor  # nan without PPO
    ppo_gold: Tensor
    good: Tensor  # gold score of known-good answers; nan without


@torch.no_grad()
def score_levels(
    proxy: Tensor,
    gold: Tensor,
    ppo_proxy: Tensor | None = None,
    ppo_gold: Tensor | None = None,
    good: Tensor | None = None,
) -> Levels:
    """Mean scores that the gains are differences of.

    Args:
        proxy, gold: (P, N) scores of N samples of the SFT policy to each of P prompts: by the
            scorer that PPO trains on, and by the one that is trusted.
        ppo_proxy, ppo_gold: (P,) mean scores of PPO's answers to each prompt.
        good: (P,) gold scores of known-good answers, nan where there is none.
    """
    counts = doublings(proxy.shape[1])
    nothing = torch.full((len(proxy),), torch.nan)
    columns = [best_of_n(proxy, n) for n in counts]
    columns += [best_of_n(proxy, n, gold) for n in counts]
    columns += [best_of_n(gold, counts[-1])]
    columns += [nothing if x is None else x.cpu().float() for x in (ppo_proxy, ppo_gold, good)]
    means = resampled_means(torch.stack([column.cpu() for column in columns], dim=1))
    num = len(counts)
    return Levels(counts, means[:, :num], means[:, num : 2 * num], *means[:, 2 * num :].unbind(1))


def swap_gains(levels: Levels) -> dict[str, Tensor]:
    """What swapping one stage's output for a known-good one would gain in gold score, (R + 1,) for
    each stage; nan where it cannot be told.

    - ppo: the best of N by the proxy, less the best of the n that has PPO's proxy score. It is the
      proxy that PPO is asked to raise: what it lost at equal proxy is not its fault. An answer that
      the proxy likes less than the SFT policy's is.
    - reward: the best of N by gold less that by the proxy, and what PPO lost at equal proxy.
    - sft: known-good answers, less the best that the SFT policy or PPO says.

    Where PPO's gold score is below the ceiling, the three add up to good - ppo_gold.

    Worked example: best of 1 and 16 by the proxy 0.5 and 0.8 gold, by gold 0.9; PPO has the proxy
    score of one answer and 0.5 gold; good answers 1.0. ppo 0.3, reward 0.1, sft 0.1.
    """
    most, has_ppo = levels.gold[:, -1], not levels.ppo_gold.isnan().all()
    reached = spoken = most
    if has_ppo:
        spoken = levels.ppo_gold
        reached = at(levels.proxy, levels.gold, levels.ppo_proxy)
        reached = torch.where(levels.ppo_proxy <= levels.proxy[:, 0], spoken, reached)
    return {
        "sft": levels.good - torch.maximum(levels.ceiling, spoken),
        "reward": levels.ceiling - most + reached - spoken,
        "ppo": most - reached if has_ppo else torch.full_like(most, torch.nan),
    }


def best_of_n_at_kl(levels: Levels, kl: Tensor) -> tuple[Tensor, Tensor]:
    """Proxy and gold score of the best-of-n whose KL is `kl`, (R,) each; nan beyond the largest n.

    Args:
        kl: (R,) nats per response.
    """
    known = torch.tensor([best_of_n_kl(n) for n in levels.counts]).double()
    x = known.expand(len(kl), -1)
    beyond = kl > known[-1]
    proxy, gold = (at(x, y, kl) for y in (levels.proxy, levels.gold))
    return proxy.where(~beyond, torch.nan), gold.where(~beyond, torch.nan)


class TurningPoint(NamedTuple):
    """Where the gold score of best-of-n is highest; see `turning_point`."""

    distance: Tensor  # (R + 1,) square root of the KL there, nats; inf: it does not turn
    most: float  # distance of the largest n: what lies beyond was not measured


def turning_point(levels: Levels) -> TurningPoint:
    """Fit R(d) = d (alpha - beta d), d = sqrt(KL), to the gain in gold score of best-of-n by the
    proxy, by least squares over n = 1, 2, 4, ..., N; it turns at alpha / (2 beta).

    0 where it falls from the start; infinite where it bends upwards or not at all.

    Source: Gao et al. 2022 (arXiv 2210.10760) eq. 1 for best-of-n, with its KL from n.
    """
    d = torch.tensor([best_of_n_kl(n) for n in levels.counts]).double().sqrt()
    basis = torch.stack([d, -d.square()], dim=1)  # (C, 2)
    gain = levels.gold - levels.gold[:, :1]
    alpha, beta = (gain @ torch.linalg.pinv(basis).T).unbind(dim=1)
    turns = torch.where(beta > 0, alpha / (2 * beta), torch.inf)
    turns = torch.where((alpha <= 0) & (gain[:, -1] <= 0), 0.0, turns)
    return TurningPoint(turns.clamp(min=0), float(d[-1]))


class WeakestLink(NamedTuple):
    """The stage whose swap would gain most; see `weakest_link`."""

    stage: str | None
    reason: str  # "clear", "small" or "close"
    gains: dict[str, Estimate]


def weakest_link(gains: dict[str, Tensor], least: float) -> WeakestLink:
    """The stage with the largest gain, if that is large enough and clearly ahead of the others.

    Args:
        gains: of `swap_gains`; nan: cannot be told.
        least: a smaller gain is none.

    Returns: no stage where the largest gain is below `least` or its interval contains 0 ("small"),
        or where the interval of its lead over another contains 0 ("close").
    """
    known = {name: draws for name, draws in gains.items() if not draws[0].isnan()}
    estimates = {name: estimate(draws) for name, draws in known.items()}
    if not known:
        return WeakestLink(None, "small", estimates)
    first = max(known, key=lambda name: estimates[name].mean)
    if estimates[first].mean < least or estimates[first].low <= 0:
        return WeakestLink(None, "small", estimates)
    leads: Sequence[Estimate] = [
        estimate(known[first] - draws) for name, draws in known.items() if name != first
    ]
    is_clear = all(lead.low > 0 for lead in leads)
    return WeakestLink(first if is_clear else None, "clear" if is_clear else "close", estimates)


@torch.no_grad()
def pair_agreement(proxy: Tensor, gold: Tensor) -> Tensor:
    """Share of the pairs of a prompt's samples with different gold scores that the proxy orders in
    the same way, (P,); a tie of the proxy counts one half, nan where no pair differs.

    Args:
        proxy, gold: (P, N) scores.
    """
    ours, theirs = ((x[:, :, None] - x[:, None, :]).sign() for x in (proxy, gold))
    differ = theirs != 0
    alike = ((1 + ours * theirs) / 2 * differ).sum(dim=(1, 2))
    return alike / differ.sum(dim=(1, 2))
