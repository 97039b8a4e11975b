"""Our formulas against those of stable-baselines3: its rollout buffer's GAE and its PPO.train().

Its steps are our tokens and its episodes our rows. It has no mask: an environment's column holds
several episodes, and the last may go on after the rollout. Where the two differ, the test computes
the difference from the inputs and checks that it is all.

Run: see requirements.txt
"""

import math

import pytest
import torch

from rlhf.functional import (
    explained_variance,
    gae,
    policy_loss,
    token_entropy,
    token_logprobs,
    value_loss,
    whiten,
)

pytestmark = pytest.mark.peers
STEPS, ENVIRONMENTS, GAMMA, LAM, CLIP = 32, 6, 0.97, 0.9, 0.2


@pytest.fixture(scope="module")
def sb3():
    return pytest.importorskip("stable_baselines3", reason="see tests/peers/requirements.txt")


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def their_gae(rewards, values, episode_starts, last_values, dones):
    """Fill a RolloutBuffer; all (environments, steps), but the last two (environments,)."""
    from gymnasium import spaces
    from stable_baselines3.common.buffers import RolloutBuffer

    box = spaces.Box(-1.0, 1.0, (1,))
    buffer = RolloutBuffer(
        rewards.shape[1], box, box, "cpu", gae_lambda=LAM, gamma=GAMMA, n_envs=len(rewards)
    )
    nothing = torch.zeros(len(rewards), 1).numpy()
    for reward, value, start in zip(rewards.T, values.T, episode_starts.T, strict=True):
        buffer.add(nothing, nothing, reward.numpy(), start.numpy(), value, torch.zeros(len(reward)))
    buffer.compute_returns_and_advantage(last_values, dones.numpy())
    return torch.from_numpy(buffer.advantages).T, torch.from_numpy(buffer.returns).T


def test_gae_is_theirs_on_episodes_that_end_with_the_rollout(sb3, agree):
    rewards, values = random(4, 9, seed=1), random(4, 9, seed=2)
    starts = torch.zeros(4, 9).index_fill(1, torch.tensor(0), 1.0)
    theirs = their_gae(rewards, values, starts, random(4, seed=3), torch.ones(4))
    ours = gae(rewards, values, torch.ones(4, 9, dtype=torch.bool), GAMMA, LAM)
    for name, our, their in zip(("advantages", "returns"), ours, theirs, strict=True):
        agree(f"SB3  GAE {name}, terminal ends", our, their)


def test_gae_is_theirs_on_unfinished_episodes_with_the_bootstrap_in_the_last_reward(sb3, agree):
    """SB3 bootstraps from V(state after the rollout); our rows end in 0. Adding gamma V to the last
    reward is the same, and without it the advantages differ by (gamma lam)^steps gamma V."""
    rewards, values, last = random(4, 9, seed=1), random(4, 9, seed=2), random(4, seed=3)
    starts = torch.zeros(4, 9).index_fill(1, torch.tensor(0), 1.0)
    theirs = their_gae(rewards, values, starts, last, torch.zeros(4))
    mask = torch.ones(4, 9, dtype=torch.bool)
    bootstrapped = rewards.clone()
    bootstrapped[:, -1] += GAMMA * last
    ours = gae(bootstrapped, values, mask, GAMMA, LAM)
    for name, our, their in zip(("advantages", "returns"), ours, theirs, strict=True):
        agree(f"SB3  GAE {name}, bootstrap in the last reward", our, their)
    added = GAMMA * last[:, None] * (GAMMA * LAM) ** (8 - torch.arange(9))
    without, _ = gae(rewards, values, mask, GAMMA, LAM)
    agree("SB3  GAE advantages = ours + bootstrap's effect", without + added, theirs[0])


def test_gae_is_theirs_on_columns_of_several_episodes_as_padded_rows(sb3, agree):
    """Every episode of a column becomes a row of ours, padded with nan behind its last step."""
    generator = torch.Generator().manual_seed(4)
    starts = (torch.rand((ENVIRONMENTS, STEPS), generator=generator) < 0.2).float()
    starts[:, 0] = 1.0
    rewards, values = random(ENVIRONMENTS, STEPS, seed=5), random(ENVIRONMENTS, STEPS, seed=6)
    theirs = their_gae(
        rewards, values, starts, random(ENVIRONMENTS, seed=7), torch.ones(ENVIRONMENTS)
    )
    rows = torch.nonzero(starts)  # (episodes, 2): environment and first step, in order
    ends = [
        int(rows[k + 1, 1]) if k + 1 < len(rows) and rows[k + 1, 1] > 0 else STEPS
        for k in range(len(rows))
    ]
    padded = torch.full((2, len(rows), STEPS), torch.nan)
    mask = torch.zeros(len(rows), STEPS, dtype=torch.bool)
    for k, ((environment, begin), end) in enumerate(zip(rows.tolist(), ends, strict=True)):
        padded[0, k, : end - begin] = rewards[environment, begin:end]
        padded[1, k, : end - begin] = values[environment, begin:end]
        mask[k, : end - begin] = True
    assert len(rows) > 2 * ENVIRONMENTS and mask.sum() == rewards.numel()
    ours = gae(padded[0], padded[1], mask, GAMMA, LAM)
    for name, our, their in zip(("advantages", "returns"), ours, theirs, strict=True):
        agree(f"SB3  GAE {name}, several episodes in a column", our[mask], their.flatten())


@pytest.fixture(
    params=[(False, None), (True, None), (False, 0.05)], ids=["plain", "normalised", "value-clip"]
)
def update(request, sb3):
    """Collect a CartPole rollout, move the policy, and let PPO.train() look at it once.

    Returns: its PPO, its logged numbers, and what its formulas took, (environments, steps) each.
    """
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.logger import configure

    normalize_advantage, clip_range_vf = request.param
    ppo = sb3.PPO(
        "MlpPolicy",
        make_vec_env("CartPole-v1", n_envs=ENVIRONMENTS, seed=0),
        learning_rate=0.0,  # keeps the policy, and the gradients of the one step
        n_steps=STEPS,
        batch_size=STEPS * ENVIRONMENTS,
        n_epochs=1,
        gamma=GAMMA,
        gae_lambda=LAM,
        clip_range=CLIP,
        clip_range_vf=clip_range_vf,
        normalize_advantage=normalize_advantage,
        max_grad_norm=1e9,
        seed=0,
        device="cpu",
    )
    ppo.set_logger(configure(None, []))
    ppo.learn(STEPS * ENVIRONMENTS)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in ppo.policy.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    ppo.train()
    buffer = ppo.rollout_buffer  # flat, environment after environment
    names = ("values", "log_probs", "advantages", "returns")
    old = {
        name: torch.from_numpy(getattr(buffer, name)).view(ENVIRONMENTS, STEPS) for name in names
    }
    new = dict(zip(("values", "logits"), _evaluate(ppo, buffer), strict=True))
    actions = torch.from_numpy(buffer.actions).long().view(ENVIRONMENTS, STEPS)
    new["log_probs"] = token_logprobs(new["logits"], actions)
    return ppo, ppo.logger.name_to_value, old, new


def _evaluate(ppo, buffer):
    observations = torch.from_numpy(buffer.observations)
    values = ppo.policy.predict_values(observations).view(ENVIRONMENTS, STEPS)
    logits = ppo.policy.get_distribution(observations).distribution.logits
    return values, logits.view(ENVIRONMENTS, STEPS, -1)


ALL = torch.ones(ENVIRONMENTS, STEPS, dtype=torch.bool)


def their_normalised(advantages):
    """SB3 divides by sqrt(unbiased variance) + 1e-8, we by sqrt(biased variance + 1e-8)."""
    unbiased = advantages.double().std()
    biased = unbiased * math.sqrt((advantages.numel() - 1) / advantages.numel())
    return whiten(advantages, ALL) * (biased.square() + 1e-8).sqrt() / (unbiased + 1e-8)


def test_policy_loss_and_gradient_are_theirs(update, agree):
    """Equal, on advantages as they are and on normalised ones; the value loss of SB3, not halved,
    is twice ours, and in the gradient too. The entropy term has coefficient 0."""
    ppo, logged, old, new = update
    advantages = old["advantages"]
    if ppo.normalize_advantage:
        advantages = their_normalised(advantages).float()
    loss, stats = policy_loss(new["log_probs"], old["log_probs"], advantages, ALL, CLIP)
    agree("SB3  policy loss", loss, logged["train/policy_gradient_loss"])
    approx_kl = stats["approx_kl"] / stats["num_tokens"]
    agree("SB3  approx_kl (k3)", approx_kl, logged["train/approx_kl"])
    agree("SB3  entropy", -token_entropy(new["logits"]).mean(), logged["train/entropy_loss"])
    if ppo.clip_range_vf is None:
        error, _ = value_loss(new["values"], old["values"], old["returns"], ALL, None)
        parameters = list(ppo.policy.parameters())
        gradients = torch.autograd.grad(loss + ppo.vf_coef * 2 * error, parameters)
        for ours, parameter in zip(gradients, parameters, strict=True):
            agree("SB3  gradient of the loss by all weights", ours, parameter.grad)


def test_clip_fraction_is_theirs_but_for_ratios_whose_gradient_stays(update, agree):
    """SB3 counts every ratio outside 1 +- clip. We count those whose gradient the clip removes: not
    a ratio above with a negative advantage, nor one below with a positive."""
    _, logged, old, new = update
    advantages = old["advantages"]
    if update[0].normalize_advantage:
        advantages = their_normalised(advantages).float()
    _, stats = policy_loss(new["log_probs"], old["log_probs"], advantages, ALL, CLIP)
    ratio = (new["log_probs"] - old["log_probs"]).exp()
    stays = ((ratio > 1 + CLIP) & (advantages <= 0)) | ((ratio < 1 - CLIP) & (advantages >= 0))
    ours = (stats["clip_fraction"] + stays.sum()) / stats["num_tokens"]
    agree("SB3  clip fraction = ours + gradient stays", ours, logged["train/clip_fraction"])
    assert stays.sum() > 5 and stats["clip_fraction"] > 5


def test_value_loss_is_twice_ours_less_what_taking_the_larger_error_adds(update, agree):
    """Unclipped: SB3's mean square is twice ours. Clipped: SB3 takes the clipped error alone, also
    where it is smaller; we the larger of both, so that a clip never hides an error."""
    ppo, logged, old, new = update
    clip = None if ppo.clip_range_vf is None else ppo.clip_range_vf(1.0)
    ours, stats = value_loss(new["values"], old["values"], old["returns"], ALL, clip)
    if clip is None:
        agree("SB3  value loss = 2 x ours", 2 * ours, logged["train/value_loss"])
        return
    change = (new["values"] - old["values"]).clamp(-clip, clip)
    clipped_error = (old["values"] + change - old["returns"]).square()
    added = ((new["values"] - old["returns"]).square() - clipped_error).clamp(min=0).mean()
    agree(
        "SB3  clipped value loss = 2 x ours - larger", 2 * ours - added, logged["train/value_loss"]
    )
    assert added > 1e-3 and stats["value_clip_fraction"] > 5


def test_explained_variance_is_theirs_where_returns_vary(update, agree):
    """Equal, over all steps of the rollout. For constant returns ours is 0; SB3's nan, or a huge
    negative number where the rounded mean makes their variance tiny instead of 0."""
    from stable_baselines3.common.utils import explained_variance as theirs

    _, logged, old, _ = update
    ours = explained_variance(old["values"], old["returns"], ALL)
    agree("SB3  explained variance", ours, logged["train/explained_variance"])
    for constant in (0.5, 0.1):
        returns = torch.full((ENVIRONMENTS, STEPS), constant)
        their = theirs(old["values"].flatten().numpy(), returns.flatten().numpy())
        assert math.isnan(their) or their < -1e6
        assert explained_variance(old["values"], returns, ALL) == 0
