"""What a Python scorer may return: one number per response, or one reward per token.

Run: python -m pytest tests/scorers/test_python_scorers.py
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from helpers.scorers import PROMPTS, RESPONSES, TOKENS, halves
from torch.testing import assert_close

from rlhf.config import InputError
from rlhf.scorers import score_responses, uncut_scores
from rlhf.scorers.call import require_valid_scores


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
    scores = uncut_scores(lambda p, r: result, PROMPTS, RESPONSES, "x")
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
        uncut_scores(lambda p, r: result, PROMPTS, RESPONSES, "x")


def test_a_scorer_that_raises_stops_the_run_with_the_cause():
    with pytest.raises(InputError, match="x failed on .*: ConnectionError: no route to host") as e:
        uncut_scores(failing, PROMPTS, RESPONSES, "x")
    assert isinstance(e.value.__cause__, ConnectionError)


def test_scores_of_the_right_shape_pass_unchanged():
    scores = torch.tensor([1.0, 2.0])
    assert require_valid_scores(scores, ["a", "b"], "x") is scores


# --- Rewards per token ----------------------------------------------------------------------------


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
    assert uncut_scores(lengths, PROMPTS, RESPONSES, "x").tolist() == [0.0] * 3


def test_a_scorer_may_have_a_signature_that_python_does_not_know():
    with pytest.raises(ValueError):
        inspect.signature(map)
    assert uncut_scores(map, float, ["1.5", "2"], "x").tolist() == [1.5, 2.0]


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
        uncut_scores(halves, PROMPTS, RESPONSES, "x")
