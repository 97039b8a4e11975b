"""A critic that explains none of the returns does not steer the policy (`critic.must_explain`).

Run: python -m pytest tests/ppo/test_critic_must_explain.py
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.tiny_ppo import make_config, make_trainer

from rlhf.config import CriticConfig, PPOStageConfig
from rlhf.functional import gae, reinforce_pp, whiten
from rlhf.ppo.watchdog import measure


@pytest.fixture
def trainer(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path, kl_coef=0.3, gamma=0.9)
    config.critic.must_explain = None
    return make_trainer(config, tmp_path)


def with_values(trainer, factor):
    """A rollout whose critic predicts `factor` x the rewards to go, off by a constant."""
    rollout = trainer.collect()
    kl, rewards = trainer.shape_rewards(rollout)
    returns = reinforce_pp(rewards, rollout.response_mask, 0.9)
    values = (factor * returns + 5.0).where(rollout.response_mask, 0.0)
    return dataclasses.replace(rollout, values=values), kl, rewards, returns


def test_a_critic_worse_than_a_constant_has_no_part_in_the_advantages(trainer):
    rollout, kl, rewards, returns = with_values(trainer, -0.5)
    batch = trainer.estimate_advantages(rollout, kl, rewards)
    mask = rollout.response_mask
    expected = (returns - returns[mask].mean()).where(mask, 0.0)
    torch.testing.assert_close(batch.raw_advantages, expected)
    torch.testing.assert_close(batch.advantages, whiten(returns, mask))
    torch.testing.assert_close(batch.returns, returns)  # what the critic learns
    assert not trainer.updater.clips_values


def test_a_critic_that_explains_something_is_used(trainer):
    rollout, kl, rewards, _ = with_values(trainer, 0.5)
    batch = trainer.estimate_advantages(rollout, kl, rewards)
    raw, returns = gae(rewards, rollout.values, rollout.response_mask, 0.9, 0.95)
    torch.testing.assert_close(batch.raw_advantages, raw)
    torch.testing.assert_close(batch.returns, returns)
    assert trainer.updater.clips_values


def test_a_critic_as_good_as_a_constant_does_not_steer(trainer):
    rollout, _, rewards, _ = with_values(trainer, 0.0)
    assert not trainer.critic_steers(rollout, rewards)


def test_a_new_head_predicts_0_and_explains_nothing(trainer):
    rollout = trainer.collect()
    _, rewards = trainer.shape_rewards(rollout)
    assert not rollout.values.any() and not trainer.critic_steers(rollout, rewards)


def test_a_change_is_said_once_and_each_update_has_the_metric(trainer, capsys):
    for factor in (-0.5, -0.5, 0.5, 0.5):
        rollout, _, rewards, _ = with_values(trainer, factor)
        trainer.critic_steers(rollout, rewards)
    first, second = capsys.readouterr().out.splitlines()
    assert first == (
        "update 1: the critic explains -125.0% of the variance of the returns: advantages are "
        "returns minus their mean until it explains more"
    )
    assert second.endswith("explains 75.0% of the variance of the returns: advantages use it now")
    assert trainer.step()["critic_steers"] in (0.0, 1.0)


def test_values_learn_without_a_clip_while_the_critic_does_not_steer(trainer):
    rollout, kl, rewards, _ = with_values(trainer, -0.5)
    batch = trainer.estimate_advantages(rollout, kl, rewards)
    assert trainer.updater.run(batch, 0, 0.3)["value_clip_fraction"] == 0
    trainer.updater.clips_values = True
    assert trainer.updater.run(batch, 0, 0.3)["value_clip_fraction"] > 0


@pytest.mark.parametrize(
    ("critic", "advantage", "expected"),
    [
        (CriticConfig("policy"), "gae", True),
        (CriticConfig("reward"), "gae", False),
        (CriticConfig("runs/mine/ppo/critic"), "gae", False),
        (CriticConfig("reward", must_explain=True), "gae", True),
        (CriticConfig("policy", must_explain=False), "gae", False),
        (CriticConfig("policy"), "rloo", False),
    ],
)
def test_a_new_head_must_explain_and_a_trained_critic_need_not(critic, advantage, expected):
    config = PPOStageConfig(critic=critic, ppo={"advantage": advantage})
    assert config.critic_must_explain is expected


def test_a_trained_critic_that_steers_anyway_has_no_such_metric(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path), tmp_path)
    assert "critic_steers" not in trainer.step()


def test_the_watchdog_accuses_only_a_critic_that_steers():
    row = {"kl_std": 0.0, "response_length": 5.0, "explained_variance": -3.0}
    assert measure(row | {"critic_steers": 1.0}, row, 8)["explained_variance"] == -3.0
    assert "explained_variance" not in measure(row | {"critic_steers": 0.0}, row, 8)
