"""The watchdog: each rule fires in a run that really goes wrong, and not in one that does not.

Most runs use the tiny random policy of `tiny_ppo`, whose distribution is far from flat, so that
single causes are easy to bring about.
"""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from helpers.tiny_ppo import make_config, make_trainer
from safetensors.torch import load_file

from rlhf import train_ppo
from rlhf.config import InputError
from rlhf.ppo.watchdog import RULES, Watchdog


def make_watchdog(config, tmp_path) -> Watchdog:
    """A watchdog of this run."""
    return Watchdog(config, tmp_path)


def fired(config, tmp_path, num_updates=1, change=None, **limits) -> set[str]:
    """Rules that fire in the last of some updates; only the rules in `limits` are on."""
    config.ppo.missing_eos_penalty = limits.pop("missing_eos_penalty", None)
    off = dict.fromkeys(dataclasses.asdict(config.watchdog))
    config.watchdog = dataclasses.replace(config.watchdog, **(off | limits))
    config.sampling.max_gap = None
    trainer, watchdog = make_trainer(config, tmp_path), make_watchdog(config, tmp_path)
    if change is not None:
        change(trainer)
    for update in range(1, num_updates + 1):
        names = watchdog.check(update, trainer.step())
    return names


def test_an_ordinary_run_is_silent_under_the_default_thresholds(policy_dir, tmp_path, capsys):
    config = make_config(policy_dir, tmp_path, learning_rate=1e-5, missing_eos_penalty=None)
    config.watchdog.explained_variance = None  # a fresh critic predicts nothing yet
    config.watchdog.eos_rate = None  # half of the random policy's responses do not end
    train_ppo(config)
    assert "watchdog" not in capsys.readouterr().err
    assert not (tmp_path / "runs/run/ppo/watchdog.jsonl").exists()


def test_dropout_in_the_policy_breaks_the_first_ratio(policy_dir, tmp_path):
    def add_dropout(trainer):
        for layer in trainer.actors.policy.model.layers:
            layer.mlp.register_forward_hook(
                lambda module, inputs, output: torch.nn.functional.dropout(output, 0.2)
            )

    config = make_config(policy_dir, tmp_path)
    assert fired(config, tmp_path, first_ratio=1e-3) == set()
    assert fired(config, tmp_path, change=add_dropout, first_ratio=1e-3) == {"first_ratio"}


@pytest.mark.parametrize("rule", ["ratio", "clip_fraction"])
def test_a_learning_rate_that_is_too_high_is_seen_by_its_ratios(policy_dir, tmp_path, rule):
    limit = {"ratio": 10.0, "clip_fraction": 0.3}[rule]
    for rate, expected in ((1e-5, set()), (3e-2, {rule})):
        config = make_config(policy_dir, tmp_path, learning_rate=rate)
        assert fired(config, tmp_path, **{rule: limit}) == expected


def test_a_ratio_far_below_one_counts_like_one_far_above(policy_dir, tmp_path):
    watchdog = make_watchdog(make_config(policy_dir, tmp_path), tmp_path)
    metrics = {"kl": 0.0, "kl_std": 0.0, "response_length": 1.0, "ratio_max": 1.0}
    assert "ratio" not in watchdog.check(1, metrics | {"ratio_min": 0.02})
    assert "ratio" in watchdog.check(2, metrics | {"ratio_min": 0.005})


def test_sampling_from_another_distribution_makes_kl_negative(policy_dir, tmp_path):
    """The reference prefers what top_k leaves over; the policy's log-probs are of everything."""

    def flatten_policy(trainer):
        with torch.no_grad():
            trainer.actors.policy.lm_head.weight.mul_(0.5)

    config = make_config(policy_dir, tmp_path, batch_size=16)
    assert fired(config, tmp_path, change=flatten_policy, negative_kl=3.0) == set()
    config = make_config(
        policy_dir, tmp_path, batch_size=16, top_k=3, allow_off_policy_sampling=True
    )
    assert fired(config, tmp_path, change=flatten_policy, negative_kl=3.0) == {"negative_kl"}


@pytest.mark.parametrize("batch_size", [2, 8, 64])
def test_kl_around_0_is_no_alarm_however_few_the_responses(policy_dir, tmp_path, batch_size):
    """An old policy that equals the reference but for noise: 4,000 updates of each size."""
    watchdog = make_watchdog(make_config(policy_dir, tmp_path, batch_size=batch_size), tmp_path)
    draws = torch.randn(4000, batch_size, generator=torch.Generator().manual_seed(0))
    alarms = 0
    for update, kl in enumerate(draws, start=1):
        metrics = {"kl": float(kl.mean()), "kl_std": float(kl.std(unbiased=False))}
        alarms += "negative_kl" in watchdog.check(update, metrics | {"response_length": 1.0})
    assert alarms <= 1
    far = {"kl": -1.0, "kl_std": 1e-3, "response_length": 1.0}
    assert ("negative_kl" in watchdog.check(5000, far)) == (batch_size > 2)


def test_a_run_without_penalty_spends_its_kl_budget_and_ends(policy_dir, tmp_path, capsys):
    config = make_config(policy_dir, tmp_path, learning_rate=1e-2, kl_coef=0.0, num_updates=20)
    config.watchdog.kl_budget = 3.0
    result = train_ppo(config)
    rows = [json.loads(r) for r in (tmp_path / "runs/run/ppo/metrics.jsonl").open()]
    kl = [row["kl"] for row in rows if "kl" in row]
    assert len(kl) < 20 and kl[-1] > 3.0 and all(value <= 3.0 for value in kl[:-1])
    assert result.directory is not None
    captured = capsys.readouterr()
    assert "over the budget of 3" in captured.err and "Raise ppo.kl_coef" in captured.err
    assert f"of {len(kl)} (" in captured.out  # which update final/ holds, of how many


def test_a_policy_that_is_pushed_to_one_answer_loses_its_entropy(policy_dir, tmp_path):
    config = make_config(
        policy_dir, tmp_path, batch_size=32, learning_rate=3e-2, kl_coef=0.0, micro_batch_size=32
    )
    assert fired(config, tmp_path, num_updates=1, entropy_drop=0.2) == set()
    assert fired(config, tmp_path, num_updates=12, entropy_drop=0.2) == {"entropy_drop"}


def test_a_critic_worse_than_a_constant_is_named_once_it_has_warmed_up(policy_dir, tmp_path):
    def make_noisy(trainer):
        generator = torch.Generator().manual_seed(0)
        torch.nn.init.normal_(
            trainer.actors.critic.model.score.weight, std=10.0, generator=generator
        )

    for warmup, expected in ((0, {"explained_variance"}), (1, set())):
        config = make_config(policy_dir, tmp_path)
        config.critic.warmup_updates, config.critic.learning_rate = warmup, 0.0
        assert fired(config, tmp_path, change=make_noisy, explained_variance=-0.5) == expected


def test_a_penalty_above_the_scores_of_finished_responses_is_named(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path)
    assert fired(config, tmp_path, missing_eos_penalty=-5.0) == set()
    assert fired(config, tmp_path, missing_eos_penalty=50.0) == {"missing_eos_penalty"}
    config.ppo.whiten_scores = True  # the penalty is then on another scale than the raw scores
    assert fired(config, tmp_path, missing_eos_penalty=50.0) == set()


def test_responses_that_do_not_end_are_named(policy_dir, tmp_path):
    for length, expected in ((60, set()), (2, {"eos_rate"})):
        config = make_config(policy_dir, tmp_path, response_length=length)
        assert fired(config, tmp_path, eos_rate=0.5) == expected


@pytest.mark.parametrize("penalty", [None, -1.0])
def test_lower_penalty_is_advised_where_there_is_one(penalty, policy_dir, tmp_path, capsys):
    config = make_config(policy_dir, tmp_path, missing_eos_penalty=penalty)
    metrics = {"eos_rate": 0.1, "response_length": 2.0, "kl": 0.0, "kl_std": 0.0}
    assert "eos_rate" in Watchdog(config, tmp_path).check(1, metrics)
    advised = "lower ppo.missing_eos_penalty=-1" in capsys.readouterr().err
    assert advised == (penalty is not None)


def shorter_is_better(prompts, responses):
    """A scorer that pays for brevity alone."""
    return [-len(response) / 10 for response in responses]


@pytest.mark.slow
def test_a_scorer_that_pays_for_length_shows_in_the_length(policy_dir, tmp_path):
    def replace_scorer(trainer):
        trainer.actors.scorer = shorter_is_better

    config = make_config(
        policy_dir,
        tmp_path,
        batch_size=32,
        micro_batch_size=32,
        response_length=60,
        learning_rate=1e-2,
        num_updates=100,
        kl_coef=0.0,
    )
    names = fired(config, tmp_path, num_updates=1, change=replace_scorer, length_drift=2.0)
    assert names == set()
    # with a critic that starts from zeros, the mean length is 14 after 16 updates, and 4 after 24
    names = fired(config, tmp_path, num_updates=24, change=replace_scorer, length_drift=2.0)
    assert names == {"length_drift"}


def test_scores_that_do_not_differ_are_named(policy_dir, tmp_path):
    def replace_scorer(trainer):
        trainer.actors.scorer = lambda prompts, responses: [0.7] * len(responses)

    config = make_config(policy_dir, tmp_path)
    assert fired(config, tmp_path, score_std=1e-4) == set()
    assert fired(config, tmp_path, change=replace_scorer, score_std=1e-4) == {"score_std"}


def test_scores_of_another_scale_show_in_the_gradient_norm(policy_dir, tmp_path):
    def replace_scorer(trainer):
        trainer.actors.scorer = lambda prompts, responses: [1e4 * len(r) for r in responses]

    config = make_config(policy_dir, tmp_path)
    assert fired(config, tmp_path, grad_norm=100.0) == set()
    assert fired(config, tmp_path, change=replace_scorer, grad_norm=100.0) == {"grad_norm"}


def test_a_sampler_that_sees_other_logits_than_training_is_named(policy_dir, tmp_path):
    def sample_wrongly(trainer):
        """As with a sampling engine that forgets the position of left-padded tokens."""

        def shift(module, arguments, keywords):
            if keywords.get("use_cache"):
                keywords["position_ids"] = keywords["position_ids"] * 2
            return arguments, keywords

        trainer.actors.policy.register_forward_pre_hook(shift, with_kwargs=True)

    config = make_config(policy_dir, tmp_path)
    assert fired(config, tmp_path, sampler_gap=0.5) == set()
    assert fired(config, tmp_path, change=sample_wrongly, sampler_gap=0.5) == {"sampler_gap"}


# --- What it leaves behind ------------------------------------------------------------------------


def test_it_warns_once_per_rule_and_writes_every_time(policy_dir, tmp_path, capsys):
    config = make_config(policy_dir, tmp_path, learning_rate=3e-2)
    train_ppo(config)
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in (tmp_path / "runs/run/ppo/watchdog.jsonl").open()]
    clipped = [row for row in rows if row["rule"] == "clip_fraction"]
    assert len(clipped) > 1 and all(row["value"] > row["limit"] == 0.3 for row in clipped)
    assert captured.err.count("watchdog.clip_fraction") == 1
    assert "lower ppo.learning_rate" in captured.err
    assert "watchdog" in captured.out and "clip_fraction" in captured.out  # the closing table


def test_what_it_compares_with_survives_a_resume(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path)
    whole, resumed = make_watchdog(config, tmp_path), make_watchdog(config, tmp_path)
    metrics = {"kl": 0.0, "kl_std": 1.0, "response_length": 10.0}
    whole.check(1, metrics)
    resumed.load_state(json.loads(json.dumps(whole.state())))
    assert "length_drift" in resumed.check(2, metrics | {"response_length": 21.0})


def test_every_threshold_in_the_configuration_has_its_rule(policy_dir, tmp_path):
    limits = make_watchdog(make_config(policy_dir, tmp_path), tmp_path).limits
    assert limits.keys() == RULES.keys()


@pytest.mark.parametrize("name", ["values", "logprobs"])
def test_a_rollout_with_a_number_that_is_not_finite_stops_the_run(policy_dir, tmp_path, name):
    trainer = make_trainer(make_config(policy_dir, tmp_path), tmp_path)
    model = trainer.actors.critic.model if name == "values" else trainer.actors.policy
    head = model.score if name == "values" else model.lm_head

    def spoil(module, inputs, output):
        # not while sampling, which reads one position at a time after the prompt
        return output * math.nan if not sampling[0] else output

    sampling = [False]
    if name == "logprobs":
        trainer.actors.policy.register_forward_pre_hook(
            lambda module, arguments, keywords: sampling.__setitem__(0, keywords["use_cache"]),
            with_kwargs=True,
        )
    head.register_forward_hook(spoil)
    with pytest.raises(InputError, match=f"{name}.* is not finite in update 1; .*batch is in"):
        trainer.step()
    assert load_file(tmp_path / "non_finite_batch_0.safetensors")[name].isnan().any()


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path), tmp_path)
    parameter = next(trainer.actors.policy.parameters())
    before = parameter.detach().clone()
    parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(InputError, match="grad_norm is not finite in update 1"):
        trainer.step()
    assert torch.equal(parameter, before)
    assert (tmp_path / "non_finite_batch_0.safetensors").is_file()
