"""The PPO loop: invariances, guards, resume, and that it learns what it is told to learn."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.families import response_logits
from helpers.tiny_ppo import count_ascii, crashed_and_resumed, make_config, make_trainer, weights
from safetensors.torch import load_file

import rlhf.ppo.trainer as ppo_trainer
from rlhf import PPOTrainer, train_ppo
from rlhf.config import InputError, PeftConfig
from rlhf.functional import token_logprobs
from rlhf.ppo.rollout import stream_rows
from rlhf.ppo.update import over_steps


def test_first_minibatch_has_ratio_one_and_kl_zero_although_dropout_is_configured(
    policy_dir, tmp_path
):
    trainer = make_trainer(make_config(policy_dir, tmp_path), tmp_path)
    trainer.actors.policy.train()  # as user code might; dropout must stay off
    trainer.actors.reference.train()
    metrics = trainer.step()
    assert metrics["first_ratio_deviation"] == 0.0
    assert metrics["kl"] == 0.0 and metrics["kl_k3"] == 0.0
    assert metrics["sampler_gap"] < 1e-5


def test_lora_starts_from_the_reference_and_leaves_the_base_alone(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path)
    config.peft = PeftConfig(enabled=True, r=4, dropout=0.5)
    trainer = make_trainer(config, tmp_path)
    frozen = {n: p.clone() for n, p in trainer.actors.policy.named_parameters() if "lora" not in n}
    first = trainer.step()
    assert first["kl"] == 0.0 and first["first_ratio_deviation"] == 0.0
    second = trainer.step()
    assert second["kl_k3"] > 0.0 and second["first_ratio_deviation"] == 0.0
    now = dict(trainer.actors.policy.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in frozen.items())


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 8])
def test_update_does_not_depend_on_the_micro_batch_size(policy_dir, tmp_path, micro_batch_size):
    """Two updates with responses of unequal lengths differ by 1e-5 of what they change."""
    results = []
    for size in (4, micro_batch_size):
        config = make_config(policy_dir, tmp_path, micro_batch_size=size)
        trainer = make_trainer(config, tmp_path)
        start = weights(trainer)
        metrics = [trainer.step() for _ in range(2)]
        assert all(m["optimizer_steps"] == 4 for m in metrics)
        assert metrics[0]["response_length"] < metrics[0]["response_length_max"]
        for optimizer in trainer.updater.optimizers.values():
            assert {float(s["step"]) for s in optimizer.state.values()} == {8.0}
        results.append((weights(trainer) - start, metrics[-1]))
    (expected, plain), (actual, other) = results
    assert expected.norm() > 1e-3
    assert (actual - expected).norm() / expected.norm() < 1e-5
    for name in ("policy_loss", "value_loss", "approx_kl", "grad_norm", "critic_grad_norm"):
        assert math.isclose(plain[name], other[name], rel_tol=1e-5, abs_tol=1e-6), name


def test_gradient_of_a_minibatch_does_not_depend_on_the_micro_batch_size(policy_dir, tmp_path):
    gradients = []
    for size in (1, 8):
        config = make_config(policy_dir, tmp_path, micro_batch_size=size)
        trainer = make_trainer(config, tmp_path)
        rollout = trainer.collect()
        generator = torch.Generator().manual_seed(0)
        rollout.logprobs.add_(0.3 * torch.randn(rollout.logprobs.shape, generator=generator))
        batch = trainer.estimate_advantages(rollout, *trainer.shape_rewards(rollout))
        assert len(set(rollout.lengths.tolist())) > 1  # unequal lengths, or the test shows little
        trainer.updater.accumulate(batch, torch.arange(8), 0, 0.0)
        parameters = [*trainer.actors.policy.parameters(), *trainer.actors.critic.parameters()]
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_the_first_ratio_may_be_off_in_either_direction():
    falls, rises = {"ratio_max": 1.0, "ratio_min": 0.75}, {"ratio_max": 1.5, "ratio_min": 1.0}
    metrics = over_steps([falls, rises])
    assert metrics == {"ratio_max": 1.5, "ratio_min": 0.75, "first_ratio_deviation": 0.25}
    assert over_steps([rises, falls])["first_ratio_deviation"] == 0.5


def test_ppo_raises_the_score_and_does_not_with_advantages_zeroed(
    policy_dir, tmp_path, monkeypatch
):
    scores = {}
    for name in ("real", "zeroed"):
        if name == "zeroed":
            monkeypatch.setattr(ppo_trainer, "whiten", lambda x, mask: torch.zeros_like(x))
        config = make_config(
            policy_dir, tmp_path, batch_size=64, learning_rate=3e-3, kl_coef=0.0, num_updates=100
        )
        config.ppo.missing_eos_penalty, config.ppo.micro_batch_size = None, 32
        trainer = make_trainer(config, tmp_path, num_prompts=32)
        trainer.actors.scorer = count_ascii
        scores[name] = [trainer.step()["score"] for _ in range(16)]
    first = sum(scores["real"][:2] + scores["zeroed"][:2]) / 4
    # three seeds gave 1.7 to 2.1 times the first, and 1.0 with advantages zeroed
    assert sum(scores["real"][-2:]) / 2 > 1.4 * first, scores
    assert sum(scores["zeroed"][-2:]) / 2 < 1.2 * first, scores


def test_target_kl_abandons_the_rest_of_the_epochs(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path, target_kl=1e-6, learning_rate=1e-2)
    metrics = make_trainer(config, tmp_path).step()
    assert metrics["optimizer_steps"] == 1  # the first minibatch has KL 0, the second has not
    assert metrics["abandoned_epochs"] == 2


def test_critic_warm_up_keeps_the_policy_still(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path)
    config.critic.warmup_updates = 1
    trainer = make_trainer(config, tmp_path)
    policy = [p.clone() for p in trainer.actors.policy.parameters()]
    critic = [p.clone() for p in trainer.actors.critic.parameters()]
    trainer.step()
    assert all(map(torch.equal, policy, trainer.actors.policy.parameters()))
    assert not all(map(torch.equal, critic, trainer.actors.critic.parameters()))
    trainer.step()
    assert not all(map(torch.equal, policy, trainer.actors.policy.parameters()))


def test_non_finite_loss_stops_the_run_and_saves_the_batch(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path), tmp_path)
    rollout = trainer.collect()
    batch = trainer.estimate_advantages(rollout, *trainer.shape_rewards(rollout))
    batch.advantages[0, 0] = math.nan
    before = weights(trainer)
    with pytest.raises(InputError, match="policy_loss.* is not finite in update 1; got nan"):
        trainer.updater.run(batch, 0, 0.0)
    assert torch.equal(weights(trainer), before) or torch.isfinite(weights(trainer)).all()
    saved = load_file(tmp_path / "non_finite_batch_0.safetensors")
    assert saved["advantages"].isnan().any() and "response_ids" in saved


def test_old_logprobs_use_the_sampling_temperature(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path, temperature=0.5), tmp_path)
    rollout = trainer.collect()
    logits = response_logits(
        trainer.actors.policy,
        rollout.sequence_ids,
        rollout.sequence_mask,
        rollout.state_positions,
        trainer.sampling.forbidden,
    )
    expected = token_logprobs(logits.detach() / 0.5, rollout.response_ids)
    mask = rollout.response_mask
    torch.testing.assert_close(rollout.logprobs[mask], expected[mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rollout.sampler_logprobs[mask], expected[mask], rtol=1e-4, atol=1e-5)


def test_missing_eos_penalty_replaces_the_score(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path, missing_eos_penalty=-7.0), tmp_path)
    rollout = trainer.collect()
    assert not rollout.finished.all()
    scores = rollout.final_scores(-7.0)
    assert (scores[~rollout.finished] == -7.0).all()
    assert (scores[rollout.finished] == rollout.scores[rollout.finished]).all()
    assert trainer.step()["score"] == float(scores.mean())


def test_each_update_draws_new_random_numbers(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path), tmp_path, num_prompts=8)
    answers = []
    for trainer.update in (0, 1, 0):
        rollout = trainer.collect()
        prompts = [
            str(row[mask].tolist())
            for row, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)
        ]
        answers.append(dict(zip(prompts, rollout.response_ids.tolist(), strict=True)))
    assert answers[0] == answers[2]
    assert all(answers[0][prompt][:4] != answers[1][prompt][:4] for prompt in answers[0])


def test_prompt_stream_covers_every_prompt_once_per_pass_and_needs_no_state():
    rows = stream_rows(range(20), 10, key=(3,))
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10)) and rows[:10] != rows[10:]
    assert stream_rows(range(7, 13), 10, key=(3,)) == rows[7:13]


def read_metrics(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


# the checkpoint after the second update falls into the middle of the warm-up
WARM_UP = {"lr_warmup_updates": 3, "weight_decay": 0.1, "whiten_scores": True}
RESUMED = [
    pytest.param({}, id="plain"),
    pytest.param(WARM_UP, id="warm-up", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("knobs", RESUMED)
def test_resumed_run_equals_the_uninterrupted_run(policy_dir, tmp_path, monkeypatch, knobs):
    whole = train_ppo(make_config(policy_dir, tmp_path, **knobs))
    config = make_config(policy_dir, tmp_path, **knobs)
    resumed = crashed_and_resumed(config, monkeypatch)
    one, two = (load_file(result.directory / "model.safetensors") for result in (whole, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)
    folders = [result.directory.parent for result in (whole, resumed)]
    assert read_metrics(folders[0]) == read_metrics(folders[1])
    samples = [(folder / "samples.jsonl").read_text() for folder in folders]
    assert samples[0] == samples[1]


def test_a_checkpoint_left_half_written_does_not_stop_a_run(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path)
    (tmp_path / "runs/run/ppo/checkpoint-3.tmp").mkdir(parents=True)
    result = train_ppo(dataclasses.replace(config, resume="auto"))
    assert result.directory is not None


def test_same_seed_gives_the_same_metrics_and_another_seed_does_not(policy_dir, tmp_path):
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = make_config(policy_dir, tmp_path, num_updates=2)
        config.run_name, config.seed = name, seed
        runs.append(read_metrics(train_ppo(config).directory.parent))
    assert runs[0] == runs[1] != runs[2]


def test_interrupt_saves_a_checkpoint_and_says_how_to_continue(
    policy_dir, tmp_path, monkeypatch, capsys
):
    import signal

    step = PPOTrainer.step

    def press_ctrl_c(self):
        signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(PPOTrainer, "step", press_ctrl_c)
    result = train_ppo(make_config(policy_dir, tmp_path))
    assert result.directory is None
    assert (tmp_path / "runs/run/ppo/checkpoint-1/state.json").is_file()
    assert "resume=true" in capsys.readouterr().out


BAD = [
    ({"response_length": 128}, "leaves no room for a prompt in the model's context of 128"),
    ({"max_prompt_length": 120}, "exceed the model's context of 128"),
    ({"max_prompt_length": 1}, "max_prompt_length=1 leaves no row; raise it: the longest has 23"),
]


@pytest.mark.parametrize(("knobs", "message"), BAD)
def test_bad_lengths_and_sizes_are_refused_with_the_fix(policy_dir, tmp_path, knobs, message):
    with pytest.raises(InputError, match=message):
        train_ppo(make_config(policy_dir, tmp_path, **knobs))


def test_few_prompts_are_answered_several_times_in_each_update(policy_dir, tmp_path, capsys):
    config = make_config(policy_dir, tmp_path, batch_size=64, num_updates=1, save_rollouts=1)
    config.dataset.max_rows = 5
    train_ppo(config)
    assert "rollout: 5 prompts, 12.8 times each, at most" in capsys.readouterr().out
    file = tmp_path / "runs/run/ppo/rollouts/update-000001.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    counts = Counter(row["prompt"] for row in rows)
    assert sorted(counts.values()) == [12, 13, 13, 13, 13]
    assert len({row["response"] for row in rows}) > 32  # each answer is sampled by itself


def nan_scorer(prompts, responses):
    """Fail for the last response."""
    return [0.0] * (len(responses) - 1) + [math.nan]


def failing_scorer(prompts, responses):
    """Raise."""
    raise ConnectionError("no route to host")


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (nan_scorer, "returned nan for 1 of 4 responses"),
        (failing_scorer, "no route to host"),
        (lambda p, r: [1.0], "one score per response: expected shape"),
    ],
)
def test_a_bad_scorer_stops_the_run_with_the_cause(policy_dir, tmp_path, scorer, message):
    with pytest.raises(InputError, match=message):
        train_ppo(make_config(policy_dir, tmp_path), scorer=scorer)
