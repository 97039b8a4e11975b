"""How far the log-probs of what sampled are from those of the policy in training.

`trainer.py` reports it in every update, and `update.py` trains on nothing that is further than
`sampling.max_gap`.
"""

from __future__ import annotations

import math

from rlhf.config import InputError, PPOStageConfig
from rlhf.ppo.rollout import Rollout


def sampler_gaps(rollout: Rollout) -> dict[str, float]:
    """Metrics of |log-prob of the sampler - of the training forward| over response tokens, nats."""
    gaps = (rollout.sampler_logprobs - rollout.logprobs).abs()[rollout.response_mask]
    nearest_rank = math.ceil(0.999 * len(gaps))
    return {
        "sampler_gap": float(gaps.max()),
        "sampler_gap_mean": float(gaps.mean()),
        "sampler_gap_p999": float(gaps.kthvalue(nearest_rank).values),
    }


def require_sampler(rollout: Rollout, config: PPOStageConfig, update: int) -> None:
    """Refuse a rollout whose sampler drew from other probabilities than the policy's."""
    gaps, limit = sampler_gaps(rollout), config.sampling.max_gap
    if limit is not None and not gaps["sampler_gap_p999"] <= limit:  # negated, for nan
        raise InputError(
            f"update {update + 1}: log-probs of sampler and policy differ by "
            f"{gaps['sampler_gap_p999']:.3g} nats at one token in a thousand (mean "
            f"{gaps['sampler_gap_mean']:.3g}), more than sampling.max_gap={limit:g}: it sampled "
            "with other weights or another precision, and nothing was updated with it. Set "
            "sampling.dtype=float32 or sampling.engine=loop, or raise sampling.max_gap"
        )
