"""The completions that set the zero of a reward model's scores.

Run: python -m pytest tests/reward/test_completions.py
"""

import dataclasses
import json

import pytest
import torch
from helpers.tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf import train_reward
from rlhf.checkpoint import read_record
from rlhf.config import DatasetConfig, InputError, ModelConfig, RewardStageConfig, check
from rlhf.data import encode_prompt, encode_response
from rlhf.models import load_policy
from rlhf.reward.completions import COMPLETIONS_KEY
from rlhf.sampling import generate, sampling_for, uniform_noise
from rlhf.tokenizer import load_tokenizer

PROMPTS = [f"Name fruit {i}." for i in range(24)]
RESPONSES = [" yes", " no, never"]
WORDS = "apple river stone cloud paper light green table".split()


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A policy that ends most answers, ranked rows, and demonstrations."""
    folder = tmp_path_factory.mktemp("completions")
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", tokenizer)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(10, 320, 10)]
    model.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    write_rows(
        folder / "ranked.jsonl",
        [{"prompt": p, "responses": RESPONSES, "ranks": [0, 1]} for p in PROMPTS],
    )
    write_rows(
        folder / "demonstrations.jsonl",
        [{"prompt": p, "completion": f" {WORDS[i % 8]}"} for i, p in enumerate(PROMPTS)],
    )
    return folder


def config_of(world, runs, **normalization):
    config = RewardStageConfig(
        runs_dir=str(runs),
        model=ModelConfig(path=str(world / "policy")),
        dataset=DatasetConfig(
            path=str(world / "ranked.jsonl"), format="ranked", max_length=64, eval_fraction=0.2
        ),
    )
    values = {"response_length": 32} | normalization
    config.normalization = dataclasses.replace(config.normalization, **values)
    config.trainer |= {"max_steps": 1, "per_device_train_batch_size": 2}
    return config


def scores_of(final, sequences):
    """Scores by transformers itself, one sequence at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(final).eval()
    with torch.no_grad():
        return torch.stack([model(torch.tensor([ids])).logits[0, 0] for ids in sequences])


def expect(final, sequences):
    scores, record = scores_of(final, sequences), read_record(final)
    assert record.score_mean == pytest.approx(float(scores.mean()), abs=1e-4)
    assert record.score_std == pytest.approx(float(scores.std()), abs=1e-4)


def encoded(final, pairs):
    tokenizer = AutoTokenizer.from_pretrained(final)
    return [
        encode_prompt(prompt, tokenizer) + encode_response(prompt, response, tokenizer)
        for prompt, response in pairs
    ]


def test_demonstrations_score_zero_on_average(world, tmp_path):
    path = str(world / "demonstrations.jsonl")
    normalization = {"completions": "demonstrations", "path": path, "format": "prompt_completion"}
    final = train_reward(config_of(world, tmp_path, **normalization)).directory
    pairs = [(prompt, f" {WORDS[i % 8]}") for i, prompt in enumerate(PROMPTS)]
    expect(final, encoded(final, pairs))


def test_ranked_responses_score_zero_on_average(world, tmp_path):
    config = heldout_given(config_of(world, tmp_path, completions="ranked"))
    final = train_reward(config).directory
    expect(final, encoded(final, [(p, r) for p in PROMPTS for r in RESPONSES]))


def heldout_given(config):
    """Train on every prompt: the rows are held out as well."""
    config.dataset.eval_path, config.dataset.eval_split = config.dataset.path, "train"
    return config


def test_a_typical_answer_of_the_policy_scores_zero(world, tmp_path, capsys):
    final = train_reward(heldout_given(config_of(world, tmp_path))).directory
    assert "answers of the SFT policy" in capsys.readouterr().out
    source = ModelConfig(path=str(world / "policy"))
    tokenizer = load_tokenizer(source)
    policy = load_policy(source, tokenizer)
    prompts = [encode_prompt(prompt, tokenizer) for prompt in PROMPTS]
    noise = uniform_noise((1, COMPLETIONS_KEY), range(len(prompts)), 32)
    sampled = generate(policy, prompts, sampling_for(policy, tokenizer, 32, 1.0), noise)
    assert 0.5 < sum(sampled.finished) / len(prompts) < 1.0
    answers = zip(prompts, sampled.ids, sampled.finished, strict=True)
    expect(final, [prompt + ids for prompt, ids, finished in answers if finished])


def test_answers_that_do_not_end_count_where_most_do_not(world, tmp_path, capsys):
    config = heldout_given(config_of(world, tmp_path))
    config.normalization.response_length = 1
    train_reward(config)
    output = capsys.readouterr()
    assert "answers of the SFT policy end within 1 tokens" in output.err
    assert f"over {len(PROMPTS)} answers" in output.out


def test_a_budget_as_long_as_the_context_leaves_room_for_prompts(world, tmp_path, capsys):
    train_reward(heldout_given(config_of(world, tmp_path, response_length=128)))
    assert f"over {len(PROMPTS)} answers" in capsys.readouterr().out


def test_demonstrations_need_a_path_before_anything_loads():
    config = RewardStageConfig(model=ModelConfig(path="x"), dataset=DatasetConfig(path="y"))
    config.normalization.completions = "demonstrations"
    with pytest.raises(InputError, match="normalization.path: file or Hub name of the SFT stage"):
        check(config)
