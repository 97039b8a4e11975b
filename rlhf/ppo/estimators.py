"""Advantage estimators: shaped rewards in, advantages per token out.

`gae` needs a critic. The others need none: `rloo` and `grpo` compare the responses of one prompt,
`reinforce_pp` all tokens of the rollout. To add one, write a function of the same shape and name it
in `ESTIMATORS` and in the choices of `PPOConfig.advantage`. The formulas are in `rlhf.functional`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rlhf import functional
from rlhf.config import PPOConfig
from rlhf.ppo.rollout import Rollout


def gae(rollout: Rollout, rewards: Tensor, ppo: PPOConfig) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation with the critic's values (arXiv 1506.02438)."""
    return functional.gae(rewards, rollout.values, rollout.response_mask, ppo.gamma, ppo.lam)


def rloo(rollout: Rollout, rewards: Tensor, ppo: PPOConfig) -> tuple[Tensor, Tensor]:
    """Leave-one-out over the responses of a prompt (arXiv 2402.14740); one number per response."""
    return _per_response(functional.rloo, rollout, rewards, ppo)


def grpo(rollout: Rollout, rewards: Tensor, ppo: PPOConfig) -> tuple[Tensor, Tensor]:
    """Standardised over the responses of a prompt (arXiv 2402.03300); one number per response.

    The loss stays the mean over the tokens of the minibatch, not first over each response.
    """
    return _per_response(functional.grpo, rollout, rewards, ppo)


def reinforce_pp(rollout: Rollout, rewards: Tensor, ppo: PPOConfig) -> tuple[Tensor, Tensor]:
    """Reward to go, to be whitened over the rollout (REINFORCE++, arXiv 2501.03262)."""
    returns = functional.reinforce_pp(rewards, rollout.response_mask, ppo.gamma)
    return returns, returns


def _per_response(
    formula: Callable[[Tensor], Tensor], rollout: Rollout, rewards: Tensor, ppo: PPOConfig
) -> tuple[Tensor, Tensor]:
    """Apply a formula to the summed rewards, (P, K), and give every token its response's result."""
    totals = rewards.sum(dim=1)  # (B,); rewards are 0 at masked positions
    per_response = formula(totals.view(-1, ppo.samples_per_prompt)).view(-1, 1)  # (B, 1)
    mask = rollout.response_mask
    return per_response.where(mask, 0.0), totals[:, None].where(mask, 0.0)


Estimator = Callable[[Rollout, Tensor, PPOConfig], tuple[Tensor, Tensor]]
# name -> (rollout, rewards (B, T), settings) -> advantages, returns (B, T), 0 where masked
ESTIMATORS: dict[str, Estimator] = {
    "gae": gae,
    "rloo": rloo,
    "grpo": grpo,
    "reinforce_pp": reinforce_pp,
}
# Whitened over the rollout, unless `ppo.whiten_advantages` says otherwise.
WHITENED = ("gae", "reinforce_pp")
