"""Old log-probs from the first epoch's own forward pass, where no reward needs them earlier: the
numbers of a pass of their own, with one pass over the policy fewer.
"""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_ppo import make_config, make_trainer, move_policy

from rlhf import train_ppo
from rlhf.config import PeftConfig, PPOConfig
from rlhf.models import ends_with_head

IN_LOSS = {"kl_in": "loss", "kl_estimator": "k3", "num_mini_batches": 1}
GROUPS = {"samples_per_prompt": 2, "num_mini_batches": 1}
SHORT = [
    pytest.param(IN_LOSS, id="a critic"),
    pytest.param(IN_LOSS | GROUPS | {"advantage": "grpo", "target_kl": 1e-3}, id="grpo"),
    pytest.param(GROUPS | {"advantage": "rloo", "kl_coef": 0.0}, id="no KL"),
]
LONG = [
    pytest.param({"num_mini_batches": 1}, id="KL in the reward"),
    pytest.param(IN_LOSS | {"num_mini_batches": 2}, id="two minibatches"),
    pytest.param(IN_LOSS | {"mask_truncated": True}, id="masked"),
    pytest.param(IN_LOSS | {"save_rollouts": 1}, id="saved"),
]


def rows_read(trainer):
    """A list that grows by the number of rows of each forward pass of the policy in training."""
    read: list[int] = []

    def count(_, __, keywords):
        if keywords.get("use_cache") is False:
            read.append(len(keywords["input_ids"]))

    ends_with_head(trainer.actors.policy)  # measured once, which takes a forward pass
    trainer.actors.policy.register_forward_pre_hook(count, with_kwargs=True)
    return read


@pytest.mark.parametrize("knobs", SHORT)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_metrics_and_weights_are_those_of_a_pass_of_its_own(
    policy_dir, tmp_path, monkeypatch, knobs, lora
):
    results = []
    for is_short in (True, False):
        if not is_short:
            monkeypatch.setattr(PPOConfig, "first_epoch_reads", False)
        config = make_config(policy_dir, tmp_path, **knobs)
        config.ppo.num_ppo_epochs = 3
        if lora:  # the reference reads with the adapters off: its passes count as the policy's
            config.peft = PeftConfig(enabled=True, r=4)
        trainer = make_trainer(config, tmp_path)
        move_policy(trainer)
        read = rows_read(trainer)
        metrics = [trainer.step() for _ in range(2)]
        assert metrics[0]["first_ratio_deviation"] == metrics[1]["first_ratio_deviation"] == 0.0
        assert metrics[0]["kl_k3"] > 0 and metrics[0]["sampler_gap"] < 1e-4
        if "target_kl" not in knobs:
            passes = 3 + (not is_short) + lora
            assert sum(read) == 2 * 8 * passes
        results.append((metrics, [p.detach() for p in trainer.actors.policy.parameters()]))
    (short, one), (plain, other) = results
    assert short == [pytest.approx(row, rel=1e-5, abs=1e-7) for row in plain]
    for actual, expected in zip(one, other, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("knobs", LONG)
def test_where_log_probs_are_needed_earlier_the_policy_is_read_before(policy_dir, tmp_path, knobs):
    trainer = make_trainer(make_config(policy_dir, tmp_path, **knobs), tmp_path)
    assert trainer.reads_policy()
    read = rows_read(trainer)
    trainer.collect()
    assert sum(read) == 8


def test_an_update_that_trains_the_critic_alone_reads_the_policy(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path, **IN_LOSS)
    config.critic.warmup_updates = 1
    trainer = make_trainer(config, tmp_path)
    move_policy(trainer)
    read = rows_read(trainer)
    assert trainer.step()["kl_k3"] > 0 and sum(read) == 8
    assert not trainer.reads_policy()
    assert trainer.step()["kl_k3"] > 0 and sum(read) == 8 + 16


def test_the_stage_says_where_old_log_probs_come_from(policy_dir, tmp_path, capsys):
    for name, knobs in (("short", IN_LOSS), ("long", {})):
        config = make_config(policy_dir, tmp_path, num_updates=1, **knobs)
        config.run_name = name
        train_ppo(config)
        said = "of at most 3; the first epoch gives the old log-probs\n"
        assert (said in capsys.readouterr().out) == (name == "short")
