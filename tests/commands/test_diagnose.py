"""`python -m rlhf.diagnose`: the weakest stage is named, and where PPO should stop.

Run: python -m pytest tests/commands/test_diagnose.py; with -m slow the demo world with a spoiled
SFT policy, reward model or PPO.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from helpers.stages import WORLD, reward_config, sft_config
from helpers.tiny_ppo import write_policy, write_prompts

from rlhf import train_reward, train_sft
from rlhf.config import PPOStageConfig, ScorerConfig
from rlhf.demo.world import MODEL_CONFIG, rows
from rlhf.diagnose import DiagnoseOptions, diagnose
from rlhf.diagnose.answers import Judging, Ranked, Scored, on_rankings
from rlhf.diagnose.options import Subject, columns_of, find_subject, good_answers
from rlhf.diagnose.remedies import commands, stopping_text, verdict
from rlhf.diagnose.weakest_link import findings_of
from rlhf.option_parser import run_command

P, N = 40, 16


def by_length(prompts, responses):
    return [len(response) / 10 for response in responses]


def by_reference(prompts, responses, reference):
    """Length, and 1 for the reference itself."""
    return [len(r) / 10 + (r == own) for r, own in zip(responses, reference, strict=True)]


def subject(gold=True, **values):
    scorer = ScorerConfig("runs/x/reward/final")
    trusted = ScorerConfig("my.gold", "none") if gold else None
    found = Subject(
        "runs/x/sft/final", scorer, "runs/x/ppo/final", trusted, [], "rows.jsonl", PPOStageConfig()
    )
    return dataclasses.replace(found, **values)


def noise(seed, *shape):
    return torch.randn(*shape or (P, N), generator=torch.Generator().manual_seed(seed))


def scored(noise_of_scorer, ppo=(1.0, 0.8), good=0.75, kl=2.0):
    gold = 0.5 + 0.15 * noise(0)
    proxy = (gold - 0.5) / 0.15 + noise_of_scorer * noise(1)
    small = 0.01 * noise(2, P)
    return Scored(
        proxy,
        gold,
        1.0,
        ppo[0] + small,
        ppo[1] + small,
        torch.full((P,), kl),
        torch.full((P,), good),
    )


def say(found, about):
    return "\n".join([verdict(found), *commands(found, about), *stopping_text(found)])


def test_ppo_that_hardly_moved_is_named_with_larger_steps_to_try():
    about = subject()
    found = findings_of(scored(0.1, ppo=(0.0, 0.5), kl=0.01), about)
    said = say(found, about)
    assert found["weakest"] == "ppo" and "weakest link: PPO; a known-good one" in said
    assert "moved only 0.01" in said and "ppo.learning_rate=9e-06 ppo.kl_coef=0.025" in said
    names = [row["name"] for row in found["answers"]]
    assert names[2:] == [
        "SFT, best of 16 by the scorer",
        "SFT, best of n at PPO's KL",
        "PPO",
        "SFT",
    ]


def test_a_reward_model_that_picks_by_chance_is_named_and_never_worth_a_budget():
    about = subject()
    found = findings_of(scored(20.0, ppo=(40.0, 0.2), kl=30.0), about)
    said = say(found, about)
    assert found["weakest"] == "reward" and found["over_optimised"]
    assert "rlhf.reward.report path=runs/x/reward/final" in said and "ppo.kl_coef=0.1" in said
    assert "python -m rlhf.rank" in said
    assert "SFT, best of n at PPO's KL" not in [row["name"] for row in found["answers"]]


def test_an_sft_policy_without_good_answers_is_named():
    about = subject()
    found = findings_of(scored(0.1, good=2.0), about)
    assert found["weakest"] == "sft" and "rlhf.chat path=runs/x/sft/final" in say(found, about)


def test_without_gold_a_scorer_at_chance_on_held_out_rankings_is_named():
    right = (torch.arange(P * 6) % 2).float()
    worth = torch.tensor([[1.0, 2 / 3, 1 / 3, 0.0]] * P)
    ranked = Ranked(right, torch.arange(P).repeat_interleave(6), noise(3, P, 4), worth)
    about = subject(gold=False)
    spoiled = dataclasses.replace(scored(0.0), ranked=ranked)
    found = findings_of(spoiled, about)
    assert found["weakest"] == "reward" and "near chance on held-out rankings" in say(found, about)
    healthy = dataclasses.replace(ranked, right=torch.ones(P * 6), scores=worth)
    found = findings_of(dataclasses.replace(scored(0.0, ppo=(2.0, 2.0)), ranked=healthy), about)
    assert found["weakest"] is None and "reward" not in found["gains"]
    assert "none up to n = 4 (0.64 nats per response)" in say(found, about)


def test_a_gold_score_that_turns_down_gives_a_budget_with_an_interval():
    proxy = torch.arange(64.0).expand(200, 64)
    top = torch.tensor([0.5 - 0.02 * abs(i - 52) for i in range(64)])
    spread = 0.02 * noise(4, 200, 64)
    found = findings_of(Scored(proxy, top + spread, 1.0), subject(ppo=None))
    point = found["stopping_point"]
    assert point["verdict"] == "turns" and 0.3 < point["kl"]["low"] < point["kl"]["mean"] < 3.2
    assert "watchdog.kl_budget=" in say(found, subject(ppo=None))
    found = findings_of(Scored(-top.expand(200, 64), top + spread, 1.0), subject(ppo=None))
    assert "PPO against this scorer cannot help" in say(found, subject(ppo=None))


def test_known_good_answers_and_columns_of_rows():
    ranked = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 0, 0], "answer": 3}
    assert good_answers(ranked) == ["b", "c"] and columns_of(ranked) == {"answer": 3}
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert good_answers({"messages": chat}) == ["a"]
    assert good_answers({"prompt": "p", "reference": "r"}) == ["r"]
    assert good_answers({"prompt": "p"}) == []


def test_the_worth_of_a_ranked_answer_is_the_share_of_the_others_that_are_worse():
    judging = Judging.__new__(Judging)
    judging.scorer, judging.field, judging.penalty = by_length, "reward", None
    row = {"prompt": "p", "responses": ["aaaa", "aa", "a"], "ranks": [0, 1, 1]}
    found = on_rankings([row, row], judging)
    assert found.worth.tolist() == [[1, 0.25, 0.25]] * 2 and found.right.tolist() == [1, 1, 1, 1]


@pytest.fixture
def policy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_policy(tmp_path / "policy")
    write_prompts(tmp_path / "prompts.jsonl")
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    with open("references.jsonl", "w") as file:
        for line in lines:
            file.write(json.dumps(json.loads(line) | {"reference": "x" * 90}) + "\n")
    return tmp_path


def test_the_command_measures_models_that_no_run_holds(policy, capsys):
    options = DiagnoseOptions(
        sft="policy",
        ppo="policy",
        reward=f"{__name__}.by_length",
        gold=f"{__name__}.by_reference",
        prompts="references.jsonl",
        num_prompts=6,
        samples_per_prompt=4,
        response_length=6,
    )
    found = diagnose(options)
    said = capsys.readouterr().out
    assert found == json.loads((policy / "diagnosis/diagnosis.json").read_text())
    assert (policy / "diagnosis/diagnosis.png").is_file()
    kl = next(row["kl"] for row in found["answers"] if row["name"] == "PPO")
    assert abs(kl) < 1e-4 and found["gains"]["reward"]["mean"] <= 1e-6
    assert found["weakest"] == "sft" and "6 prompts of references.jsonl; gold: " in said
    assert "6 prompts say little; take 64 or more" in said


def test_what_is_missing_is_said_before_a_model_is_loaded(policy, capsys):
    def said(*arguments):
        assert run_command("", DiagnoseOptions, find_subject, arguments) == 2
        return capsys.readouterr().err

    assert "give run_name=<run>, path=<directory of a run>, or sft= and reward=" in said()
    assert "runs/gone has no finished stage" in said("run_name=gone")
    assert "reward is missing: add reward=<path>" in said("sft=policy", "prompts=prompts.jsonl")
    given = "sft=policy", f"reward={__name__}.by_length"
    assert "no held-out prompts: add prompts=" in said(*given)
    assert "gold=nowhere" in said(*given, "prompts=prompts.jsonl", "gold=nowhere")


# --- The demo world, spoiled ----------------------------------------------------------------------

LARGE = dataclasses.replace(WORLD, max_rows=6000, max_eval_rows=64)
GOLD = "rlhf.demo.world.gold_scores"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with a fair SFT policy and reward model."""
    runs = tmp_path_factory.mktemp("diagnose") / "runs"
    train_sft(fair_sft(runs, "good", 180))
    train_reward(fair_reward(runs, "good", LARGE))
    return runs


def fair_sft(runs, name, steps):
    config = sft_config(runs, run_name=name, dataset=LARGE, num_samples=0)
    config.model.config = MODEL_CONFIG
    lengths = {"max_steps": steps, "per_device_train_batch_size": 64, "eval_steps": steps}
    config.trainer |= lengths
    return config


def fair_reward(runs, name, data):
    config = reward_config(runs, run_name=name, dataset=data)
    config.model.path = str(runs / "good/sft/final")
    config.trainer |= {"max_steps": 150, "per_device_train_batch_size": 16, "eval_steps": 150}
    return config


def diagnosed(runs, **values):
    run = {"path": str(runs / "good"), "gold": GOLD, "num_prompts": 48, "response_length": 24}
    return diagnose(DiagnoseOptions(**(run | {"out": str(runs / "out")} | values)))


@pytest.mark.slow
def test_on_the_demo_world_an_undertrained_sft_policy_is_named(trained):
    train_sft(fair_sft(trained, "weak", 20))
    assert diagnosed(trained, sft=str(trained / "weak/sft/final"))["weakest"] == "sft"


@pytest.mark.slow
def test_on_the_demo_world_a_reward_model_of_shuffled_labels_is_named(trained, tmp_path):
    shuffled = []
    for number, row in enumerate(rows("reward", "train")[:2400]):
        ranks = torch.randperm(4, generator=torch.Generator().manual_seed(number)).tolist()
        shuffled.append(row | {"ranks": ranks})
    file = tmp_path / "shuffled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in shuffled))
    data = dataclasses.replace(LARGE, path=str(file), format="ranked")
    train_reward(fair_reward(trained, "shuffled", data))
    found = diagnosed(trained, reward=str(trained / "shuffled/reward/final"))
    assert found["weakest"] == "reward" and found["gains"]["reward"]["mean"] > 0.1


@pytest.mark.slow
def test_on_the_demo_world_ppo_that_learned_nothing_is_named(trained):
    # the reward model of few steps would be weaker still: the scorer is perfect here
    found = diagnosed(trained, reward=GOLD, ppo=str(trained / "good/sft/final"))
    assert found["weakest"] == "ppo" and found["gains"]["ppo"]["mean"] > 0.1
    assert found["gains"]["reward"]["mean"] < found["gains"]["ppo"]["mean"] / 2


@pytest.mark.slow
def test_before_ppo_a_fair_run_has_no_fault_and_a_stopping_point_that_is_not_guessed(trained):
    found = diagnosed(trained, reward=GOLD, good=0.7)
    assert found["weakest"] is None and found["ppo"] is None
    assert found["stopping_point"]["verdict"] == "rises"
