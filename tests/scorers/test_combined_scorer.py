"""Several scorers as one: weights, ensembles, gates, and rewards per token.

Leaves out the formulas (tests/functional/test_scores.py).

Run: python -m pytest tests/scorers/test_combined_scorer.py
"""

from __future__ import annotations

import pytest
import torch
from helpers.scorers import (
    MEAN,
    PROMPTS,
    RESPONSES,
    STD,
    TOKENS,
    halves,
    num_words,
    policy_tokenizer,
    raw_scores,
    rendered,
)
from helpers.tiny_ppo import make_config, make_trainer
from torch.testing import assert_close

from rlhf.config import InputError, ScorerComponent, ScorerConfig
from rlhf.scorers import CombinedScorer, load_scorer, score_responses


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


def test_a_reward_model_reads_before_a_function_that_may_fail_on_one_process(helpful, monkeypatch):
    model, asked = load_scorer(ScorerConfig(helpful)), []
    plain = model.score
    monkeypatch.setattr(model, "score", lambda *a: asked.append("model") or plain(*a))
    parts = {"function": lambda p, r: asked.append("function") or [1.0] * 3, "model": model}
    scores = score_responses(CombinedScorer(parts, [1.0, 1.0]), PROMPTS, RESPONSES, "x")
    assert asked == ["model", "function"]
    assert list(scores.components) == ["function", "model"]
    assert scores.components["function"].tolist() == [1.0] * 3


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


def test_the_component_that_fails_is_named(helpful):
    scorer = CombinedScorer({"words": num_words, "broken": lambda p, r: [1.0]}, [1.0, 1.0])
    with pytest.raises(InputError, match="the scorer's broken must return one score per response"):
        scorer(PROMPTS, RESPONSES)


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
        message = f"combine={combine} takes one score per response, but .* tokens giv"
        with pytest.raises(InputError, match=message):
            score_responses(scorer, PROMPTS, RESPONSES, "x", TOKENS)
