"""`ppo.mask_truncated`: responses that the budget cuts count in no loss and in no whitening.

Run: pytest tests/ppo/test_mask_truncated.py
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers.tiny_ppo import make_config, make_trainer, weights, write_policy

from rlhf import train_ppo
from rlhf.config import InputError, check
from rlhf.metrics import METRICS, read_jsonl
from rlhf.ppo.rollout import minibatches
from rlhf.ppo.trainer import advantage_metrics

LOSSES = {
    "gae": {"entropy_coef": 0.1, "whiten_rewards": True, "scale_scores": True},
    "whitened scores": {"whiten_scores": True, "kl_in": "loss", "kl_estimator": "k3"},
    "reinforce_pp": {"advantage": "reinforce_pp"},
}


def update(policy_dir, folder, garbage=0.0, **ppo):
    """One update whose cut responses have other numbers, by `garbage`; metrics, and the weights."""
    config = make_config(policy_dir, folder, missing_eos_penalty=None, **ppo)
    trainer = make_trainer(config, folder)
    rollout = trainer.collect()
    cut = ~rollout.finished
    assert 0 < cut.sum() < len(rollout)
    rollout.scores[cut] += garbage
    for name in ("logprobs", "ref_logprobs", "values"):
        tensor = getattr(rollout, name)
        tensor[cut] += garbage * rollout.response_mask[cut]
    batch = trainer.estimate_advantages(rollout, *trainer.shape_rewards(rollout))
    metrics = trainer.updater.run(batch, 0, trainer.kl_coef)
    metrics |= advantage_metrics(batch, trainer.actors.critic is not None)
    critic = trainer.actors.critic
    models = [trainer.actors.policy, *([] if critic is None else [critic])]
    return metrics, torch.cat([p.detach().flatten() for m in models for p in m.parameters()])


@pytest.mark.parametrize("kind", LOSSES)
def test_a_cut_response_has_no_effect_on_the_update(policy_dir, tmp_path, kind):
    def both(masked):
        knobs = LOSSES[kind] | {"mask_truncated": masked}
        return [update(policy_dir, tmp_path, garbage, **knobs) for garbage in (0.0, 0.5)]

    (metrics, trained), (other_metrics, other) = both(True)
    assert metrics == other_metrics and torch.equal(trained, other)
    (_, trained), (_, other) = both(False)
    assert not torch.equal(trained, other)


def test_losses_are_means_over_the_tokens_of_finished_responses(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path, mask_truncated=True), tmp_path)
    rollout = trainer.collect()
    rollout = trainer.estimate_advantages(rollout, *trainer.shape_rewards(rollout))
    kept = rollout.response_mask & rollout.finished[:, None]
    whitened = rollout.advantages[kept].double()
    torch.testing.assert_close(float(whitened.mean()), 0.0, rtol=0, atol=1e-6)
    torch.testing.assert_close(float(whitened.std(unbiased=False)), 1.0, rtol=1e-5, atol=0)
    # before a step the ratio is 1 and the critic as it was: both losses are known from the rollout
    stats = trainer.updater.accumulate(rollout, torch.arange(len(rollout)), 0, 0.0)
    expected = {
        "policy_loss": -rollout.advantages[kept].mean(),
        "value_loss": 0.5 * (rollout.values - rollout.returns)[kept].square().mean(),
        "ratio": torch.tensor(1.0),
    }
    for name, value in expected.items():
        torch.testing.assert_close(stats[name], float(value), rtol=1e-5, atol=1e-6)


def test_a_minibatch_of_cut_responses_makes_no_step_and_is_counted(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path, mask_truncated=True), tmp_path)
    rollout = trainer.collect()
    first = minibatches(trainer.config.ppo, (trainer.config.seed, 0, 0), torch.device("cpu"))[0]
    rollout.finished[first] = False
    rollout.loss_mask[first] = False
    assert rollout.finished.any()
    batch = trainer.estimate_advantages(rollout, *trainer.shape_rewards(rollout))
    metrics = trainer.updater.run(batch, 0, trainer.kl_coef)
    assert metrics["skipped_minibatches"] >= 1
    assert metrics["skipped_minibatches"] + metrics["optimizer_steps"] == 4
    assert "skipped_minibatches" in METRICS


def test_a_run_whose_responses_are_all_cut_trains_nothing_and_ends(tmp_path):
    directory = write_policy(tmp_path / "policy")
    settings = directory / "generation_config.json"
    values = json.loads(settings.read_text())
    settings.write_text(json.dumps(values | {"eos_token_id": values["eos_token_id"][0]}))
    config = make_config(directory, tmp_path, mask_truncated=True, num_updates=2, response_length=1)
    config.ppo.ema_decay, config.ppo.scale_scores = 0.9, True
    trainer = make_trainer(config, tmp_path)
    before = weights(trainer)
    assert trainer.step()["optimizer_steps"] == 0 and torch.equal(weights(trainer), before)
    train_ppo(config)
    rows = [row for row in read_jsonl(config.stage_dir("ppo") / "metrics.jsonl") if "kl" in row]
    assert [row["skipped_minibatches"] for row in rows] == [4, 4]
    numbers = [value for row in rows for value in row.values() if value is not None]
    assert all(math.isfinite(value) for value in numbers)


def test_a_group_baseline_with_whitened_rewards_is_refused(policy_dir, tmp_path):
    knobs = {"advantage": "rloo", "samples_per_prompt": 2, "mask_truncated": True}
    check(make_config(policy_dir, tmp_path, **knobs))
    with pytest.raises(InputError, match="ppo.mask_truncated=true.*set ppo.whiten_rewards=false"):
        check(make_config(policy_dir, tmp_path, **knobs, whiten_rewards=True))
