"""Advantage estimators in the loop: several responses of a prompt, runs without a critic.

Run: python -m pytest tests/ppo/test_estimators.py
"""

from __future__ import annotations

import json

import pytest
import torch
from helpers.tiny_ppo import make_config, make_trainer, move_policy

from rlhf import train_ppo


def test_several_responses_of_a_prompt_stand_together_and_differ(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path, samples_per_prompt=4), tmp_path)
    rollout = trainer.collect()
    prompts = [tuple(row) for row in rollout.prompt_ids.tolist()]
    assert prompts[0] == prompts[1] == prompts[2] == prompts[3] != prompts[4]
    assert len({tuple(row) for row in rollout.response_ids[:4].tolist()}) == 4


@pytest.mark.parametrize("name", ["rloo", "grpo", "reinforce_pp"])
def test_an_estimator_without_critic_gives_what_its_paper_says(policy_dir, tmp_path, name):
    config = make_config(
        policy_dir, tmp_path, advantage=name, samples_per_prompt=4, gamma=0.9, kl_coef=0.3
    )
    trainer = make_trainer(config, tmp_path)
    move_policy(trainer)
    assert trainer.actors.critic is None
    rollout = trainer.collect()
    kl, rewards = trainer.shape_rewards(rollout)
    batch = trainer.estimate_advantages(rollout, kl, rewards)
    mask = rollout.response_mask
    scores = rollout.final_scores(config.eos_penalty)
    totals = [float(scores[b]) - 0.3 * float(kl[b][mask[b]].double().sum()) for b in range(8)]
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    for b in range(8):
        group = totals[b // 4 * 4 : b // 4 * 4 + 4]
        length = int(mask[b].sum())
        if name == "rloo":
            expected[b, :length] = totals[b] - (sum(group) - totals[b]) / 3
        elif name == "grpo":
            mean = sum(group) / 4
            std = (sum((x - mean) ** 2 for x in group) / 3) ** 0.5
            expected[b, :length] = (totals[b] - mean) / (std + 1e-4)
        else:
            for t in range(length):
                expected[b, t] = sum(
                    0.9 ** (u - t) * float(rewards[b, u]) for u in range(t, length)
                )
    if name == "reinforce_pp":
        valid = expected[mask]
        expected = (expected - valid.mean()) / valid.std(unbiased=False) * mask
    torch.testing.assert_close(batch.advantages.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["rloo", "grpo", "reinforce_pp"])
def test_a_run_without_critic_trains_saves_and_needs_no_reward_model(policy_dir, tmp_path, name):
    config = make_config(policy_dir, tmp_path, advantage=name, samples_per_prompt=2)
    config.critic.init = "reward"  # the default; there is no critic to start
    result = train_ppo(config)
    assert result.directory is not None
    rows = [json.loads(line) for line in (tmp_path / "runs/run/ppo/metrics.jsonl").open()]
    assert not [row for row in rows if "value" in row or "critic_grad_norm" in row]
    assert not list((tmp_path / "runs/run/ppo").glob("checkpoint-*/critic*"))
