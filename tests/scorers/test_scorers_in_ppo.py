"""Scorers in PPO: rewards per token, components, critic and evaluation.

Run: python -m pytest tests/scorers/test_scorers_in_ppo.py
"""

from __future__ import annotations

import dataclasses
import os
import re

import pytest
import torch
from helpers.ports import held_port
from helpers.rows import rows_of
from helpers.runs import in_two_processes
from helpers.scorers import MEAN, STD, num_words, raw_scores, rendered, write_reward_model
from helpers.tiny_ppo import make_config, make_trainer
from safetensors.torch import load_file
from torch.testing import assert_close

from rlhf import train_ppo
from rlhf.config import InputError, ModelConfig, ScorerComponent, ScorerConfig, is_python
from rlhf.demo.world import build_tokenizer
from rlhf.ppo.rollout import component_scores
from rlhf.scorers import CombinedScorer, RewardModelScorer, load_scorer
from rlhf.tokenizer import load_tokenizer


def token_rewards(prompts, responses, response_ids):
    """Each token's reward: a hundredth of its id."""
    return [[token / 100 for token in ids] for ids in response_ids]


def expected_rewards(rollout):
    return (rollout.response_ids / 100).where(rollout.response_mask, 0.0)


def test_rewards_per_token_are_given_at_their_tokens(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path, kl_coef=0.0, missing_eos_penalty=None)
    trainer = make_trainer(config, tmp_path)
    trainer.actors.scorer = token_rewards
    rollout = trainer.collect()
    expected = expected_rewards(rollout)
    assert len(set(rollout.lengths.tolist())) > 1
    assert_close(rollout.dense_rewards, expected)
    assert_close(rollout.scores, expected.sum(dim=1))
    assert_close(trainer.shape_rewards(rollout)[1], expected, rtol=1e-5, atol=1e-5)


def test_an_unfinished_response_gets_the_penalty_beside_its_rewards_per_token(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path, kl_coef=0.0, missing_eos_penalty=-7.0)
    trainer = make_trainer(config, tmp_path)
    parts = {"tokens": token_rewards, "words": lambda p, r: [5.0] * len(r)}
    trainer.actors.scorer = CombinedScorer(parts, [1.0, 1.0])
    rollout = trainer.collect()
    finished = rollout.finished
    assert finished.any() and not finished.all()
    at_end = torch.where(finished, 5.0, -7.0)  # the score at the end is replaced, the rest stays
    expected = expected_rewards(rollout)
    assert_close(rollout.final_scores(-7.0), expected.sum(dim=1) + at_end, rtol=1e-5, atol=1e-5)
    expected[torch.arange(len(rollout)), rollout.lengths - 1] += at_end
    assert_close(trainer.shape_rewards(rollout)[1], expected, rtol=1e-5, atol=1e-5)
    components = component_scores(rollout, trainer.actors.scorer)
    assert_close(components["score/tokens"], expected_rewards(rollout).sum(dim=1))
    assert_close(components["score/words"], torch.full((len(rollout),), 5.0))


def test_short_responses_keep_all_their_components(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path, response_length=1), tmp_path)
    parts = {"tokens": token_rewards, "words": num_words}
    trainer.actors.scorer = CombinedScorer(parts, [1.0, 1.0])
    rollout = trainer.collect()
    part = rollout.select(torch.tensor([3, 0]))
    assert part.dense_rewards.shape == (2, 1) and part.component_scores.shape == (2, 2)
    assert_close(part.component_scores, rollout.component_scores[[3, 0]])


def test_scaling_and_clipping_hold_for_the_score_and_keep_the_sum(policy_dir, tmp_path):
    config = make_config(
        policy_dir,
        tmp_path,
        kl_coef=0.0,
        missing_eos_penalty=None,
        scale_scores=True,
        clip_scores=2.5,
    )
    trainer = make_trainer(config, tmp_path)
    trainer.actors.scorer = token_rewards
    rollout = trainer.collect()
    std = rollout.scores.double().std(unbiased=False).float()
    scaled = expected_rewards(rollout) / std
    rewards = trainer.shape_rewards(rollout)[1]
    clipped = scaled.sum(dim=1).clamp(-2.5, 2.5)
    assert (scaled.sum(dim=1) > 2.5).any() and (scaled.sum(dim=1) < 2.5).any()
    assert_close(rewards.sum(dim=1), clipped, rtol=1e-5, atol=1e-5)
    last = torch.nn.functional.one_hot(rollout.lengths - 1, rewards.shape[1]).bool()
    assert_close(rewards[~last], scaled[~last], rtol=1e-5, atol=1e-5)


def words_at_the_end(prompts, responses, response_ids):
    """The score of `tiny_ppo.words_scorer`, as rewards per token."""
    pairs = zip(responses, response_ids, strict=True)
    return [[0.0] * (len(ids) - 1) + [len(response) / 10] for response, ids in pairs]


def test_a_score_at_the_end_trains_as_rewards_per_token_do(policy_dir, tmp_path):
    results = []
    for name in ("scores", "rewards"):
        config = make_config(policy_dir, tmp_path, missing_eos_penalty=None)
        config.run_name = name
        if name == "rewards":
            config.scorer.path = f"python:{__name__}.words_at_the_end"
            config.evaluation.scorer = f"python:{__name__}.words_at_the_end"
        results.append(train_ppo(config).directory)
    scores, rewards = results
    one, two = (load_file(path / "model.safetensors") for path in results)
    assert all(torch.equal(one[name], two[name]) for name in one)
    for row, other in zip(
        *(rows_of(path.parent / "metrics.jsonl") for path in results), strict=True
    ):
        other = {k: v for k, v in other.items() if "independent" not in k and "win" not in k}
        assert other == {k: v for k, v in row.items() if "win" not in k}
    samples = rows_of(rewards.parent / "samples.jsonl")
    assert samples and all(s["independent_score"] == pytest.approx(s["score"]) for s in samples)


def test_components_are_in_metrics_samples_and_table(policy_dir, tmp_path, capsys):
    tokenizer = load_tokenizer(ModelConfig(path=str(policy_dir)))
    config = make_config(policy_dir, tmp_path, missing_eos_penalty=None, num_updates=2)
    components = [
        ScorerComponent(write_reward_model(tmp_path / "kind", tokenizer, seed=1), weight=2.0),
        ScorerComponent(f"python:{__name__}.num_words", weight=-0.25),
    ]
    config.scorer = ScorerConfig(components=components)
    config.critic.init = "reward"
    folder = train_ppo(config).directory.parent
    table = capsys.readouterr().out
    assert re.search(r"^score of kind  .*^score of num_words  .*^win rate", table, re.M | re.S)
    rows = rows_of(folder / "metrics.jsonl")
    for prefix in ("", "eval_"):
        found = [row for row in rows if f"{prefix}score" in row]
        assert found
        for row in found:
            parts = [row[f"{prefix}score/{name}"] for name in ("kind", "num_words")]
            expected = 2.0 * parts[0] - 0.25 * parts[1]
            assert row[f"{prefix}score"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert rows[0]["eval_score/kind_low"] <= rows[0]["eval_score/kind"]
    for sample in rows_of(folder / "samples.jsonl"):
        expected = 2.0 * sample["score/kind"] - 0.25 * sample["score/num_words"]
        assert sample["score"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert sample["score/num_words"] == len(sample["response"].split())


def test_a_critic_starts_from_the_first_component_as_it_counts(policy_dir, tmp_path):
    tokenizer = load_tokenizer(ModelConfig(path=str(policy_dir)))
    path = write_reward_model(tmp_path / "kind", tokenizer, seed=1)
    config = make_config(policy_dir, tmp_path)
    components = [
        ScorerComponent(path, weight=-0.5, normalize="standardise"),
        ScorerComponent(f"python:{__name__}.num_words"),
    ]
    config.scorer = ScorerConfig(components=components)
    config.critic.init = "reward"
    critic = make_trainer(config, tmp_path).actors.critic
    sequences = rendered(tokenizer)
    with torch.no_grad():
        values = [critic(torch.tensor([s]), torch.ones(1, len(s)) == 1)[0, -1] for s in sequences]
    expected = -0.5 * (raw_scores(path, sequences) - MEAN) / STD
    assert_close(torch.stack(values), expected, rtol=1e-5, atol=1e-6)


def test_evaluation_takes_a_reward_model_and_reports_its_raw_scores(policy_dir, tmp_path):
    gold = write_reward_model(tmp_path / "gold", build_tokenizer(), seed=5)
    config = make_config(policy_dir, tmp_path, num_updates=2)
    config.evaluation = dataclasses.replace(config.evaluation, scorer=gold)
    folder = train_ppo(config).directory.parent
    samples = rows_of(folder / "samples.jsonl")
    texts = [sample["prompt"] for sample in samples], [sample["response"] for sample in samples]
    expected = raw_scores(gold, rendered(build_tokenizer(), *texts))
    found = torch.tensor([sample["independent_score"] for sample in samples])
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    first = next(row for row in rows_of(folder / "metrics.jsonl") if "eval_score" in row)
    assert first["eval_independent_score"] == pytest.approx(float(found[:4].mean()), rel=1e-4)


def test_module_and_function_are_enough_for_a_python_scorer(policy_dir, tmp_path, capsys):
    """No `python:`, and a critic that starts from the policy without being told."""
    runs = []
    for path, init in (("python:helpers.tiny_ppo.words_scorer", "policy"), (None, None)):
        config = make_config(policy_dir, tmp_path, num_updates=1)
        config.run_name = f"run-{init}"
        config.scorer = ScorerConfig(path or "helpers.tiny_ppo.words_scorer")
        config.critic.init = init
        runs.append(train_ppo(config).directory.parent)
    assert capsys.readouterr().out.count("critic.init=policy: the scorer is a Python function") == 1
    one, other = ((run / "metrics.jsonl").read_text() for run in runs)
    assert one == other
    assert "init: policy" in (runs[1] / "config.yaml").read_text()


def test_the_table_says_how_often_the_penalty_replaced_a_score(policy_dir, tmp_path, capsys):
    knobs = {"num_updates": 1, "learning_rate": 0.0}
    for penalty, shown in ((-1, True), (None, False), ("auto", False)):
        config = make_config(policy_dir, tmp_path, missing_eos_penalty=penalty, **knobs)
        config.run_name = f"penalty-{penalty}"
        result = train_ppo(config)
        share = f"{1 - result.after['eval_eos_rate']:.0%}"
        assert share != "0%"
        line = f"replaced the score of {share} of these answers before, of {share} after"
        assert (line in capsys.readouterr().out) == shown


def test_a_directory_comes_before_a_module_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("python:a.b", "my_module.score", "my_module", "runs/a.b", "a-b.c", None)
    assert [is_python(name) for name in names] == [True, True, False, False, False, False]
    (tmp_path / "my_module.score").mkdir()
    assert not is_python("my_module.score")


def test_an_evaluation_scorer_that_is_not_there_is_named(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path)
    config.evaluation.scorer = str(tmp_path / "nowhere")
    with pytest.raises(InputError, match="evaluation.scorer=.*nowhere: no such directory"):
        train_ppo(config)


def test_a_library_scorer_serves_ppo_as_it_is(policy_dir, tmp_path, helpful):
    scorer = load_scorer(ScorerConfig(helpful))
    assert isinstance(scorer, RewardModelScorer)
    result = train_ppo(make_config(policy_dir, tmp_path, num_updates=1), scorer=scorer)
    assert "RewardModelScorer" in (result.directory / "config.yaml").read_text()


def run_rank(rank, port, config, folder):
    """One process of two: collect, and write down the whole rollout."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in values.items()}
    save_rollouts(config, folder / f"{rank}.pt", folder)


def save_rollouts(config, file, folder):
    trainer = make_trainer(config, folder)
    trainer.actors.scorer = CombinedScorer({"t": token_rewards, "w": num_words}, [1.0, 2.0])
    first = trainer.collect()
    trainer.actors.scorer = num_words
    second = trainer.collect()
    ppo = dataclasses.replace(config.ppo, whiten_scores=True)
    trainer.config = dataclasses.replace(config, ppo=ppo)
    third = trainer.collect()
    whitened = vars(third) | {"scores": trainer.shape_rewards(third)[1].sum(dim=1)}
    torch.save([vars(first), vars(second), whitened], file)


def test_two_processes_gather_rewards_per_token_and_components_and_whiten_all_scores(
    policy_dir, tmp_path
):
    config = make_config(policy_dir, tmp_path)
    save_rollouts(config, tmp_path / "one.pt", tmp_path)
    with held_port() as port:
        in_two_processes(run_rank, port, config, tmp_path)
    alone = torch.load(tmp_path / "one.pt")
    assert alone[0]["component_scores"].shape == (8, 2)
    assert alone[1]["component_scores"].shape == (8, 0)
    for rank in range(2):
        for one, two in zip(alone, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            for name in ("response_ids", "scores", "dense_rewards", "component_scores"):
                assert_close(two[name], one[name], msg=lambda m, name=name: f"{name}: {m}")
