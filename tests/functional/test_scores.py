"""Tests of rlhf.functional.scores against hand-computed numbers.

Run: pytest tests/functional/test_scores.py
"""

from __future__ import annotations

import pytest
import torch
from helpers.tensors import close

from rlhf.functional import combine_scores, component_weights, counting

ALL = torch.ones(3, 2, dtype=torch.bool)


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
    weights = component_weights(ALL, weights, combine)
    close(combine_scores(scores, weights, combine, std_coef=1.5), expected)


def test_the_worked_example_of_combinations():
    scores, weights = torch.tensor([[1.0, 5.0], [3.0, 3.0]]), torch.tensor([1.0, 0.5])
    for combine, expected in (
        ("weighted_sum", [2.5, 6.5]),
        ("mean", [2.0, 4.0]),
        ("min", [1.0, 3.0]),
        ("mean_minus_std", [0.0, 2.0]),
    ):
        of_all = component_weights(ALL[:2], weights, combine)
        assert combine_scores(scores, of_all, combine, 2.0).tolist() == expected


COUNTS = torch.tensor([[True, False], [True, False], [False, True]])


def test_weights_are_zero_where_a_component_does_not_count():
    weights = torch.tensor([1.0, 0.5, -2.0])
    close(component_weights(COUNTS, weights, "weighted_sum"), [[1, 0], [0.5, 0], [0, -2]])
    for combine in ("mean", "min", "mean_minus_std"):
        close(component_weights(COUNTS, weights, combine), [[0.5, 0], [0.5, 0], [0, 1]])


@pytest.mark.parametrize(
    ("combine", "expected"),
    [("weighted_sum", [7, 7]), ("mean", [3.5, 7]), ("min", [3, 7]), ("mean_minus_std", [3.25, 7])],
)
def test_a_component_that_does_not_count_changes_nothing(combine, expected):
    scores = torch.tensor([[3.0, -99.0], [4.0, 99.0], [-99.0, 7.0]])
    weights = component_weights(COUNTS, torch.ones(3), combine)
    close(combine_scores(scores, weights, combine, std_coef=0.5), expected)


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
