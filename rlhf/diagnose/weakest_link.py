"""From scores to `diagnosis.json`: levels, gains, the weakest link, the turning point.

Left out: the formulas (`rlhf.functional.stage_gains`), and what to do (`remedies`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf.diagnose.answers import Ranked, Scored
from rlhf.diagnose.options import Subject
from rlhf.functional import (
    Estimate,
    Levels,
    WeakestLink,
    best_of_n_at_kl,
    best_of_n_kl,
    bootstrap_interval,
    estimate,
    pair_agreement,
    resampled_means,
    score_levels,
    swap_gains,
    turning_point,
    weakest_link,
)

SMALL = 0.2  # standard deviations of the gold score within the SFT policy's answers
Findings = dict[str, Any]  # the keys of diagnosis.json


def findings_of(scored: Scored, subject: Subject) -> Findings:
    """Everything that `diagnosis.json` says but the commands.

    A number is {"mean", "low", "high"}, with the ends of its 95 % bootstrap interval over prompts.
    """
    levels = score_levels(scored.proxy, scored.gold, scored.ppo_proxy, scored.ppo_gold, scored.good)
    gains, spread = swap_gains(levels), float(scored.gold.std())
    if subject.gold is None:
        gains["reward"] = torch.full_like(gains["reward"], torch.nan)
    link = weakest_link(gains, SMALL * spread)
    accuracy = _accuracy(scored.ranked) if scored.ranked else None
    if subject.gold is None and accuracy and accuracy.low <= 0.5:
        link = WeakestLink("reward", "chance", link.gains)
    found: Findings = {
        "sft": subject.sft,
        "reward": subject.scorer_name,
        "ppo": subject.ppo,
        "gold": subject.gold.path if subject.gold else None,
        "prompts": subject.source,
        "num_prompts": len(scored.proxy),
        "samples_per_prompt": scored.proxy.shape[1],
        "gold_std": spread,
        "eos_rate": scored.ended,
        "answers": _answers(levels, scored),
        "best_of_n": _best_of_n(levels),
        "gains": {stage: value._asdict() for stage, value in link.gains.items()},
        "weakest": link.stage,
        "reason": link.reason,
        "over_optimised": _is_over_optimised(levels),
        "accuracy": accuracy._asdict() if accuracy else None,
        "agreement": None,
    }
    if subject.gold is not None:
        agreement = estimate(_means(pair_agreement(scored.proxy, scored.gold)))
        found["agreement"] = agreement._asdict()
        found["stopping_point"] = stopping_point(levels) | {"unit": "gold score"}
    elif scored.ranked:
        on_labels = score_levels(scored.ranked.scores, scored.ranked.worth)
        found["best_of_n_on_rankings"] = _best_of_n(on_labels)
        unit = "share of the other ranked answers that are worse"
        found["stopping_point"] = stopping_point(on_labels) | {"unit": unit}
    return found


def _means(column: Tensor) -> Tensor:
    return resampled_means(column[:, None])[:, 0]


def _accuracy(ranked: Ranked) -> Estimate:
    interval = bootstrap_interval(ranked.right, clusters=ranked.owners)
    return Estimate(float(ranked.right.mean()), *interval)


def _answers(levels: Levels, scored: Scored) -> list[Findings]:
    """Who answers, with gold and proxy score and KL to the SFT policy, the best choice first."""
    most = levels.counts[-1]

    def row(name: str, gold: Tensor, proxy: Tensor | None = None, kl: Any = None) -> Findings:
        value = None if proxy is None or proxy[0].isnan() else estimate(proxy)._asdict()
        return {"name": name, "gold": estimate(gold)._asdict(), "proxy": value, "kl": kl}

    rows = [
        row("known-good answers", levels.good),
        row(f"SFT, best of {most} by gold", levels.ceiling, kl=best_of_n_kl(most)),
        row(
            f"SFT, best of {most} by the scorer",
            levels.gold[:, -1],
            levels.proxy[:, -1],
            best_of_n_kl(most),
        ),
    ]
    if scored.kl is not None:
        kl = _means(scored.kl)
        proxy, gold = best_of_n_at_kl(levels, kl.clamp(min=0))
        rows.append(row("SFT, best of n at PPO's KL", gold, proxy, float(kl[0])))
        rows.append(row("PPO", levels.ppo_gold, levels.ppo_proxy, float(kl[0])))
    rows.append(row("SFT", levels.gold[:, 0], levels.proxy[:, 0], 0.0))
    return [row for row in rows if not math.isnan(row["gold"]["mean"])]


def _best_of_n(levels: Levels) -> list[Findings]:
    return [
        {
            "n": n,
            "kl": best_of_n_kl(n),
            "proxy": estimate(levels.proxy[:, i])._asdict(),
            "gold": estimate(levels.gold[:, i])._asdict(),
        }
        for i, n in enumerate(levels.counts)
    ]


def _is_over_optimised(levels: Levels) -> bool:
    """True where PPO's proxy score is higher than that of the SFT policy, its gold score lower."""
    if levels.ppo_gold[0].isnan():
        return False
    fell = estimate(levels.ppo_gold - levels.gold[:, 0]).high < 0
    return fell and estimate(levels.ppo_proxy - levels.proxy[:, 0]).low > 0


def stopping_point(levels: Levels) -> Findings:
    """Where best-of-n by the proxy stops to raise the gold score, nats per response. Beyond the
    largest n nothing was measured, so that nothing is said about it.

    Returns:
        verdict: turns (`kl`, and `proxy`, the score of the scorer there), rises (`kl` is null), or
            never rises.
    """
    turn, num = turning_point(levels), levels.counts[-1]
    measured = {"largest_n": num, "largest_kl": best_of_n_kl(num)}
    rise = estimate(levels.gold.max(dim=1).values - levels.gold[:, 0])
    last = estimate(levels.gold[:, -1] - levels.gold[:, 0])
    if turn.distance[0] == 0 or (last.low <= 0 and rise.mean <= abs(last.mean)):
        return measured | {"verdict": "never rises", "kl": None}
    if turn.distance[0] >= turn.most:
        return measured | {"verdict": "rises", "kl": None}
    kl = estimate(turn.distance.clamp(max=turn.most).square())
    proxy, _ = best_of_n_at_kl(levels, turn.distance.clamp(max=turn.most).square())
    is_open = kl.high >= turn.most**2 * (1 - 1e-9)
    return measured | {
        "verdict": "turns",
        "kl": kl._asdict() | {"high": None if is_open else kl.high},
        "proxy": estimate(proxy)._asdict(),
    }
