"""Every formula of the project, as pure functions: tensors in, tensors out.

In the order of a PPO update: `tokens` reads logits and sums over valid tokens, `scores` combines
scorers, `advantages` turns scores into rewards and advantages, `ppo_losses` are minimised. The
reward model minimises `reward_loss`. `summary_statistics` are the numbers that reports show.

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

from rlhf.functional.advantages import (
    Moments,
    final_scores,
    gae,
    grpo,
    reinforce_pp,
    returns_minus_mean,
    rloo,
    shape_rewards,
    update_moments,
)
from rlhf.functional.ppo_losses import (
    Stats,
    adaptive_kl_coef,
    explained_variance,
    importance_weights,
    learning_rate_factor,
    policy_loss,
    value_loss,
)
from rlhf.functional.reward_loss import ranking_loss
from rlhf.functional.scores import combine_scores, component_weights, counting
from rlhf.functional.stage_gains import (
    Estimate,
    Levels,
    TurningPoint,
    WeakestLink,
    best_of_n_at_kl,
    estimate,
    pair_agreement,
    resampled_means,
    score_levels,
    swap_gains,
    turning_point,
    weakest_link,
)
from rlhf.functional.summary_statistics import (
    best_of_n,
    best_of_n_kl,
    bootstrap_interval,
    calibration,
    correlation,
    kendall_tau,
    normal_score,
    wins,
)
from rlhf.functional.tokens import (
    kl_estimate,
    logprobs_and_entropy,
    masked_mean,
    masked_sum,
    token_entropy,
    token_logprobs,
    whiten,
)
from rlhf.functional.win_rates import (
    Corrected,
    LengthControlled,
    geometric_mean,
    length_controlled,
    prediction_powered_mean,
    win_rate,
)
