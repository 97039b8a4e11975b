"""Bad input that PPO meets half way ends it with its last update saved; what can be known before
training is dropped, counted or refused then.

Run: python -m pytest tests/end_to_end/test_bad_input_half_way.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.ports import held_port
from helpers.runs import in_two_processes
from helpers.tiny_ppo import make_config, write_policy
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from rlhf import train_ppo
from rlhf.config import EvaluationConfig, InputError, ScorerComponent, ScorerConfig
from rlhf.failures import on_every_process
from rlhf.metrics import read_jsonl
from rlhf.scorers import load_scorer, score_responses, score_sequences, uncut_scores

CONTEXT = 52


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> str:
    """A reward model with a token for each byte and a context of `CONTEXT` tokens."""
    directory = tmp_path_factory.mktemp("judge")
    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": CONTEXT, "num_labels": 1}
    config = AutoConfig.for_model("gpt2", vocab_size=len(names), **sizes, **ids)
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    return str(directory)


# --- A scorer that fails --------------------------------------------------------------------------

CALLS, FAILS_AT = 0, 0


def flaky(prompts, responses):
    """Score by length, with noise from every global random number generator; fail once."""
    global CALLS
    CALLS += 1
    noise = random.random() + np.random.rand() + float(torch.rand(()))
    if CALLS == FAILS_AT:
        raise ConnectionError("the judge is away")
    return [len(response) / 10 + noise for response in responses]


def train(config, fails_at=0):
    global CALLS, FAILS_AT
    CALLS, FAILS_AT = 0, fails_at
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    return train_ppo(config)


def flaky_config(policy, folder, name):
    config = make_config(policy, folder, num_updates=4)
    config.run_name, config.checkpoint.every = name, 100
    config.scorer.path = f"python:{__name__}.flaky"
    return config


def outcome(config):
    directory = config.stage_dir("ppo")
    texts = [(directory / f"{name}.jsonl").read_text() for name in ("metrics", "samples")]
    return *texts, load_file(directory / "final/model.safetensors")


@pytest.fixture(scope="module")
def whole(policy, tmp_path_factory):
    config = flaky_config(policy, tmp_path_factory.mktemp("whole"), "whole")
    train(config)
    return outcome(config)


# calls of the scorer: 1 before training, 2, 3 two updates, 4 evaluation, 5, 6 updates, 7 evaluation
@pytest.mark.parametrize(
    "fails_at, saved", [(3, 1), (4, 2), pytest.param(6, 3, marks=pytest.mark.slow), (7, 4)]
)
def test_run_whose_scorer_fails_is_saved_and_resumed_ends_as_the_whole_one(
    fails_at, saved, policy, whole, tmp_path
):
    config = flaky_config(policy, tmp_path, "run")
    with pytest.raises(InputError) as caught:
        train(config, fails_at)
    checkpoint = config.stage_dir("ppo") / f"checkpoint-{saved}"
    assert str(caught.value) == (
        "the scorer failed on a batch of "
        f"{8 if fails_at in (3, 6) else 4} responses: ConnectionError: the judge is away; update "
        f"{saved} is saved in {checkpoint}: correct the cause, then continue with resume=true "
        f"run_name=run runs_dir={config.runs_dir}"
    )
    assert (checkpoint / "manifest.json").is_file()
    train(dataclasses.replace(config, resume=True))
    *texts, weights = outcome(config)
    assert texts == list(whole[:2])
    assert all(torch.equal(weights[name], whole[2][name]) for name in whole[2])


def test_scorer_that_fails_again_after_a_resume_leaves_the_checkpoint(policy, tmp_path):
    config = flaky_config(policy, tmp_path, "run")
    for resume, fails_at in ((False, 3), (True, 1)):
        with pytest.raises(InputError, match="update 1 is saved in .*checkpoint-1: correct"):
            train(dataclasses.replace(config, resume=resume), fails_at)


def test_scorer_that_fails_before_the_first_update_leaves_nothing_to_resume(policy, tmp_path):
    config = flaky_config(policy, tmp_path, "run")
    for fails_at in (1, 2):
        with pytest.raises(InputError) as caught:
            train(dataclasses.replace(config, overwrite=True), fails_at)
        assert str(caught.value).endswith("the judge is away")
        assert not list(config.stage_dir("ppo").glob("checkpoint-*"))


# --- A reward model with a shorter context --------------------------------------------------------


def judged_config(policy, folder, judge, **values):
    """Prompts of conversations, one of which alone fills the judge's context."""
    config = make_config(policy, folder, num_updates=2, response_length=40)
    prompts = [f"Fruit {i}?" for i in range(23)]
    prompts.insert(7, "Name a fruit. " * 5)
    prompts.insert(12, "Name a fruit. " * 5)
    rows = [{"prompt": prompt} for prompt in prompts]
    Path(str(config.dataset.path)).write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.scorer = ScorerConfig(judge, normalize="none")
    return dataclasses.replace(config, **values)


def test_prompts_without_room_in_the_reward_model_are_dropped_and_long_answers_cut(
    policy, judge, tmp_path, capsys
):
    config = judged_config(policy, tmp_path, judge, preflight=True)
    config.ppo.missing_eos_penalty = -9.0
    config.dataset.eval_fraction, config.evaluation.num_prompts = 0.3, 8
    assert train_ppo(config).directory is not None
    said = capsys.readouterr().out
    assert "dropped 2 rows: 2 leaving no room for ppo.response_length=40 tokens in the " in said
    rows = read_jsonl(tmp_path / "runs/run/ppo/metrics.jsonl")
    rates = [row["cut_rate"] for row in rows if "score" in row]
    assert len(rates) == 2 and 0 < max(rates) < 1
    assert 0 < max(row["eval_cut_rate"] for row in rows if "eval_score" in row) < 1


@pytest.mark.parametrize("combined", [False, True])
def test_evaluation_scorer_and_components_are_given_what_they_can_read(
    combined, policy, judge, tmp_path, capsys
):
    own = ScorerConfig("python:helpers.tiny_ppo.words_scorer", normalize="none")
    config = judged_config(policy, tmp_path, judge, scorer=own)
    if combined:
        parts = [
            ScorerComponent("python:helpers.tiny_ppo.words_scorer"),
            ScorerComponent(judge, name="j"),
        ]
        config.scorer = ScorerConfig(components=parts, normalize="none")
    else:
        config.evaluation = EvaluationConfig(every=1, num_prompts=9, scorer=judge)
        config.dataset.eval_fraction = 0.6
    train_ppo(config)
    assert "leaving no room for ppo.response_length=40" in capsys.readouterr().out
    rows = read_jsonl(tmp_path / "runs/run/ppo/metrics.jsonl")
    name = "cut_rate" if combined else "eval_cut_rate"
    assert any(row.get(name, 0) > 0 for row in rows)
    assert any("cut_rate" in row for row in rows) == combined


def test_budget_beyond_the_context_of_the_reward_model_is_refused_before_training(
    policy, judge, tmp_path
):
    config = judged_config(policy, tmp_path, judge)
    config.ppo.response_length = CONTEXT
    message = "ppo.response_length=52 leaves no room for a prompt in the context of 52 tokens of"
    with pytest.raises(InputError, match=f"{message} the reward model .*; use at most 51"):
        train_ppo(config)
    assert not (tmp_path / "runs").exists()


def test_long_response_is_cut_at_its_end_and_marked(judge):
    scorer = load_scorer(ScorerConfig(judge, normalize="none"))
    prompts, responses = ["Fruit?"] * 3, ["apple", "b" * 200, "b" * (CONTEXT - 6)]
    scores = score_responses(scorer, prompts, responses, "x")
    assert scores.cut.tolist() == [False, True, True]
    whole, *_ = score_sequences(
        scorer.model, [scorer.encode(prompts[1], responses[1])[:CONTEXT]], 1
    )
    torch.testing.assert_close(scores.total[1:], whole.expand(2), rtol=1e-5, atol=1e-5)
    assert (scores.total[0] - whole).abs() > 1e-3
    with pytest.raises(
        InputError, match="2 of 3 responses, with their prompts, exceed the context"
    ):
        uncut_scores(scorer, prompts, responses, "x")
    with pytest.raises(InputError, match="a prompt has 52 tokens, which leaves no room"):
        score_responses(scorer, ["b" * 52], ["c"], "x")


# --- Two processes --------------------------------------------------------------------------------


def fails_on_the_second(prompts, responses):
    """Score by length; in its third call, fail on one process only."""
    global CALLS
    CALLS += 1
    if CALLS == 3 and Accelerator().process_index == 1:
        raise ConnectionError("the judge is away")
    return [len(response) / 10 for response in responses]


def run_rank(rank: int, port: int, config, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    try:
        train_ppo(config)
    except InputError as error:
        (folder / f"rank-{rank}").write_text(str(error))


def test_failure_on_one_process_ends_all_of_them_with_the_run_saved(policy, tmp_path):
    config = make_config(policy, tmp_path)
    config.checkpoint.every, config.evaluation.num_prompts = 100, 0
    config.scorer.path = f"python:{__name__}.fails_on_the_second"
    with held_port() as port:
        in_two_processes(run_rank, port, config, tmp_path)
    checkpoint = config.stage_dir("ppo") / "checkpoint-2"
    assert (checkpoint / "manifest.json").is_file()
    for rank in (0, 1):
        message = (tmp_path / f"rank-{rank}").read_text()
        assert message.startswith("rank 1: the scorer failed on a batch of 4 responses: Connection")
        assert f"update 2 is saved in {checkpoint}: correct the cause" in message


def test_bad_input_of_a_task_is_that_of_one_process():
    accelerator = Accelerator(cpu=True)
    assert on_every_process(lambda: 3, accelerator) == 3
    with pytest.raises(InputError, match="^not a number$"):
        on_every_process(lambda: checked("not a number"), accelerator)


def checked(text):
    raise InputError(text)
