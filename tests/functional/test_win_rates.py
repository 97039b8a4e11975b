"""Win rates: published arithmetic, known coefficients, the coverage of corrected intervals.

Run: python -m pytest tests/functional/test_win_rates.py
"""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.functional import geometric_mean, length_controlled, prediction_powered_mean, win_rate


@pytest.mark.parametrize(
    ("counts", "published"),
    [  # AlpacaEval 1, wins, losses and ties of 805 against text-davinci-003
        ((205, 584, 16), 26.46),  # alpaca-7b
        ((566, 237, 2), 70.43),  # vicuna-13b
        ((366, 435, 4), 45.71),  # falcon-40b-instruct
        ((90, 89, 0), 50.28),  # Alpaca against text-davinci-003, by its authors
    ],
)
def test_alpaca_evals_win_rates_follow_from_their_counts(counts, published):
    assert round(100 * win_rate(*counts), 2) == published


def test_counts_that_are_none_are_refused():
    for counts in ((0, 0, 0), (1, -1, 0)):
        with pytest.raises(ValueError, match="counts must be >= 0"):
            win_rate(*counts)


@pytest.mark.parametrize(
    ("accuracies", "published"),
    [  # OBQA, ARC-e, WinoG, HellaS, ARC-c, PIQA, BoolQ on Dolly's model card
        ([0.384, 0.611532, 0.589582, 0.650767, 0.370307, 0.742655, 0.575535], 0.544886),
        ([0.408, 0.63931, 0.616417, 0.707927, 0.388225, 0.757889, 0.568196], 0.56781),
        ([0.392, 0.633838, 0.607735, 0.686517, 0.406997, 0.750816, 0.644037], 0.573487),
        ([0.41, 0.62963, 0.643252, 0.676758, 0.384812, 0.773667, 0.687768], 0.583431),
    ],
    ids=["dolly-v2-3b", "dolly-v2-12b", "dolly-v2-7b", "dolly-v1-6b"],
)
def test_dollys_geometric_means_follow_from_their_table(accuracies, published):
    assert geometric_mean(torch.tensor(accuracies)) == pytest.approx(published, abs=2e-5)


def test_a_task_with_nothing_right_has_a_geometric_mean_of_0():
    assert geometric_mean(torch.tensor([0.0, 0.9])) == 0.0
    with pytest.raises(ValueError, match="numbers >= 0, at least one"):
        geometric_mean(torch.tensor([]))


def judgements(quality, length, num, seed=0, bias=0.0):
    """Simulated preferences and length gaps of a judge whose log-odds are known."""
    generator = torch.Generator().manual_seed(seed)
    gaps = 200 * torch.randn(num, generator=generator).double() + bias
    odds = quality + length * torch.tanh(gaps / gaps.std())
    return (torch.rand(num, generator=generator) < odds.sigmoid()).double(), gaps


@pytest.mark.parametrize(("quality", "length"), [(0.0, 1.5), (0.8, 0.0), (-0.5, -1.0)])
def test_the_regression_recovers_known_coefficients(quality, length):
    found = length_controlled(*judgements(quality, length, 40_000), num_resamples=10)
    assert found.quality == pytest.approx(quality, abs=0.05)
    assert found.length == pytest.approx(length, abs=0.06)
    assert found.win_rate == pytest.approx(1 / (1 + math.exp(-quality)), abs=0.012)


def test_a_model_that_only_writes_more_is_not_better_at_equal_length():
    preferences, gaps = judgements(0.0, 2.0, 2000, bias=150.0)
    found = length_controlled(preferences, gaps)
    assert preferences.mean() > 0.65 and found.low < 0.5 < found.high
    assert 0.03 < found.high - found.low < 0.1


def test_the_interval_at_equal_length_covers_the_truth():
    inside = 0
    for seed in range(60):
        found = length_controlled(*judgements(0.4, 1.0, 200, seed), num_resamples=100)
        inside += found.low <= 1 / (1 + math.exp(-0.4)) <= found.high
    assert 53 <= inside  # of 60; 95 % is 57


def test_equal_lengths_leave_the_win_rate_as_it_is():
    preferences = torch.tensor([1.0, 1.0, 0.5, 0.0])
    found = length_controlled(preferences, torch.full((4,), 7.0))
    assert found.win_rate == pytest.approx(0.625, abs=1e-3) and found.length == 0


def test_a_model_that_always_wins_has_a_win_rate_near_1():
    found = length_controlled(torch.ones(50), torch.arange(50.0))
    assert 0.99 < found.win_rate <= 1 and math.isfinite(found.length)
    assert length_controlled(torch.ones(1), torch.ones(1)).win_rate > 0.9
    with pytest.raises(ValueError, match="preferences must lie in"):
        length_controlled(torch.tensor([2.0]), torch.ones(1))


def labels(num, generator, truth=0.6, wins_read=0.95, losses_read=0.45):
    """True preferences, and those of a judge that takes 45 % of the losses for wins."""
    gold = (torch.rand(num, generator=generator) < truth).double()
    rate = torch.where(gold == 1, wins_read, losses_read).double()
    return gold, (torch.rand(num, generator=generator) < rate).double()


def simulated(num_gold, num_runs=400, num_rest=600, **judge):
    """Shares of intervals that cover the truth, corrected and not; mean widths of the corrected one
    and of that of the gold labels alone."""
    generator = torch.Generator().manual_seed(1)
    truth = judge.get("truth", 0.6)
    covered = naive = 0
    widths, alone = [], []
    for _ in range(num_runs):
        gold, judged = labels(num_gold, generator, **judge)
        _, rest = labels(num_rest, generator, **judge)
        found = prediction_powered_mean(gold, judged, rest)
        covered += found.low <= truth <= found.high
        half = 1.96 * (rest.var() / num_rest).sqrt()
        naive += abs(rest.mean() - truth) <= half
        widths.append(found.high - found.low)
        alone.append(float(2 * 1.96 * (gold.var() / num_gold).sqrt()))
    return covered / num_runs, naive / num_runs, sum(widths) / num_runs, sum(alone) / num_runs


def test_a_biased_judge_is_corrected_with_an_interval_that_covers_the_truth():
    covered, naive, width, alone = simulated(100)
    assert 0.93 <= covered <= 0.99 and naive < 0.01
    assert width < alone


def test_a_good_judge_makes_few_labels_worth_many():
    covered, _, width, alone = simulated(100, wins_read=0.97, losses_read=0.03)
    assert covered >= 0.94 and width < 0.6 * alone


@pytest.mark.parametrize("num_gold", [10, 30])
def test_few_labels_give_wide_intervals_and_no_false_confidence(num_gold):
    covered, *_ = simulated(num_gold, wins_read=0.98, losses_read=0.02)
    assert covered >= 0.94


def test_a_judge_that_guesses_is_not_trusted():
    generator = torch.Generator().manual_seed(3)
    gold, judged = labels(200, generator, wins_read=0.5, losses_read=0.5)
    found = prediction_powered_mean(gold, judged, labels(600, generator, 0.6, 0.5, 0.5)[1])
    assert found.trust < 0.2 and found.mean == pytest.approx(float(gold.mean()), abs=0.02)


def test_a_worked_example():
    """gold 1 1 0 0, judge 1 1 1 0, rest 1 1 1 0: lambda = (1/6) / ((3/14) x 2) = 7/18."""
    gold, judged = torch.tensor([1.0, 1, 0, 0]), torch.tensor([1.0, 1, 1, 0])
    found = prediction_powered_mean(gold, judged, judged)
    assert found.trust == pytest.approx(7 / 18) and found.mean == pytest.approx(0.5)
    with pytest.raises(ValueError, match="expected 2 gold labels and 1 other row or more"):
        prediction_powered_mean(gold[:1], judged[:1], judged)
