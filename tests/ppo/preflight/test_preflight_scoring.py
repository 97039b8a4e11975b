"""The preflight of the scorer: faults, length, the missing EOS, the best of n.

Run: python -m pytest tests/ppo/preflight/test_preflight_scoring.py
"""

from __future__ import annotations

import pytest
import torch
from helpers.preflight import (
    against_length,
    by_length,
    constant,
    leaky,
    letters,
    look,
    noisy,
    one_at_most,
    opposite,
    scored_by,
    slightly_leaky,
    some_nan,
    very_low,
)

from rlhf.ppo.preflight.samples import examine_best_of_n, examine_scorer

SCORERS = [
    (constant, "scorer", "FAIL", "a constant, there is nothing to learn"),
    (some_nan, "scorer", "FAIL", "returned nan for"),
    (one_at_most, "scorer", "FAIL", "correct the scorer, or its input"),
    (noisy, "scorer", "WARN", "make the scorer deterministic"),
    (leaky, "scorer", "FAIL", "check the padding and attention mask"),
    (slightly_leaky, "scorer", "WARN", "check the padding and attention mask"),
    (by_length, "length", "WARN", "PPO would learn to write more"),
    (against_length, "length", "WARN", "PPO would learn to write less"),
    (letters, "scorer", "ok", "alone or in a batch it differs by 0"),
    (letters, "length", "ok", "correlation"),
]


@pytest.mark.parametrize(("scorer", "name", "status", "text"), SCORERS)
def test_a_scorer_is_judged(policy_dir, tmp_path, capsys, scorer, name, status, text):
    found, bottom, message = look(scored_by(policy_dir, tmp_path, scorer), capsys)
    assert found[name][0] == status and text in found[name][1], found[name]
    assert ("failed: scorer" in bottom) == (status == "FAIL") == bool(message)
    assert ("best of n" in found) == (status != "FAIL")


def test_padding_is_tried_with_the_longest_response():
    lengths = torch.arange(1, 13)

    def score(rows):
        """Three of twelve tokens of padding leak."""
        width = max(rows) + 1
        return torch.tensor([(row % 3) + 0.5 * (width - row > 8) for row in rows])

    scores = torch.tensor([row % 3.0 for row in range(12)])
    assert examine_scorer(score, scores, lengths, 0.0, 1e-4).status == "FAIL"
    assert examine_scorer(lambda rows: scores[rows], scores, lengths, 0.0, 1e-4).status == "ok"


def test_a_penalty_above_the_scores_is_warned_about(policy_dir, tmp_path, capsys):
    for scorer, whiten, status in (
        (letters, False, "ok"),
        (very_low, True, "ok"),  # about 0 on the scale of whitened scores
        (very_low, False, "WARN"),
    ):
        knobs = {"missing_eos_penalty": -1.0, "whiten_scores": whiten}
        trainer = scored_by(policy_dir, tmp_path, scorer, **knobs)
        found, _, _ = look(trainer, capsys)
        assert found["missing EOS"][0] == status
    assert "not ending pays" in found["missing EOS"][1]


def test_best_of_n_counts_the_penalty_as_ppo_does(policy_dir, tmp_path, capsys):
    trainer = scored_by(policy_dir, tmp_path, letters, missing_eos_penalty=-100.0)
    words = look(trainer, capsys)[0]["best of n"][1].split()
    mean = float(words[words.index("scorer", words.index("of", 20)) + 1])
    assert -90 < mean < -10  # about half of the responses end


def test_best_of_n_shows_expected_maxima_and_what_they_are_worth():
    scores = torch.arange(16.0).repeat(3, 1)[:, torch.randperm(16)]
    finding = examine_best_of_n(scores, None, 0.0)
    # of 16 numbers, 0 to 15: the mean, the expected largest of 4 (4 * 17 / 5 - 1), the largest
    row = finding.details.splitlines()[-1]
    assert row.split() == ["scorer", *"7.5 [7.5, 7.5] 12.6 [12.6, 12.6] 15 [15, 15]".split()]
    assert finding.status == "ok" and "best of 16 (1.8 nats of KL)" in finding.text
    finding = examine_best_of_n(scores, 2 * scores, 0.0)
    assert finding.status == "ok" and "+15 [15, 15] by evaluation.scorer" in finding.text
    assert finding.details.splitlines()[-1].split()[-3:] == ["30", "[30,", "30]"]
    finding = examine_best_of_n(scores, -scores, 0.0)
    assert finding.status == "WARN" and "the reward model is at fault" in finding.remedy
    mixed = scores * torch.tensor([[1.0], [1.0], [-1.0]])
    finding = examine_best_of_n(scores, mixed, 0.0)
    assert finding.status == "WARN" and "not clearly better" in finding.text
    finding = examine_best_of_n(torch.tensor([[1.0], [5.0]]).expand(2, 16), None, 0.0)
    assert finding.status == "WARN" and "raise ppo.temperature" in finding.remedy


@pytest.mark.parametrize(("independent", "status"), [(letters, "ok"), (opposite, "WARN")])
def test_the_scorers_choice_is_judged_by_the_independent_scorer(
    policy_dir, tmp_path, capsys, independent, status
):
    found, _, _ = look(scored_by(policy_dir, tmp_path, letters), capsys, independent)
    assert found["best of n"][0] == status and "evaluation.scorer" in found["best of n"][1]
    found, _, message = look(scored_by(policy_dir, tmp_path, letters), capsys, some_nan)
    assert found["best of n"][0] == "FAIL" and "evaluation.scorer returned nan" in message
