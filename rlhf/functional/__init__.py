"""Every formula of the project, as pure functions: tensors in, tensors out.

`masks` sums over valid elements, `tokens` reads logits, `scores` combines scorers and penalises
unfinished responses, `advantages` turns scores into advantages, `losses` and `ranking` are
minimised, `schedules` moves learning rates and the price of KL, `diagnostics` are the numbers that
a run watches, `summary_statistics` those that reports show.

Left out: I/O, models, processes. Losses take the `denominator` of the whole minibatch and return
statistics as sums, so that a caller with micro-batches or ranks only adds them up.

Shapes: B sequences, T response tokens, V vocabulary, P prompts, K responses of one prompt. `mask`
is a bool tensor, True where valid; it may have gaps. Values at masked positions (padding, inf, nan)
change neither results nor gradients. Inputs may have any floating dtype; every resulting tensor is
float32. Log-probs, KL and entropy are in nats. Every function raises ValueError for a wrong shape
(nothing broadcasts in silence) or an unknown kind, and TypeError for a mask that is not bool.
The config checks ranges of knobs such as gamma and kl_coef. Functions here refuse only values that
leave a formula without meaning: temperature <= 0, dual_clip <= 1, n larger than the samples.

    advantages, returns = gae(shape_rewards(scores, kl, mask, kl_coef), values, mask, gamma, lam)
    loss, stats = policy_loss(logprobs, old_logprobs, whiten(advantages, mask), mask, cliprange)
"""

from rlhf.functional.advantages import gae, grpo, reinforce_pp, rloo, shape_rewards
from rlhf.functional.diagnostics import Moments, explained_variance, update_moments
from rlhf.functional.losses import Stats, policy_loss, value_loss
from rlhf.functional.masks import masked_mean, masked_sum, whiten
from rlhf.functional.ranking import ranking_loss
from rlhf.functional.schedules import adaptive_kl_coef, learning_rate_factor
from rlhf.functional.scores import combine_scores, component_weights, counting, final_scores
from rlhf.functional.summary_statistics import (
    best_of_n,
    best_of_n_kl,
    bootstrap_interval,
    calibration,
    correlation,
    kendall_tau,
    wins,
)
from rlhf.functional.tokens import kl_estimate, token_entropy, token_logprobs
