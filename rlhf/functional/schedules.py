"""How the learning rates and the price of KL change from one PPO update to the next."""

from __future__ import annotations


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
        schedule: "linear" or "constant".

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
        kl_coef: the coefficient that the rollout was sampled under, >= 0.
        kl, target: measured and wanted KL(policy || reference), nats per sequence; target > 0.
        horizon: sequences over which a KL 20 % or more off changes the coefficient by about 20 %.
        num_sequences: sequences since the last update, on all ranks together.

    Returns: the coefficient for the next rollout, >= 0; at most 20 % * num_sequences / horizon off.
    Source: Ziegler et al. 2019 (arXiv 1909.08593) section 2.2; openai/lm-human-preferences
        `train_policy.py::AdaptiveKLController`, which a horizon under 0.2 * num_sequences could
        make negative.
    """
    if not (target > 0 and horizon > 0):
        raise ValueError(f"target and horizon must be > 0, got {target} and {horizon}")
    error = min(max(kl / target - 1, -0.2), 0.2)
    # In this order max hands on a nan.
    return max(kl_coef * (1 + error * num_sequences / horizon), 0.0)
