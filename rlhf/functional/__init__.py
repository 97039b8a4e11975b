"""Every formula of the project, as pure functions: tensors in, tensors out.

`masks` sums over valid elements, `tokens` reads logits, `advantages` turns scores into advantages,
`losses` and `ranking` are what is minimised, `schedules` moves learning rates and the price of KL,
`diagnostics` measures a run.

Left out: I/O, models, processes. Losses take the `denominator` of the whole minibatch and return
statistics as sums, so that a caller with micro-batches or ranks only adds them up.

Shapes: B sequences, T response tokens, V vocabulary, P prompts, K responses of one prompt. `mask`
is a bool tensor, True where valid; it may have gaps. What stands at masked positions (padding, inf,
nan) changes neither values nor gradients. Inputs may have any floating dtype; every resulting
tensor is float32. Log-probs, KL and entropy are in nats. Every function raises ValueError for a
wrong shape (nothing broadcasts in silence) or an unknown kind, and TypeError for a mask not bool.
Knobs such as gamma and kl_coef are for the config to check; here only those are refused that leave
a formula without meaning: temperature <= 0, dual_clip <= 1, the best of more than there are.

    advantages, returns = gae(shape_rewards(scores, kl, mask, kl_coef), values, mask, gamma, lam)
    loss, stats = policy_loss(logprobs, old_logprobs, whiten(advantages, mask), mask, cliprange)
"""

from rlhf.functional.advantages import gae, grpo, reinforce_pp, rloo, shape_rewards
from rlhf.functional.diagnostics import (
    Moments,
    best_of_n,
    best_of_n_kl,
    bootstrap_interval,
    explained_variance,
    update_moments,
    wins,
)
from rlhf.functional.losses import Stats, policy_loss, value_loss
from rlhf.functional.masks import masked_mean, masked_sum, whiten
from rlhf.functional.ranking import ranking_loss
from rlhf.functional.schedules import adaptive_kl_coef, learning_rate_factor
from rlhf.functional.tokens import kl_estimate, token_entropy, token_logprobs

__all__ = [
    "Moments",
    "Stats",
    "adaptive_kl_coef",
    "best_of_n",
    "best_of_n_kl",
    "bootstrap_interval",
    "explained_variance",
    "gae",
    "grpo",
    "kl_estimate",
    "learning_rate_factor",
    "masked_mean",
    "masked_sum",
    "policy_loss",
    "ranking_loss",
    "reinforce_pp",
    "rloo",
    "shape_rewards",
    "token_entropy",
    "token_logprobs",
    "update_moments",
    "value_loss",
    "whiten",
    "wins",
]
