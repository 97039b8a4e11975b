"""Each option of the algorithm does what its paper says, seen in the loop itself.

The formulas are tested in test_functional_*.py; here: that the loop hands them the right tensors,
and that the default leaves them off.
"""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.tiny_ppo import make_config, make_trainer, move_policy, weights, write_prompts
from safetensors.torch import load_file

from rlhf import train_ppo
from rlhf.config import (
    InputError,
    PPOConfig,
    PPOStageConfig,
    ScorerComponent,
    ScorerConfig,
    learning_rates,
)
from rlhf.functional import adaptive_kl_coef
from rlhf.metrics import read_jsonl
from rlhf.models import load_policy
from rlhf.ppo.evaluation import response_texts
from rlhf.ppo.rollout import policy_logprobs
from rlhf.ppo.update import text_loss
from rlhf.tokenizer import load_tokenizer


def step_once(config, folder, change=None):
    """Metrics and trainer after one update."""
    trainer = make_trainer(config, folder)
    if change is not None:
        change(trainer)
    return trainer.step(), trainer


def test_every_option_is_off_or_as_in_instructgpt_by_default():
    ppo = PPOConfig()
    assert (ppo.kl_in, ppo.kl_estimator, ppo.kl_target) == ("reward", "k1", None)
    assert (ppo.advantage, ppo.samples_per_prompt) == ("gae", 1)
    assert not (ppo.scale_scores or ppo.whiten_rewards or ppo.entropy_coef)
    assert not (ppo.whiten_scores or ppo.lr_warmup_updates or ppo.weight_decay)
    assert ppo.clip_scores is ppo.dual_clip is ppo.ema_decay is ppo.target_kl is None


def test_the_published_settings_are_the_defaults():
    """N and N+: table of hyper-parameters; IG: appendix C.4 for the KL coefficient's order."""
    ppo = PPOConfig()
    assert (ppo.gamma, ppo.lam, ppo.cliprange, ppo.cliprange_value) == (1.0, 0.95, 0.2, 0.2)
    assert (ppo.vf_coef, ppo.num_ppo_epochs, ppo.num_mini_batches) == (0.1, 4, 1)
    assert learning_rates(PPOStageConfig())["ppo.learning_rate"] == 3e-6
    assert (ppo.lr_schedule, ppo.adam_epsilon) == ("linear", 1e-5)
    assert (ppo.kl_coef, ppo.adam_betas) == (0.05, [0.9, 0.999])
    assert PPOStageConfig().eos_penalty == -1.0


def test_python_scorers_alone_get_no_penalty_unless_it_is_set():
    learned, own = ScorerComponent("runs/a/reward/final"), ScorerComponent("my_module.score")
    for scorer, expected in (
        (ScorerConfig("my_module.score"), None),
        (ScorerConfig(components=[own, ScorerComponent("python:m.f")]), None),
        (ScorerConfig(components=[own, learned]), -1.0),
        (ScorerConfig("runs/a/reward/final"), -1.0),
    ):
        assert PPOStageConfig(scorer=scorer).eos_penalty == expected
        assert (
            PPOStageConfig(scorer=scorer, ppo=PPOConfig(missing_eos_penalty=-3)).eos_penalty == -3
        )


def test_the_optimisers_are_adam_with_the_configured_epsilon_and_a_linear_decay(
    policy_dir, tmp_path
):
    config = make_config(policy_dir, tmp_path, num_updates=4, adam_epsilon=1e-4)
    trainer = make_trainer(config, tmp_path)
    rates = [trainer.step()["learning_rate"] for _ in range(4)]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    for optimizer in trainer.updater.optimizers.values():
        assert isinstance(optimizer, torch.optim.AdamW)
        for group in optimizer.param_groups:
            assert group["eps"] == 1e-4 and group["weight_decay"] == 0.0
            assert group["lr"] == pytest.approx(0.25e-3)


def test_policy_and_critic_warm_up_together_and_the_rates_are_logged(policy_dir, tmp_path):
    config = make_config(
        policy_dir, tmp_path, num_updates=3, lr_warmup_updates=1, lr_warmup_start=0.2
    )
    config.critic.learning_rate = 1e-2
    trainer = make_trainer(config, tmp_path)
    for factor in (0.2, 1.0, 0.5):
        metrics = trainer.step()
        assert metrics["learning_rate"] == pytest.approx(factor * 1e-3)
        assert metrics["critic_learning_rate"] == pytest.approx(factor * 1e-2)
        for name, rate in (("policy", 1e-3), ("critic", 1e-2)):
            for group in trainer.updater.optimizers[name].param_groups:
                assert group["lr"] == pytest.approx(factor * rate)


def test_weight_decay_shrinks_the_matrices_of_both_models_and_nothing_else(tmp_path):
    source = tmp_path / "neox"
    tokenizer = tiny_tokenizer()
    tiny_model("gpt_neox", tokenizer).save_pretrained(source)  # with biases
    tokenizer.save_pretrained(source)
    config = make_config(source, tmp_path, weight_decay=0.1)
    config.critic.learning_rate = 1e-2
    trainer = make_trainer(config, tmp_path)
    torch.nn.init.ones_(trainer.actors.critic.model.score.weight)  # a new head is 0
    for name, rate in (("policy", 1e-3), ("critic", 1e-2)):
        parameters = dict(getattr(trainer.actors, name).named_parameters())
        before = {key: p.detach().clone() for key, p in parameters.items()}
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)  # Adam itself does not move
        trainer.updater.optimizers[name].step()
        kept = [key for key, p in parameters.items() if torch.equal(p, before[key])]
        assert kept == [key for key in parameters if key.endswith("bias") or "norm" in key]
        assert any("attention.dense.bias" in key for key in kept)
        for key in parameters.keys() - set(kept):
            torch.testing.assert_close(parameters[key], before[key] * (1 - 0.1 * rate))


def test_adam_uses_the_configured_betas_in_both_models(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path, adam_betas=[0.5, 0.75])
    trainer = make_trainer(config, tmp_path)
    for name in ("policy", "critic"):
        parameter = next(getattr(trainer.actors, name).parameters())
        before = parameter.detach().clone()
        for gradient in (1.0, -2.0):
            parameter.grad = torch.full_like(parameter, gradient)
            trainer.updater.optimizers[name].step()
        # after 1: m 0.5, v 0.25, corrected 1 and 1; after -2: m 0.25 - 1 = -0.75 / (1 - 0.25) = -1,
        # v 0.1875 + 1 = 1.1875 / (1 - 0.5625) = 19 / 7
        moved = -1e-3 * (1 / (1 + 1e-5) - 1 / ((19 / 7) ** 0.5 + 1e-5))
        torch.testing.assert_close(
            parameter - before, torch.full_like(before, moved), rtol=1e-3, atol=0
        )


# --- KL -------------------------------------------------------------------------------------------


def test_adaptive_kl_moves_once_per_rollout_by_that_rollouts_kl(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path, kl_target=0.1, kl_horizon=100, kl_coef=0.2)
    trainer = make_trainer(config, tmp_path)
    move_policy(trainer)
    used = []
    for _ in range(3):
        expected = trainer.kl_coef
        metrics = trainer.step()
        assert metrics["kl_coef"] == expected
        used.append(metrics)
        assert trainer.kl_coef == adaptive_kl_coef(expected, metrics["kl"], 0.1, 100, 8)
    assert used[0]["kl"] > 0.12  # so the first move is up by its cap: 0.2 * 8 / 100
    assert math.isclose(used[1]["kl_coef"], 0.2 * 1.016)


def test_a_fixed_coefficient_stays(policy_dir, tmp_path):
    _, trainer = step_once(make_config(policy_dir, tmp_path), tmp_path, move_policy)
    assert trainer.kl_coef == 0.05


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_in_the_loss_is_its_mean_over_tokens_and_leaves_the_reward(
    policy_dir, tmp_path, estimator
):
    config = make_config(policy_dir, tmp_path, kl_in="loss", kl_estimator=estimator, kl_coef=0.7)
    trainer = make_trainer(config, tmp_path)
    move_policy(trainer)
    rollout = trainer.collect()
    kl, rewards = trainer.shape_rewards(rollout)
    scores = rollout.final_scores(config.eos_penalty)
    torch.testing.assert_close(rewards.sum(dim=1), scores, rtol=0, atol=0)
    batch = trainer.estimate_advantages(rollout, kl, rewards)
    batch.advantages.zero_()
    trainer.updater.accumulate(batch, torch.arange(8), 0, kl_coef=0.7)
    policy = trainer.actors.policy
    actual = torch.cat([p.grad.flatten() for p in policy.parameters()])
    policy.zero_grad()
    part, mask = rollout, rollout.response_mask
    logprobs, _ = policy_logprobs(policy, part, trainer.sampling)
    gap = (logprobs - part.ref_logprobs)[mask]
    kl = gap.square() / 2 if estimator == "k2" else (-gap).exp() - 1 + gap
    (0.7 * kl.mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert expected.norm() > 0.01
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


def test_gradient_with_kl_in_the_loss_ignores_what_stands_under_the_mask(policy_dir, tmp_path):
    gradients = []
    for garbage in (0.0, -300.0):
        config = make_config(policy_dir, tmp_path, kl_in="loss", kl_estimator="k3", kl_coef=1.0)
        trainer = make_trainer(config, tmp_path)
        rollout = trainer.collect()
        batch = trainer.estimate_advantages(rollout, *trainer.shape_rewards(rollout))
        moved = batch.ref_logprobs.where(batch.response_mask, garbage) - 0.1
        batch = dataclasses.replace(batch, ref_logprobs=moved)
        trainer.updater.accumulate(batch, torch.arange(8), 0, kl_coef=1.0)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.actors.policy.parameters()]))
    assert gradients[0].isfinite().all()
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


# --- Scores and rewards ---------------------------------------------------------------------------


def test_scores_are_scaled_by_all_scores_so_far_and_then_clipped(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path, scale_scores=True, clip_scores=1.5, kl_coef=0.0)
    trainer = make_trainer(config, tmp_path)
    seen = []
    for trainer.update in (0, 1):
        rollout = trainer.collect()
        scores = rollout.final_scores(config.eos_penalty)
        seen.append(scores.double())
        rewards = trainer.shape_rewards(rollout)[1]
        scaled = scores / torch.cat(seen).std(unbiased=False).float()
        torch.testing.assert_close(rewards.sum(dim=1), scaled.clamp(-1.5, 1.5))
    assert (scaled.abs() > 1.5).any() and (scaled.abs() < 1.5).any()


def test_equal_scores_are_not_scaled_by_zero(policy_dir, tmp_path):
    def constant(trainer):
        trainer.actors.scorer = lambda prompts, responses: [2.0] * len(responses)

    config = make_config(policy_dir, tmp_path, scale_scores=True, missing_eos_penalty=None)
    assert step_once(config, tmp_path, constant)[0]["reward"] == 2.0


def test_whitened_scores_are_those_of_the_whole_rollout_then_penalised_then_clipped(
    policy_dir, tmp_path
):
    """One number per response in any batch; the penalty replaces it, and does not count."""
    for batches in ((1, 2), (8, 8)):
        config = make_config(policy_dir, tmp_path, whiten_scores=True, kl_coef=0.0)
        config.ppo.missing_eos_penalty, config.ppo.clip_scores = -1.25, 1.3
        config.ppo.micro_batch_size, config.ppo.rollout_batch_size = batches
        trainer = make_trainer(config, tmp_path)
        rollout = trainer.collect()
        texts = response_texts(rollout, trainer.actors.tokenizer, trainer.prompts_of_update())
        raw = torch.tensor([len(text) / 10 for text in texts], dtype=torch.float64)
        torch.testing.assert_close(rollout.scores.double(), raw, rtol=1e-6, atol=0)
        expected = (raw - raw.mean()) / raw.std(unbiased=False)
        assert 0 < rollout.finished.sum() < 8 and expected[rollout.finished].abs().max() > 1.3
        expected = torch.where(rollout.finished, expected, -1.25).clamp(-1.3, 1.3).float()
        rewards = trainer.shape_rewards(rollout)[1]
        torch.testing.assert_close(rewards.sum(dim=1), expected, rtol=1e-5, atol=1e-5)


def test_whitened_scores_leave_the_metrics_and_the_evaluation_raw(policy_dir, tmp_path):
    rows = {}
    for whitened in (False, True):
        config = make_config(policy_dir, tmp_path, num_updates=1, whiten_scores=whitened)
        config.run_name, config.ppo.missing_eos_penalty = f"whitened-{whitened}", None
        config.evaluation.every = 1
        directory = train_ppo(config).directory.parent
        rows[whitened] = read_jsonl(directory / "metrics.jsonl")
    first = [rows[whitened][0] for whitened in (False, True)]
    assert "eval_score" in first[0] and first[0] == first[1]
    plain, other = rows[False][1], rows[True][1]
    for name in ("score", "score_std", "finished_score"):
        assert plain[name] == other[name]
    assert other["reward"] == pytest.approx(0.0, abs=1e-5) and plain["reward"] > 0.1


def test_whitening_refuses_rewards_per_token_with_the_way_out(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path, whiten_scores=True), tmp_path)
    rollout = trainer.collect()
    rollout.dense_rewards[0, 0] = 0.1
    with pytest.raises(InputError, match="rewards per token; set it to false .ppo.scale_scores"):
        trainer.shape_rewards(rollout)


def test_whitened_rewards_have_unit_variance_and_their_old_mean(policy_dir, tmp_path):
    rewards = {}
    for whitened in (False, True):
        config = make_config(policy_dir, tmp_path, whiten_rewards=whitened)
        trainer = make_trainer(config, tmp_path)
        rollout = trainer.collect()
        rewards[whitened] = trainer.shape_rewards(rollout)[1][rollout.response_mask].double()
    scaled = (rewards[False] - rewards[False].mean()) / rewards[False].std(unbiased=False)
    expected = scaled + rewards[False].mean()
    torch.testing.assert_close(rewards[True], expected, rtol=1e-4, atol=1e-5)


# --- Loss -----------------------------------------------------------------------------------------


def test_dual_clip_holds_the_loss_of_a_token_with_a_large_ratio(policy_dir, tmp_path):
    losses = {}
    for dual_clip in (None, 3.0):
        config = make_config(policy_dir, tmp_path, dual_clip=dual_clip)
        trainer = make_trainer(config, tmp_path)
        rollout = trainer.collect()
        batch = trainer.estimate_advantages(rollout, *trainer.shape_rewards(rollout))
        batch.advantages.fill_(-1.0)
        batch.logprobs.sub_(2.0)  # every ratio is e^2 = 7.4
        stats = trainer.updater.accumulate(batch, torch.arange(8), 0, 0.0)
        losses[dual_clip] = stats["policy_loss"]
        assert stats["dual_clip_fraction"] == (0.0 if dual_clip is None else 1.0)
    assert losses[None] == pytest.approx(math.exp(2), rel=1e-4)
    assert losses[3.0] == pytest.approx(3.0, rel=1e-5)


def test_value_clipping_can_be_switched_off(policy_dir, tmp_path):
    for cliprange, clipped in ((0.2, True), (None, False)):
        config = make_config(policy_dir, tmp_path, cliprange_value=cliprange)
        config.critic.learning_rate = 3e-2
        assert (step_once(config, tmp_path)[0]["value_clip_fraction"] > 0) == clipped


def test_entropy_bonus_raises_entropy(policy_dir, tmp_path):
    entropy = {}
    for coef in (0.0, 1.0):
        config = make_config(policy_dir, tmp_path, entropy_coef=coef, batch_size=16)
        trainer = make_trainer(config, tmp_path)
        entropy[coef] = [trainer.step()["entropy"] for _ in range(6)]
    assert entropy[1.0][-1] > entropy[0.0][-1] + 0.1


def test_critic_warm_up_does_not_run_the_policy_in_training(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path)
    config.critic.warmup_updates = 1
    trainer = make_trainer(config, tmp_path)
    first, second = trainer.step(), trainer.step()
    assert "value_loss" in first and "policy_loss" not in first and "grad_norm" not in first
    assert "policy_loss" in second


# --- PPO-ptx --------------------------------------------------------------------------------------


def with_texts(config, tmp_path, coef=1.0, count=6):
    """Turn ptx on, with texts of different lengths; return the rows."""
    rows = [{"text": "light green river " * (1 + i % 3) + str(i)} for i in range(count)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.ptx = dataclasses.replace(
        config.ptx, coef=coef, path=str(path), batch_size=4, max_length=32
    )
    return rows


def test_ptx_gradient_is_that_of_the_mean_over_tokens_for_every_micro_batch(policy_dir, tmp_path):
    tokenizer = load_tokenizer(make_config(policy_dir, tmp_path).model)
    texts = [tokenizer(t)["input_ids"] for t in ("light green", "river stone cloud paper", "a b")]
    gradients = []
    for size in (1, 2, 8):
        model = load_policy(make_config(policy_dir, tmp_path).model, tokenizer)
        total = sum(len(t) - 1 for t in texts)
        for start in range(0, len(texts), size):
            text_loss(model, texts[start : start + size], total).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    model = load_policy(make_config(policy_dir, tmp_path).model, tokenizer)
    nll = torch.zeros(())
    for text in texts:  # one by one, without padding, by transformers itself
        ids = torch.tensor([text])
        nll = nll + model(ids, labels=ids).loss * (len(text) - 1)
    (nll / total).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    for gradient in gradients:
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_ptx_keeps_the_text_likely_and_does_not_touch_a_run_without_it(policy_dir, tmp_path):
    losses = {}
    for coef in (0.0, 10.0):
        config = make_config(policy_dir, tmp_path, num_updates=6)
        config.run_name = f"ptx-{coef:g}"
        rows = with_texts(config, tmp_path, coef=coef)
        result = train_ppo(config)
        tokenizer = load_tokenizer(config.model)
        source = dataclasses.replace(config.model, path=str(result.directory))
        model = load_policy(source, tokenizer)
        texts = [tokenizer(row["text"])["input_ids"][:32] for row in rows]
        losses[coef] = text_loss(model, texts, sum(len(t) - 1 for t in texts)).item()
        metrics = (result.directory.parent / "metrics.jsonl").read_text()
        assert ("ptx_loss" in metrics) == (coef > 0)
    assert losses[10.0] < losses[0.0] - 1.0


def test_ptx_texts_are_drawn_anew_at_every_step_and_the_same_after_a_resume(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path)
    with_texts(config, tmp_path, count=40)
    texts = [[3 + i, 4 + i, 5 + i] for i in range(40)]
    trainer = make_trainer(config, tmp_path)
    drawn = []

    def remember(model, part, denominator):
        drawn[-1].extend(t[0] - 3 for t in part)
        return text_loss(model, part, denominator)

    trainer.updater.texts = texts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.ppo.update.text_loss", remember)
        for update, step in ((0, 0), (0, 1), (1, 0), (0, 1)):
            drawn.append([])
            trainer.updater.accumulate_ptx(None, step, update)  # no batch: the loss is good
    assert drawn[1] == drawn[3]
    assert len(set(drawn[0] + drawn[1] + drawn[2])) == 12  # one pass visits each text once


def test_ptx_without_text_or_with_text_of_nothing_is_refused(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path)
    config.ptx.coef = 1.0
    with pytest.raises(InputError, match="ptx.path: file or Hub name of the text"):
        train_ppo(config)
    with_texts(config, tmp_path)
    config.ptx.max_length = 1000
    with pytest.raises(InputError, match="ptx.max_length=1000 exceeds the model's context of 128"):
        train_ppo(config)
    config.ptx = dataclasses.replace(
        config.ptx, max_length=32, path=str(write_prompts(tmp_path / "other.jsonl"))
    )
    with pytest.raises(InputError, match="row 1 has the columns prompt.*The nearest is text"):
        train_ppo(config)


# --- Averaged weights -----------------------------------------------------------------------------


def test_averaged_weights_follow_the_recursion_over_optimiser_steps(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path, ema_decay=0.9, num_ppo_epochs=1, num_mini_batches=1)
    trainer = make_trainer(config, tmp_path)
    policy = trainer.actors.policy
    expected = {n: p.detach().double().clone() for n, p in policy.named_parameters()}
    for _ in range(3):
        trainer.step()
        for name, parameter in policy.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * parameter.detach().double()
    averages = trainer.updater.averages
    for name, value in expected.items():
        torch.testing.assert_close(averages[name].double(), value, rtol=1e-5, atol=1e-7)
    now = weights(trainer).clone()
    with trainer.updater.averaged_weights():
        inside = dict(policy.named_parameters())
        assert all(torch.equal(inside[name], averages[name]) for name in averages)
        assert not torch.equal(weights(trainer), now)
    assert torch.equal(weights(trainer), now)


def test_final_holds_the_averaged_weights(policy_dir, tmp_path):
    finals = []
    for decay in (None, 0.992):
        config = make_config(policy_dir, tmp_path, ema_decay=decay)
        config.run_name, config.evaluation.select = f"ema-{decay}", "last"
        directory = train_ppo(config).directory
        finals.append(load_file(directory / "model.safetensors"))
    start = load_file(policy_dir / "model.safetensors")
    moved = [sum(float((f[n] - start[n]).norm()) for n in start) for f in finals]
    assert 0 < moved[1] < 0.2 * moved[0]  # 16 steps of 0.008 each
