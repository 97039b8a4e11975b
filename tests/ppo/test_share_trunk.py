"""A value head on the policy's trunk: the numbers of two passes from one, a scaled gradient, and
runs that warm up, resume and save as others do.
"""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_ppo import crashed_and_resumed, make_config, make_trainer, move_policy
from safetensors.torch import load_file

from rlhf import train_ppo
from rlhf.config import PeftConfig
from rlhf.metrics import read_jsonl
from rlhf.models import ends_with_head
from rlhf.ppo.passes import policy_logprobs, policy_outputs, text_loss


def shared_config(policy_dir, folder, trunk_coef=1.0, **ppo):
    config = make_config(policy_dir, folder, **ppo)
    config.critic.share_trunk, config.critic.trunk_coef = True, trunk_coef
    return config


def make_shared(policy_dir, folder, trunk_coef=1.0, **ppo):
    """A trainer whose head is not 0, so that its gradient reaches the trunk."""
    trainer = make_trainer(shared_config(policy_dir, folder, trunk_coef, **ppo), folder)
    torch.manual_seed(0)
    torch.nn.init.normal_(trainer.actors.critic.linear.weight, std=0.3)
    return trainer


def batch_of(trainer):
    rollout = trainer.collect()
    return trainer.estimate_advantages(rollout, *trainer.shape_rewards(rollout))


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_values_are_the_head_on_the_states_before_each_token(policy_dir, tmp_path):
    trainer = make_shared(policy_dir, tmp_path)
    rollout, policy = trainer.collect(), trainer.actors.policy
    for row in range(len(rollout)):
        length = int(rollout.lengths[row])
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        ids = torch.cat([prompt, rollout.response_ids[row, :length]])[None]
        states = policy.model(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]
        head = trainer.actors.critic.linear
        expected = (states @ head.weight.T + head.bias)[:, 0].detach()
        torch.testing.assert_close(rollout.values[row, :length], expected, rtol=1e-4, atol=1e-5)
        assert not rollout.values[row, length:].any()
    logprobs, _ = policy_logprobs(policy, rollout, trainer.sampling)
    torch.testing.assert_close(rollout.logprobs, logprobs.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trunk_coef", [0.0, 0.25, 1.0])
def test_the_gradient_is_that_of_both_losses_with_a_share_of_the_value_loss(
    policy_dir, tmp_path, trunk_coef
):
    trainer = make_shared(policy_dir, tmp_path, trunk_coef, vf_coef=0.5)
    batch, actors, updater = batch_of(trainer), trainer.actors, trainer.updater
    updater.accumulate(batch, torch.arange(8), 0, 0.0)
    actual, of_head = gradients(actors.policy), gradients(actors.critic)

    def alone(use_values):
        """The gradient of one of the losses, from a forward pass of its own."""
        updater._zero_grad()
        actors.critic.trunk_coef = 1.0
        logprobs, _, values = policy_outputs(actors.reader, batch, trainer.sampling)
        mask = batch.loss_mask
        ratio = (logprobs - batch.logprobs).exp()
        loss = -(ratio * batch.advantages)[mask].mean()
        if use_values:
            loss = 0.5 * 0.5 * (values - batch.returns).square()[mask].mean() + 0.0 * loss
        loss.backward()
        return gradients(actors.policy), actors.critic

    of_policy, _ = alone(use_values=False)
    of_values, head = alone(use_values=True)
    assert of_values.norm() > 0.01 * of_policy.norm()
    expected = of_policy + trunk_coef * of_values
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(of_head, gradients(head), rtol=1e-3, atol=1e-5)


def test_an_update_makes_one_pass_where_two_models_make_two(policy_dir, tmp_path):
    counts = []
    for shares in (True, False):
        config = make_config(policy_dir, tmp_path)
        config.critic.share_trunk = shares
        trainer, read = make_trainer(config, tmp_path), []
        ends_with_head(trainer.actors.policy)  # measured once, which takes a forward pass

        def count(_, __, keywords, read=read):
            if keywords.get("use_cache") is False:
                read.append(len(keywords["input_ids"]))

        models = [trainer.actors.policy.model]
        models += [] if shares else [trainer.actors.critic.model.model]
        for model in models:
            model.register_forward_pre_hook(count, with_kwargs=True)
        trainer.step()
        counts.append(sum(read))
    assert counts == [8 * 3, 2 * 8 * 3]  # the rollout and two epochs


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_warm_up_trains_the_head_alone(policy_dir, tmp_path, lora):
    config = shared_config(policy_dir, tmp_path)
    config.critic.warmup_updates = 1
    if lora:
        config.peft = PeftConfig(enabled=True, r=4)
    trainer = make_trainer(config, tmp_path)
    policy = [p.clone() for p in trainer.actors.policy.parameters()]
    metrics = trainer.step()
    assert "policy_loss" not in metrics and metrics["critic_grad_norm"] > 0
    assert all(map(torch.equal, policy, trainer.actors.policy.parameters()))
    assert trainer.actors.critic.linear.weight.any()
    metrics = trainer.step()
    assert metrics["first_ratio_deviation"] == 0.0 and metrics["value_loss"] > 0
    assert not all(map(torch.equal, policy, trainer.actors.policy.parameters()))


def test_the_head_learns_the_returns_at_its_own_rate(policy_dir, tmp_path):
    config = shared_config(policy_dir, tmp_path, 0.0, num_updates=30)
    config.critic.learning_rate, config.ppo.vf_coef = 3e-2, 1.0
    config.critic.warmup_updates, config.ppo.lr_schedule = 30, "constant"
    trainer = make_trainer(config, tmp_path)
    losses = []
    for update in range(12):
        trainer.update = update % 2  # the same responses again
        losses.append(trainer.step()["value_loss"])
        assert trainer.updater.optimizers["critic"].param_groups[0]["lr"] == 3e-2
    assert losses[-1] < 0.5 * losses[0], losses


def test_texts_get_the_loss_of_the_policy_alone(policy_dir, tmp_path):
    trainer = make_shared(policy_dir, tmp_path)
    texts = [[5, 6, 7, 8], [9, 10]]
    shared = text_loss(trainer.updater.policy, texts, 4.0)
    plain = text_loss(trainer.actors.policy, texts, 4.0)
    torch.testing.assert_close(shared, plain, rtol=1e-6, atol=0)
    shared.backward()
    assert not trainer.actors.critic.linear.weight.grad.any()


def test_a_resumed_run_equals_the_uninterrupted_one_and_writes_no_critic(
    policy_dir, tmp_path, monkeypatch, capsys
):
    knobs = {"ema_decay": 0.9}
    whole = train_ppo(shared_config(policy_dir, tmp_path, **knobs))
    said = "values from a head on the policy's trunk (no critic/), 33 trainable"
    assert said in capsys.readouterr().out
    config = shared_config(policy_dir, tmp_path, **knobs)
    resumed = crashed_and_resumed(config, monkeypatch)
    one, two = (load_file(result.directory / "model.safetensors") for result in (whole, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)
    folders = [result.directory.parent for result in (whole, resumed)]
    rows = [read_jsonl(folder / "metrics.jsonl") for folder in folders]
    assert rows[0] == rows[1] and "explained_variance" in rows[0][-1]
    assert one.keys() == load_file(policy_dir / "model.safetensors").keys()  # no head in final/
    assert not any((folder / "critic").exists() for folder in folders)


def test_a_run_with_lora_and_the_preflight_ends(policy_dir, tmp_path):
    config = shared_config(policy_dir, tmp_path, num_updates=2, missing_eos_penalty=None)
    config.peft, config.preflight = PeftConfig(enabled=True, r=4), True
    config.critic.must_explain = None
    directory = train_ppo(config).directory
    assert "critic_steers" in read_jsonl(directory.parent / "metrics.jsonl")[-1]


def test_half_precision_gives_values_in_float32(policy_dir, tmp_path):
    trainer = make_shared(policy_dir, tmp_path)
    move_policy(trainer)
    rollout = trainer.collect()
    with torch.autocast("cpu", torch.bfloat16):
        _, _, values = policy_outputs(trainer.actors.reader, rollout, trainer.sampling)
    assert values.dtype == torch.float32
    assert (values.detach() - rollout.values).norm() < 0.1 * rollout.values.norm()
