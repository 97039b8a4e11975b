"""Scorers: what is scored, by whom, and that nothing wrong ever becomes a score.

Expected scores come from transformers' own forward pass on ids that the reward model's tokenizer
renders, or from hand computation. Leaves out loading and heads of reward models (test_models.py).

Run: python -m pytest tests/scorers/test_scorers.py
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.tiny_ppo import make_config, make_trainer
from safetensors.torch import load_file
from torch.multiprocessing import spawn
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from rlhf.checkpoint import make_record, write_stage
from rlhf.config import InputError, ModelConfig, PeftConfig, ScorerComponent, ScorerConfig
from rlhf.config.knobs import StageConfig
from rlhf.data import encode_prompt, encode_response
from rlhf.demo.world import build_tokenizer
from rlhf.models import ScalarModel, add_lora, init_reward_model, merged
from rlhf.ppo import train_ppo
from rlhf.ppo.rollout import component_scores
from rlhf.scorers import (
    CombinedScorer,
    RewardModelScorer,
    Tokens,
    check_scores,
    checked_scores,
    combine_scores,
    load_scorer,
    score_responses,
)
from rlhf.scorers.call import counting
from rlhf.tokenizer import chat_template_text, hash_rendering, load_tokenizer

PROMPTS = [
    [{"role": "user", "content": "name three animals"}],
    [{"role": "user", "content": "name two colours"}],
    [{"role": "user", "content": "name one fruit politely"}],
]
RESPONSES = ["dog cat horse .", "red blue .", "an apple thanks ."]
MEAN, STD = 0.5, 2.0


def write_reward_model(directory: Path, tokenizer, seed: int, family="llama", **overrides) -> str:
    """A tiny reward model in the `final/` of a reward stage, with score statistics."""
    tiny_model(family, tokenizer, seed=seed, **overrides).save_pretrained(directory / "base")
    tokenizer.save_pretrained(directory / "base")
    source = ModelConfig(path=str(directory / "base"))
    model = init_reward_model(source, load_tokenizer(source), seed)
    return write_stage_of(directory, model, load_tokenizer(source))


def write_stage_of(directory: Path, model, tokenizer) -> str:
    record = make_record("reward", StageConfig(), None, tokenizer)
    record.score_mean, record.score_std = MEAN, STD
    final = directory / "reward/final"
    write_stage(final, model, tokenizer, StageConfig(), record)
    return str(final)


def raw_scores(path: str, sequences) -> torch.Tensor:
    """Scores by transformers' own forward pass, one sequence at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids])).logits[:, 0] for ids in sequences])


def rendered(tokenizer, prompts=PROMPTS, responses=RESPONSES) -> list[list[int]]:
    """Ids of conversations as this tokenizer's stages train on them."""
    pairs = zip(prompts, responses, strict=True)
    return [encode_prompt(p, tokenizer) + encode_response(p, r, tokenizer) for p, r in pairs]


def policy_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template_text("plain")
    return tokenizer


@pytest.fixture(scope="module")
def helpful(tmp_path_factory) -> str:
    """A reward model that shares tokenizer and template with `policy_tokenizer`."""
    return write_reward_model(tmp_path_factory.mktemp("helpful"), policy_tokenizer(), seed=1)


@pytest.fixture(scope="module")
def safe(tmp_path_factory) -> str:
    """Another one, of another family."""
    return write_reward_model(
        tmp_path_factory.mktemp("safe"), policy_tokenizer(), seed=2, family="gpt_neox"
    )


# --- Normalisation --------------------------------------------------------------------------------


def test_scores_are_normalised_by_what_the_reward_stage_stored(helpful):
    raw = raw_scores(helpful, rendered(policy_tokenizer()))
    for normalize, expected in (
        ("none", raw),
        ("demo_mean_zero", raw - MEAN),
        ("standardise", (raw - MEAN) / STD),
    ):
        scorer = load_scorer(ScorerConfig(helpful, normalize))
        assert_close(scorer(PROMPTS, RESPONSES), expected, rtol=1e-5, atol=1e-6)
    assert_close(load_scorer(ScorerConfig(helpful))(PROMPTS, RESPONSES), raw - MEAN)


def test_a_normalisation_that_does_not_exist_is_refused(helpful):
    with pytest.raises(InputError, match="scorer.normalize must be one of .*, got shift"):
        load_scorer(ScorerConfig(helpful, "shift"))


def test_normalisation_without_stored_statistics_names_the_way_out(helpful, tmp_path):
    bare = tmp_path / "bare"
    AutoModelForSequenceClassification.from_pretrained(helpful).save_pretrained(bare)
    policy_tokenizer().save_pretrained(bare)
    with pytest.raises(InputError, match=f"{bare} has none; .* scorer.normalize=none"):
        load_scorer(ScorerConfig(str(bare)))
    raw = raw_scores(helpful, rendered(policy_tokenizer()))
    assert_close(load_scorer(ScorerConfig(str(bare), "none"))(PROMPTS, RESPONSES), raw)
    components = [ScorerComponent(helpful), ScorerComponent(str(bare))]
    with pytest.raises(InputError, match=r"set scorer.components\[1\].normalize=none"):
        load_scorer(ScorerConfig(components=components))


def test_a_scorer_without_a_path_is_refused():
    with pytest.raises(InputError, match="scorer.path is missing: give the final/ of a reward"):
        load_scorer(ScorerConfig())


def test_a_policy_is_no_component(helpful):
    policy = str(Path(helpful).parents[1] / "base")
    components = [ScorerComponent(helpful), ScorerComponent(policy, normalize="none")]
    with pytest.raises(InputError, match=r"scorer.components\[1\].path=.*is not a reward model"):
        load_scorer(ScorerConfig(components=components))


def test_a_reward_model_saved_with_lora_scores_as_it_did_in_memory(helpful, tmp_path):
    tokenizer = policy_tokenizer()
    source = ModelConfig(path=str(Path(helpful).parents[1] / "base"))
    model = add_lora(init_reward_model(source, tokenizer, 7), PeftConfig(r=4), "SEQ_CLS", 7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    path = write_stage_of(tmp_path, merged(model), tokenizer)
    sequences = rendered(tokenizer)
    with torch.no_grad():
        values = [
            ScalarModel(model.eval())(torch.tensor([s]), torch.ones(1, len(s)) == 1)
            for s in sequences
        ]
    expected = torch.stack([value[0, -1] for value in values])
    scorer = load_scorer(ScorerConfig(path, "none"))
    assert_close(scorer(PROMPTS, RESPONSES), expected, rtol=1e-5, atol=1e-5)
    base = raw_scores(helpful, sequences)
    assert ((expected - base).abs() > 0.1).all()  # or the adapter shows nothing


def test_a_conversation_beyond_the_context_of_the_reward_model_is_an_error(helpful):
    scorer = load_scorer(ScorerConfig(helpful))
    assert scorer.max_length == 128
    with pytest.raises(InputError, match="has 129 tokens, but the context of the reward model "):
        scorer.score_ids([[5], [5] * 129])


def test_prompts_beyond_the_context_of_the_reward_model_are_dropped_before_training(
    policy_dir, tmp_path, capsys
):
    tokenizer = load_tokenizer(ModelConfig(path=str(policy_dir)))
    path = write_reward_model(tmp_path / "short", tokenizer, seed=1, max_position_embeddings=32)
    config = make_config(policy_dir, tmp_path, num_updates=1, batch_size=4)
    config.evaluation.num_prompts = 1
    config.scorer = ScorerConfig(path)
    assert train_ppo(config).directory is not None
    assert "longer than ppo.max_prompt_length=20 tokens" in capsys.readouterr().out
    config.run_name, config.ppo.response_length = "other", 32
    with pytest.raises(InputError, match="no room for a prompt in the model.s context of 32"):
        train_ppo(config)


# --- Rendering ------------------------------------------------------------------------------------


def sampled(tokenizer, texts=RESPONSES) -> Tokens:
    """Responses spelt out in other ids than the tokenizer would choose: one token a byte."""
    spelt = [
        [*(tokenizer.convert_tokens_to_ids(list(t.replace(" ", "Ġ")))), tokenizer.eos_token_id]
        for t in texts
    ]
    assert tokenizer.batch_decode(spelt, skip_special_tokens=True) == list(texts)
    prompts = [encode_prompt(prompt, tokenizer) for prompt in PROMPTS]
    assert [p + s for p, s in zip(prompts, spelt, strict=True)] != rendered(tokenizer)
    return Tokens(prompts, spelt, hash_rendering(tokenizer))


def other_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template_text("alpaca")
    return tokenizer


def other_splits():
    """The same vocabulary, special tokens and template, but it keeps white space apart."""
    from tokenizers import pre_tokenizers

    tokenizer = policy_tokenizer()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("isolated"), byte_level]
    )
    return tokenizer


def test_the_same_tokenizer_scores_the_ids_that_were_sampled(helpful):
    tokenizer = policy_tokenizer()
    tokens = sampled(tokenizer)
    scorer = load_scorer(ScorerConfig(helpful, "none"))
    ids = [[*p, *r] for p, r in zip(tokens.prompts, tokens.responses, strict=True)]
    expected = raw_scores(helpful, ids)
    scores = score_responses(scorer, PROMPTS, RESPONSES, "x", tokens).total
    assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    from_text = scorer(PROMPTS, RESPONSES)
    assert_close(from_text, raw_scores(helpful, rendered(tokenizer)), rtol=1e-5, atol=1e-6)
    assert ((scores - from_text).abs() > 0.1).any()


@pytest.mark.parametrize("build", [build_tokenizer, other_template, other_splits])
def test_another_tokenizer_or_template_renders_the_conversation_itself(build, tmp_path):
    theirs, ours = build(), policy_tokenizer()
    assert rendered(theirs) != rendered(ours)
    path = write_reward_model(tmp_path, theirs, seed=3)
    scorer = load_scorer(ScorerConfig(path, "none"))
    expected = raw_scores(path, rendered(theirs))
    scores = score_responses(scorer, PROMPTS, RESPONSES, "x", sampled(ours)).total
    assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    assert_close(scorer(PROMPTS, RESPONSES), expected, rtol=1e-5, atol=1e-6)
    assert [scorer.encode(p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)] == rendered(
        theirs
    )


def test_each_component_goes_its_own_way(helpful, tmp_path):
    ours, tokens = policy_tokenizer(), sampled(policy_tokenizer())
    foreign = write_reward_model(tmp_path, build_tokenizer(), seed=3)
    components = [ScorerComponent(helpful, name="ids"), ScorerComponent(foreign, name="text")]
    scorer = load_scorer(ScorerConfig(components=components, normalize="none"))
    scores = score_responses(scorer, PROMPTS, RESPONSES, "x", tokens)
    ids = [[*p, *r] for p, r in zip(tokens.prompts, tokens.responses, strict=True)]
    by_ids, by_text = raw_scores(helpful, ids), raw_scores(foreign, rendered(build_tokenizer()))
    assert_close(scores.components["ids"], by_ids, rtol=1e-5, atol=1e-6)
    assert_close(scores.components["text"], by_text, rtol=1e-5, atol=1e-6)
    assert rendered(ours) != ids


def test_the_hash_of_a_rendering_survives_saving_and_padding_and_sees_every_difference(tmp_path):
    tokenizer = policy_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelConfig(path=str(tmp_path)))
    loaded(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    assert hash_rendering(loaded) == hash_rendering(tokenizer)
    pad = policy_tokenizer()
    pad.pad_token = "!"
    tokenizers = [tokenizer, build_tokenizer(), other_template(), other_splits(), pad]
    assert len({hash_rendering(t) for t in tokenizers}) == len(tokenizers)


def test_a_template_that_refuses_the_conversation_is_the_cause_that_is_named(tmp_path):
    path = write_reward_model(tmp_path, build_tokenizer(), seed=3)
    prompt = [{"role": "system", "content": "be brief"}, *PROMPTS[0]]
    with pytest.raises(InputError, match="the chat template refuses .*system, user"):
        checked_scores(load_scorer(ScorerConfig(path)), [prompt], ["dog ."], "the scorer")


def test_ppo_scores_ids_under_the_same_rendering_and_says_when_it_cannot(
    policy_dir, tmp_path, capsys
):
    config = make_config(policy_dir, tmp_path, missing_eos_penalty=None)
    same = write_reward_model(tmp_path / "same", load_tokenizer(config.model), seed=1)
    for path, said in ((same, False), (None, True)):
        path = path or write_reward_model(tmp_path / "other", other_template(), seed=1)
        config.scorer = ScorerConfig(path, "none")
        trainer = make_trainer(config, tmp_path)
        assert ("has another tokenizer or chat template" in capsys.readouterr().out) == said
        rollout = trainer.collect()
        masks = zip(rollout.sequence_ids, rollout.sequence_mask, strict=True)
        ids = [row[mask].tolist() for row, mask in masks]
        if not said:
            assert_close(rollout.scores, raw_scores(path, ids), rtol=1e-5, atol=1e-5)


# --- Several scorers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        ("weighted_sum", [1 + 0.5 * 3 - 2 * 8, 5 + 0.5 * 5 - 2 * 5]),
        ("mean", [4.0, 5.0]),
        ("min", [1.0, 5.0]),
        # deviations of 1, 3, 8 from 4: 9 + 1 + 16 = 26; divided by 3, not by 2
        ("mean_minus_std", [4 - 1.5 * (26 / 3) ** 0.5, 5.0]),
    ],
)
def test_combinations_by_hand(combine, expected):
    scores = torch.tensor([[1.0, 5.0], [3.0, 5.0], [8.0, 5.0]])
    weights = torch.tensor([1.0, 0.5, -2.0])
    result = combine_scores(scores, weights, combine, std_coef=1.5)
    assert_close(result, torch.tensor(expected), rtol=1e-6, atol=0)


def test_the_worked_example_of_combinations():
    scores, weights = torch.tensor([[1.0, 5.0], [3.0, 3.0]]), torch.tensor([1.0, 0.5])
    for combine, expected in (
        ("weighted_sum", [2.5, 6.5]),
        ("mean", [2.0, 4.0]),
        ("min", [1.0, 3.0]),
        ("mean_minus_std", [0.0, 2.0]),
    ):
        assert combine_scores(scores, weights, combine, 2.0).tolist() == expected


def test_components_are_normalised_one_by_one_then_weighted(helpful, safe):
    sequences = rendered(policy_tokenizer())
    components = [
        ScorerComponent(helpful, weight=2.0, name="helpful"),
        ScorerComponent(safe, weight=-0.5, normalize="none", name="safe"),
        ScorerComponent(f"python:{__name__}.num_words", weight=0.1),
    ]
    scorer = load_scorer(ScorerConfig(components=components, normalize="standardise"))
    assert isinstance(scorer, CombinedScorer)
    one, two = (raw_scores(helpful, sequences) - MEAN) / STD, raw_scores(safe, sequences)
    three = torch.tensor([4.0, 3.0, 4.0])
    scores = score_responses(scorer, PROMPTS, RESPONSES, "x")
    assert list(scores.components) == ["helpful", "safe", "num_words"]
    for found, expected in zip(scores.components.values(), (one, two, three), strict=True):
        assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert_close(scorer(PROMPTS, RESPONSES), 2 * one - 0.5 * two + 0.1 * three)
    pair = [ScorerComponent(helpful, name="helpful"), ScorerComponent(safe, name="safe")]
    ensemble = load_scorer(ScorerConfig(components=pair, combine="min", normalize="none"))
    assert_close(ensemble(PROMPTS, RESPONSES), torch.minimum(raw_scores(helpful, sequences), two))


def test_a_gate_counts_alone_below_and_not_at_all_above_by_hand():
    # sigmoid of -2, -1.7, 1: 0.119, 0.154, 0.731
    raw = torch.tensor([[1.0, -9.0, 4.0], [-2.0, -1.7, 1.0]])
    assert counting(raw, torch.tensor([0.0, 0.15])).tolist() == [
        [False, True, True],
        [True, False, False],
    ]
    two = counting(torch.cat([raw, raw[1:]]), torch.tensor([0.0, 0.15, 0.74]))
    assert two.tolist() == [[False] * 3, [True, False, False], [True] * 3]
    assert counting(raw, torch.zeros(2)).all()


@pytest.mark.parametrize(
    ("combine", "weights", "expected"),
    [
        ("weighted_sum", [2.0, 1.0, 3.0], [2 * 1 + 5, -2 * 3.0, 2 * 3 + 2]),
        ("mean", [1.0, 1.0, 1.0], [3.0, -2.0, 2.5]),
        ("min", [1.0, 1.0, 1.0], [1.0, -2.0, 2.0]),
        ("mean_minus_std", [1.0, 1.0, 1.0], [3.0 - 2.0, -2.0, 2.5 - 0.5]),
    ],
)
def test_the_components_that_count_are_combined_as_asked(combine, weights, expected):
    parts = {
        "a": lambda p, r: [1.0, 9.0, 3.0],
        "b": lambda p, r: [5.0, 9.0, 2.0],
        "gated": lambda p, r: [0.0, -2.0, 7.0],  # below 0.15 for the second response
    }
    scorer = CombinedScorer(parts, weights, combine, 1.0, [None, None, 0.15])
    scores = score_responses(scorer, PROMPTS, RESPONSES, "x")
    assert_close(scores.total, torch.tensor(expected))
    assert scores.components["gated"].tolist() == [0.0, -2.0, 7.0]
    totals = torch.stack([*scores.components.values()])
    assert scorer.gated(totals).tolist() == [False, True, False]
    assert CombinedScorer(parts, weights).gated(totals) is None


@pytest.mark.parametrize("combine", ["weighted_sum", "mean"])
def test_rewards_per_token_count_where_their_component_does(combine):
    def flags(prompts, responses):
        return [-5.0, 5.0, 5.0]

    scorer = CombinedScorer({"h": halves, "f": flags}, [1.0, 1.0], combine, 1.0, [None, 0.5])
    scores = score_responses(scorer, PROMPTS, RESPONSES, "x", TOKENS)
    assert_close(scores.total, torch.tensor([-5.0, 0.9, 1.6]))
    for row, expected in zip(scores.dense, ([0.0] * 3, [0.9], [0.7, 0.9]), strict=True):
        assert_close(row, torch.tensor(expected))
    gated = CombinedScorer({"f": flags, "h": halves}, [1.0, 2.0], gates=[None, 0.75])
    scores = score_responses(gated, PROMPTS, RESPONSES, "x", TOKENS)  # sigmoids 0.85 0.71 0.83
    assert_close(scores.total, torch.tensor([-5.0, 1.8, 5.0]))
    assert_close(scores.dense[1], torch.tensor([1.8]))
    assert scores.dense[0].tolist() == [0.0] * 3


def test_a_gate_is_of_the_raw_score_of_a_reward_model(helpful, safe):
    sequences = rendered(policy_tokenizer())
    kind, raw = raw_scores(helpful, sequences) - MEAN, raw_scores(safe, sequences)
    low, middle, _ = raw.sigmoid().sort().values.tolist()
    gate = (low + middle) / 2
    components = [
        ScorerComponent(helpful, name="helpful"),
        ScorerComponent(safe, normalize="standardise", name="safe", gate=gate),
    ]
    scorer = load_scorer(ScorerConfig(components=components))
    below = raw.sigmoid() < gate
    expected = torch.where(below, (raw - MEAN) / STD, kind)
    assert below.sum() == 1
    assert not torch.equal(((raw - MEAN) / STD).sigmoid() < gate, below)  # or it shows nothing
    assert_close(scorer(PROMPTS, RESPONSES), expected, rtol=1e-5, atol=1e-6)


def test_ppo_reports_the_share_of_gated_responses(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path, missing_eos_penalty=None)
    components = [
        ScorerComponent(f"python:{__name__}.num_words"),
        ScorerComponent(f"python:{__name__}.minus_words", name="short", gate=0.2),
    ]
    config.scorer = ScorerConfig(components=components)
    metrics = make_trainer(config, tmp_path).step()
    rollout = make_trainer(config, tmp_path).collect()  # the same one
    words = rollout.component_scores[:, 0]
    gated = words >= 2.0  # sigmoid(-1) = 0.27, sigmoid(-2) = 0.12
    assert 0 < gated.sum() < 8
    assert metrics["gated_rate"] == pytest.approx(float(gated.float().mean()))
    assert_close(rollout.scores, torch.where(gated, -words, words))
    config.scorer.components[1].gate = None
    assert "gated_rate" not in make_trainer(config, tmp_path).step()


def minus_words(prompts, responses):
    """Score by words, fewer being better."""
    return [-float(words) for words in num_words(prompts, responses)]


def num_words(prompts, responses):
    """Score by words."""
    return [len(response.split()) for response in responses]


def test_the_component_that_fails_is_named(helpful):
    scorer = CombinedScorer({"words": num_words, "broken": lambda p, r: [1.0]}, [1.0, 1.0])
    with pytest.raises(InputError, match="the scorer's broken must return one score per response"):
        scorer(PROMPTS, RESPONSES)


# --- What a Python scorer may return --------------------------------------------------------------


@pytest.mark.parametrize(
    "result",
    [
        [1.5, -2.0, 0.0],
        (1.5, -2.0, 0.0),
        np.array([1.5, -2.0, 0.0]),
        torch.tensor([1.5, -2.0, 0.0], dtype=torch.float64, requires_grad=True),
        [torch.tensor(1.5), np.float32(-2.0), 0],
        iter([1.5, -2.0, 0.0]),
    ],
    ids=["list", "tuple", "array", "tensor", "mixed", "iterator"],
)
def test_any_numbers_are_scores(result):
    scores = checked_scores(lambda p, r: result, PROMPTS, RESPONSES, "x")
    assert scores.dtype == torch.float32 and not scores.requires_grad
    assert scores.tolist() == [1.5, -2.0, 0.0]


def failing(prompts, responses):
    """Raise."""
    raise ConnectionError("no route to host")


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, 2.0], r"one score per response: expected shape \(3,\), got \(2,\)"),
        ([], r"expected shape \(3,\), got \(0,\)"),
        ([[1.0], [2.0], [3.0]], r"expected shape \(3,\), got \(3, 1\); rewards per token need"),
        ([[1.0], [2.0, 3.0], []], r"expected shape \(3,\), got \(3, 1\)"),
        ([1.0, float("nan"), 2.0], "returned nan for 1 of 3 responses, the first being 'red blue"),
        ([1.0, 2.0, float("inf")], "returned inf for 1 of 3"),
        ([1.0, 1e39, 2.0], "returned inf for 1 of 3"),  # beyond float32
        ([1.0, None, 2.0], "failed on a batch of 3 responses: .*NoneType"),
        (["1", "2", "3"], "failed on a batch of 3 responses: "),
        ([1.0, 2.0, 3j], "failed on a batch of 3 responses: "),
        (1.0, "failed on a batch of 3 responses: TypeError: 'float' object is not iterable"),
        (None, "failed on a batch of 3 responses: TypeError: 'NoneType' object is not iterable"),
        (torch.tensor(1.0), "failed on a batch of 3 responses: TypeError"),
    ],
)
def test_anything_but_a_finite_number_per_response_stops_with_the_cause(result, message):
    with pytest.raises(InputError, match=f"^x .*{message}"):
        checked_scores(lambda p, r: result, PROMPTS, RESPONSES, "x")


def test_a_scorer_that_raises_stops_the_run_with_the_cause():
    with pytest.raises(InputError, match="x failed on .*: ConnectionError: no route to host") as e:
        checked_scores(failing, PROMPTS, RESPONSES, "x")
    assert isinstance(e.value.__cause__, ConnectionError)


def test_a_reward_model_that_gives_nan_stops_the_run(helpful):
    scorer = load_scorer(ScorerConfig(helpful))
    with torch.no_grad():
        scorer.model.model.score.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="x returned nan for 3 of 3 responses"):
        checked_scores(scorer, PROMPTS, RESPONSES, "x")


def test_scores_of_the_right_shape_pass_unchanged():
    scores = torch.tensor([1.0, 2.0])
    assert check_scores(scores, ["a", "b"], "x") is scores


# --- Rewards per token ----------------------------------------------------------------------------

IDS = [[7, 8, 2], [9], [7, 9]]
TOKENS = Tokens([[1]] * 3, IDS, "")


def halves(prompts, responses, response_ids):
    """A tenth of each token's id."""
    return [[token / 10 for token in ids] for ids in response_ids]


def test_rewards_per_token_add_up_to_the_score():
    scores = score_responses(halves, PROMPTS, RESPONSES, "x", TOKENS)
    assert_close(scores.total, torch.tensor([1.7, 0.9, 1.6]))
    for row, expected in zip(scores.dense, ([0.7, 0.8, 0.2], [0.9], [0.7, 0.9]), strict=True):
        assert_close(row, torch.tensor(expected))
    for kind in (np.array, torch.tensor, tuple):
        again = score_responses(
            lambda p, r, response_ids, kind=kind: list(map(kind, halves(p, r, response_ids))),
            PROMPTS,
            RESPONSES,
            "x",
            TOKENS,
        )
        assert_close(again.total, scores.total)


def test_a_scorer_that_is_given_ids_may_return_scores():
    def lengths(prompts, responses, response_ids=None):
        return [len(ids) for ids in response_ids] if response_ids else [0.0] * len(responses)

    scores = score_responses(lengths, PROMPTS, RESPONSES, "x", TOKENS)
    assert scores.dense is None and scores.total.tolist() == [3.0, 1.0, 2.0]
    assert checked_scores(lengths, PROMPTS, RESPONSES, "x").tolist() == [0.0] * 3


def test_a_scorer_may_have_a_signature_that_python_does_not_know():
    with pytest.raises(ValueError):
        inspect.signature(map)
    assert checked_scores(map, float, ["1.5", "2"], "x").tolist() == [1.5, 2.0]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([[1.0, 2.0], [1.0], [1.0, 1.0]], r"expected shape \(3,\), got \(2,\) for 'dog cat horse"),
        ([[1.0] * 3] * 3, r"expected shape \(1,\), got \(3,\) for 'red blue"),
        ([[1.0] * 3, 1.0, [1.0] * 2], r"expected shape \(1,\), got \(\) for 'red blue"),
        ([[1.0] * 3, [[1.0]], [1.0] * 2], r"expected shape \(1,\), got \(1, 1\)"),
        ([[1.0] * 3, [1.0]], "must return 3 lists of rewards, got 2"),
        ([[1.0] * 3, [float("nan")], [1.0] * 2], "returned .nan. for 'red blue"),
        ([[1.0] * 3, ["a"], [1.0] * 2], "failed on a batch of 3 responses"),
    ],
)
def test_rewards_per_token_that_do_not_fit_the_tokens_stop_the_run(result, message):
    with pytest.raises(InputError, match=f"^x .*{message}"):
        score_responses(lambda p, r, response_ids: result, PROMPTS, RESPONSES, "x", TOKENS)


def test_a_scorer_of_tokens_cannot_score_text():
    with pytest.raises(InputError, match="x needs response_ids, but these responses are text"):
        checked_scores(halves, PROMPTS, RESPONSES, "x")


def test_rewards_per_token_are_weighted_in_a_sum_and_a_mean_and_refused_elsewhere():
    parts = {"tokens": halves, "words": num_words, "again": halves}
    tenths = torch.tensor([1.7, 0.9, 1.6])
    words = torch.tensor([4.0, 3.0, 4.0])
    for combine, weights, of_tokens, of_words in (
        ("weighted_sum", [2.0, 0.5, -1.0], 1.0, 0.5),
        ("mean", [1.0, 1.0, 1.0], 2 / 3, 1 / 3),
    ):
        scorer = CombinedScorer(parts, weights, combine)
        scores = score_responses(scorer, PROMPTS, RESPONSES, "x", TOKENS)
        assert_close(scores.total, of_tokens * tenths + of_words * words)
        assert_close(scores.dense[0], of_tokens * torch.tensor([0.7, 0.8, 0.2]))
        assert_close(scores.dense_total, of_tokens * tenths)
        assert_close(scores.components["tokens"], tenths)
    for combine in ("min", "mean_minus_std"):
        scorer = CombinedScorer(parts, [1.0] * 3, combine)
        with pytest.raises(InputError, match=f"combine={combine} takes scores, but .* tokens giv"):
            score_responses(scorer, PROMPTS, RESPONSES, "x", TOKENS)


# --- In PPO ---------------------------------------------------------------------------------------


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
    assert_close(rollout.scores, expected.sum(dim=1) + at_end, rtol=1e-5, atol=1e-5)
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


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_components_stand_in_metrics_and_samples_beside_their_sum(policy_dir, tmp_path):
    tokenizer = load_tokenizer(ModelConfig(path=str(policy_dir)))
    config = make_config(policy_dir, tmp_path, missing_eos_penalty=None, num_updates=2)
    components = [
        ScorerComponent(write_reward_model(tmp_path / "kind", tokenizer, seed=1), weight=2.0),
        ScorerComponent(f"python:{__name__}.num_words", weight=-0.25),
    ]
    config.scorer = ScorerConfig(components=components)
    config.critic.init = "reward"
    folder = train_ppo(config).directory.parent
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(run_rank, (port, config, tmp_path), nprocs=2)
    alone = torch.load(tmp_path / "one.pt")
    assert alone[0]["component_scores"].shape == (8, 2)
    assert alone[1]["component_scores"].shape == (8, 0)
    for rank in range(2):
        for one, two in zip(alone, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            for name in ("response_ids", "scores", "dense_rewards", "component_scores"):
                assert_close(two[name], one[name], msg=lambda m, name=name: f"{name}: {m}")
