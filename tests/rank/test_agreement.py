"""Agreement of annotators: published values, cases done by hand, intervals.

Run: python -m pytest tests/rank/test_agreement.py
"""

from __future__ import annotations

import math
import random

import pytest

from rlhf.rank.agreement import alpha_of_units, mean_ranks, ordinal_alpha, pairwise_agreement, share

# Krippendorff 2011, section C: four observers, twelve units, with missing values (0 here)
OBSERVERS = """
1 2 3 3 2 1 4 1 2 0 0 0
1 2 3 3 2 2 4 1 2 5 0 3
0 3 3 3 2 3 4 2 2 5 1 0
1 2 3 3 2 4 4 1 2 5 1 0
"""


def test_alpha_has_the_published_value_of_krippendorffs_example():
    columns = zip(*(map(int, line.split()) for line in OBSERVERS.split("\n") if line), strict=True)
    units = [[value for value in column if value] for column in columns]
    # published: ordinal 0.815, where nominal is 0.743, interval 0.849 and ratio 0.797
    assert alpha_of_units([[unit] for unit in units]).value == pytest.approx(0.815, abs=5e-4)


def test_tied_answers_share_the_mean_of_their_places():
    assert mean_ranks([0, 1, 1, 2]) == [0, 1.5, 1.5, 3]
    assert mean_ranks([4, 4]) == [0.5, 0.5]


def test_equal_rankings_have_alpha_one_and_reversed_ones_a_negative_alpha():
    equal, reverse = [[0, 1, 2], [0, 1, 2]], [[0, 1, 2], [2, 1, 0]]
    assert ordinal_alpha([equal, equal]).value == 1
    assert ordinal_alpha([reverse, reverse]).value < -0.5


def test_random_rankings_have_an_alpha_near_zero_inside_its_interval():
    draw = random.Random(1)
    prompts = [[draw.sample(range(4), 4) for _ in range(2)] for _ in range(200)]
    alpha, pairs = ordinal_alpha(prompts), pairwise_agreement(prompts)
    assert alpha.low < 0 < alpha.high and alpha.high - alpha.low < 0.4
    assert pairs.low < 0.5 < pairs.high


def test_pairwise_agreement_counts_a_tie_of_one_annotator_half():
    # pairs (0,1) (0,2) (1,2): alike, alike, tie against an order
    assert pairwise_agreement([[[0, 1, 2], [0, 1, 1]]]).value == pytest.approx(2.5 / 3)
    assert pairwise_agreement([[[0, 0], [1, 1]]]).value == 1


def test_prompts_with_one_annotator_change_nothing():
    both = [[[0, 1, 2], [0, 2, 1]], [[0, 1, 2], [2, 1, 0]]]
    alone = [[[0, 1, 2]], []]
    assert ordinal_alpha(both + alone) == ordinal_alpha(both)
    assert pairwise_agreement(both + alone) == pairwise_agreement(both)


def test_without_two_annotators_there_is_no_number():
    assert all(map(math.isnan, ordinal_alpha([[[0, 1]]])))
    assert all(map(math.isnan, pairwise_agreement([])))


def test_one_prompt_gives_a_number_without_an_interval():
    found = share([[1.0, 0.0]])
    assert found.value == 0.5 and math.isnan(found.low)


def test_the_interval_resamples_whole_prompts():
    """Ten equal numbers of one prompt are worth one number."""
    alone = share([[float(i % 2)] for i in range(20)])
    copied = share([[float(i % 2)] * 10 for i in range(20)])
    assert copied == pytest.approx(alone)
