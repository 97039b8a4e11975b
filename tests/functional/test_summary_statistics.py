"""Tests of rlhf.functional.summary_statistics against hand-computed numbers and enumeration.

Run: pytest tests/functional/test_summary_statistics.py
"""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch
from helpers.tensors import INF, NAN, close, draw, exact, few, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from rlhf import functional as F
from rlhf.functional import calibration, correlation, kendall_tau

# normal_score


@pytest.mark.parametrize(
    "degrees, t, expected",  # two tables, at the same tail: 2.5 %, 0.5 %, 0.05 %
    [(3, 5.841, 2.576), (7, 2.365, 1.960), (7, 5.408, 3.291), (30, 2.750, 2.576)],
)
def test_normal_score_is_as_rare_as_t(degrees, t, expected):
    assert F.normal_score(t, degrees) == pytest.approx(expected, abs=0.04)
    assert F.normal_score(-t, degrees) == -F.normal_score(t, degrees)


def test_normal_score_is_t_for_many_numbers():
    assert F.normal_score(3.0, 10**7) == pytest.approx(3.0, rel=1e-5)
    assert F.normal_score(0.0, 7) == 0.0


# best_of_n


def test_best_of_n_by_hand():
    scores = torch.tensor([[1.0, 5.0, 3.0], [2.0, 2.0, -4.0]])
    close(F.best_of_n(scores, 1), [3.0, 0.0])
    close(F.best_of_n(scores, 2), [(5 + 3 + 5) / 3, 2.0])
    close(F.best_of_n(scores, 3), [5.0, 2.0])
    other = torch.tensor([[10.0, 20.0, 30.0], [1.0, 3.0, 9.0]])
    close(F.best_of_n(scores, 2, other), [(20 + 30 + 20) / 3, 2.0])
    close(F.best_of_n(scores, 3, other), [20.0, 2.0])  # tied: either of 1 and 3


def best_by_enumeration(scores, n, other):
    """Mean over all n-subsets; within a subset, mean of `other` over its best ones."""
    chosen = []
    for subset in itertools.combinations(range(len(scores)), n):
        best = max(scores[i] for i in subset)
        tied = [other[i] for i in subset if scores[i] == best]
        chosen.append(sum(tied) / len(tied))
    return sum(chosen) / len(chosen)


@few
@given(seed=seeds, num_samples=st.integers(1, 8), tied=st.booleans(), choose=st.integers(0, 7))
def test_best_of_n_equals_the_mean_over_all_subsets(seed, num_samples, tied, choose):
    n = choose % num_samples + 1
    scores, other = draw(seed, 3, num_samples), draw(seed + 1, 3, num_samples)
    scores = scores.round() if tied else scores
    for given_other, values in ((None, scores), (other, other)):
        rows = zip(scores.tolist(), values.tolist(), strict=True)
        expected = [best_by_enumeration(row, n, row_values) for row, row_values in rows]
        close(F.best_of_n(scores, n, given_other), expected)


def test_best_of_n_does_not_depend_on_the_order_of_tied_samples():
    scores, other = torch.tensor([[7.0, 7, 7, 1]]), torch.tensor([[0.0, 3, 6, 100]])
    order = [3, 2, 0, 1]
    for n in (1, 2, 3, 4):
        result = F.best_of_n(scores, n, other)
        close(F.best_of_n(scores[:, order], n, other[:, order]), result)
        close(result, [(0 + 3 + 6 + 100) / 4 if n == 1 else 3.0])


def test_best_of_n_stays_exact_with_many_samples():
    # Of the scores 1 .. N, the best of n is n (N + 1) / (n + 1) on average.
    scores = torch.arange(1, 2001).float()[torch.randperm(2000)][None]
    for n in (1, 2, 16, 500, 2000):
        close(F.best_of_n(scores, n), [n * 2001 / (n + 1)])


@pytest.mark.parametrize("name", ["scores", "other"])
def test_best_of_n_does_not_hide_a_nan(name):
    inputs = {"scores": draw(0, 2, 4), "other": draw(1, 2, 4)}
    inputs[name][0, 1] = NAN
    assert F.best_of_n(n=2, **inputs).isnan().tolist() == [True, False]


@pytest.mark.parametrize("n", [0, -1, 4])
def test_best_of_more_than_there_are_or_of_none_is_refused(n):
    with pytest.raises(ValueError, match=rf"n must be in 1 .. 3.*got {n}"):
        F.best_of_n(torch.zeros(2, 3), n)
    with pytest.raises(ValueError, match=r"scores must have shape \(P, N\), got \(3,\)"):
        F.best_of_n(torch.zeros(3), 1)


def test_best_of_n_kl_by_hand():
    for n, expected in ((1, 0.0), (2, math.log(2) - 1 / 2), (64, math.log(64) - 63 / 64)):
        assert F.best_of_n_kl(n) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        F.best_of_n_kl(0)


@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_best_of_n_kl_bounds_the_true_kl_and_is_reached_by_many_equal_samples(n):
    def true_kl(probs):
        # Sorted by score, the best of n is at most the k-th with probability cdf^n.
        within = torch.cat([torch.zeros(1), probs.cumsum(0)]).double() ** n
        return kl_divergence(Categorical(within.diff()), Categorical(probs.double())).item()

    assert true_kl(draw(0, 8).double().softmax(0)) <= F.best_of_n_kl(n) + 1e-12
    many = torch.full((100_000,), 1e-5, dtype=torch.float64)
    assert true_kl(many) == pytest.approx(F.best_of_n_kl(n), abs=1e-3)


# bootstrap_interval


@pytest.mark.parametrize("x", [[0.1], [0.1, 0.1, 0.1], [1000.1] * 7])
def test_the_interval_of_one_or_equal_measurements_is_a_point(x):
    x = torch.tensor(x)
    assert F.bootstrap_interval(x) == (x[0].item(), x[0].item())


@pytest.mark.parametrize("level, quantile", [(0.95, 1.959964), (0.8, 1.281552)])
def test_the_interval_of_a_mean_is_that_of_the_normal_distribution_for_many(level, quantile):
    x = 3 * draw(0, 1000) + 10
    lower, upper = F.bootstrap_interval(x, level, num_resamples=4000)
    error = x.double().std(unbiased=False).item() / math.sqrt(1000)
    mean = x.double().mean().item()
    assert lower == pytest.approx(mean - quantile * error, abs=0.15 * error)
    assert upper == pytest.approx(mean + quantile * error, abs=0.15 * error)


def test_the_interval_of_two_measurements_covers_all_their_resampled_means():
    # The means are 0, 1/2, 1 with probability 1/4, 1/2, 1/4.
    x = torch.tensor([0.0, 1.0])
    assert F.bootstrap_interval(x, level=0.95) == (0.0, 1.0)
    assert F.bootstrap_interval(x, level=0.4) == (0.5, 0.5)
    assert F.bootstrap_interval(x, level=0.95, num_resamples=1) in ((0, 0), (0.5, 0.5), (1, 1))


def test_the_interval_depends_on_its_seed_alone():
    x, state = draw(0, 20), torch.get_rng_state()
    first = F.bootstrap_interval(x, seed=3)
    exact(torch.get_rng_state(), state)  # nor does it draw from the global generator
    torch.manual_seed(2)
    assert F.bootstrap_interval(x, seed=3) == first != F.bootstrap_interval(x, seed=4)


def test_a_bootstrap_without_measurements_or_of_an_impossible_level_is_refused():
    for x in (torch.zeros(0), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match=r"x must have shape \(N,\), N >= 1"):
            F.bootstrap_interval(x)
    for level in (0.0, 1.0, 95.0):
        with pytest.raises(ValueError, match=r"level must be in \(0, 1\)"):
            F.bootstrap_interval(torch.zeros(2), level)


def test_a_bootstrap_does_not_hide_a_nan():
    assert all(math.isnan(end) for end in F.bootstrap_interval(torch.tensor([1.0, NAN, 2.0])))


def test_clusters_are_drawn_whole_and_weigh_by_what_they_hold():
    # Clusters {0, 0, 0} and {1}: the means are 0, 1/4, 1 with probability 1/4, 1/2, 1/4.
    x, clusters = torch.tensor([0.0, 1.0, 0.0, 0.0]), torch.tensor([7, -2, 7, 7])
    assert F.bootstrap_interval(x, clusters=clusters) == (0.0, 1.0)
    assert F.bootstrap_interval(x, level=0.4, clusters=clusters) == (0.25, 0.25)


def test_clusters_of_one_change_nothing():
    x = draw(0, 20)
    own = torch.arange(20).flip(0) * 3
    # The same measurements in another order, as `clusters` sorts them.
    assert F.bootstrap_interval(x, clusters=own) == pytest.approx(F.bootstrap_interval(x.flip(0)))


@few
@given(seed=seeds, size=st.integers(2, 30))
def test_copies_of_a_measurement_in_its_cluster_do_not_narrow_the_interval(seed, size):
    x = draw(seed, size)
    clusters = torch.arange(size).repeat_interleave(9)
    copied = F.bootstrap_interval(x.repeat_interleave(9), clusters=clusters)
    assert copied == pytest.approx(F.bootstrap_interval(x), abs=1e-6)


def test_a_cluster_for_each_measurement_is_demanded():
    with pytest.raises(ValueError, match=r"clusters must have shape \(3,\), got \(2,\)"):
        F.bootstrap_interval(torch.zeros(3), clusters=torch.zeros(2))


def test_the_interval_does_not_depend_on_how_many_draws_are_made_at_once():
    # 1500 measurements are drawn 699 times at once; one resample at a time by hand.
    x, generator = draw(0, 1500), torch.Generator().manual_seed(0)
    draws = [torch.randint(1500, (1500,), generator=generator) for _ in range(2000)]
    means = torch.stack([x.double()[chosen].mean() for chosen in draws])
    expected = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert F.bootstrap_interval(x) == pytest.approx(expected, rel=1e-9)


# correlation, kendall_tau


def test_correlation_by_hand():
    x, y = torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 2, 9])
    assert correlation(x, y) == pytest.approx(8 / math.sqrt(2 * 38), rel=1e-12)
    assert correlation(x, y, "spearman") == pytest.approx(1, rel=1e-12)
    assert correlation(x, -y) == pytest.approx(-8 / math.sqrt(2 * 38), rel=1e-12)
    # Ranks 0 1.5 1.5 3 against 0 1 2 3: covariance 4.5, squares 4.5 and 5.
    tied, steps = torch.tensor([5, 7, 7, 9]), torch.tensor([1, 20, 300, 4000])
    assert correlation(tied, steps, "spearman") == pytest.approx(4.5 / math.sqrt(22.5), rel=1e-12)


@few
@given(seed=seeds, size=st.integers(2, 30))
def test_correlation_equals_that_of_numpy(seed, size):
    x, y = draw(seed, size).double(), draw(seed + 1, size).double()
    expected = numpy.corrcoef(x, y)[0, 1]
    assert correlation(x, y) == pytest.approx(expected, abs=1e-9)
    ranks = [v.argsort().argsort().numpy() for v in (x, y)]
    expected = numpy.corrcoef(*ranks)[0, 1]
    assert correlation(x, y, "spearman") == pytest.approx(expected, abs=1e-9)


def test_kendall_tau_by_hand():
    x = torch.tensor([1.0, 2, 3, 4])
    assert kendall_tau(x, torch.tensor([1.0, 3, 2, 4])) == pytest.approx(4 / 6, rel=1e-12)
    assert kendall_tau(x, -x) == pytest.approx(-1, rel=1e-12)
    # One of three pairs is tied in x; the others agree.
    tied, steps = torch.tensor([1, 1, 2]), torch.tensor([1, 2, 3])
    assert kendall_tau(tied, steps) == pytest.approx(2 / math.sqrt(2 * 3), rel=1e-12)


@few
@given(seed=seeds, size=st.integers(2, 9))
def test_kendall_tau_counts_pairs(seed, size):
    x, y = (2 * draw(seed, size)).round(), (2 * draw(seed + 1, size)).round()
    pairs = list(itertools.combinations(zip(x.tolist(), y.tolist(), strict=True), 2))
    products = [(a[0] - b[0]) * (a[1] - b[1]) for a, b in pairs]
    untied = [sum(a[i] != b[i] for a, b in pairs) for i in (0, 1)]
    result = kendall_tau(x, y)
    if 0 in untied:
        assert math.isnan(result)
    else:
        alike = sum(p > 0 for p in products) - sum(p < 0 for p in products)
        assert result == pytest.approx(alike / math.sqrt(untied[0] * untied[1]), abs=1e-12)


@pytest.mark.parametrize("measure", ["pearson", "spearman", "tau"])
@pytest.mark.parametrize("x", [[0.1, 0.1, 0.1], [4.0, NAN, 2.0]])
def test_what_does_not_vary_or_is_nan_correlates_with_nothing(measure, x):
    x, y = torch.tensor(x), torch.tensor([3.0, 1.0, 2.0])
    for first, second in ((x, y), (y, x)):
        if measure == "tau":
            assert math.isnan(kendall_tau(first, second))
        else:
            assert math.isnan(correlation(first, second, measure))


def test_unknown_correlations_and_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="pearson or spearman, got 'cosine'"):
        correlation(torch.zeros(2), torch.zeros(2), "cosine")
    for measure in (correlation, kendall_tau):
        with pytest.raises(ValueError, match=r"y must have shape \(2,\), got \(1,\)"):
            measure(torch.zeros(2), torch.zeros(1))


# calibration


def test_calibration_by_hand():
    # Probability 0.85, right in two of three; two ties; probability 0.65, right.
    gaps = torch.tensor([17 / 3, 3 / 17, 17 / 3, 1.0, 1.0, 13 / 7]).log()
    result = calibration(gaps, num_bins=5)  # edges 0.5 0.6 0.7 0.8 0.9 1
    assert result.counts.tolist() == [2, 1, 0, 3, 0]
    predicted, observed = [0.5, 0.65, NAN, 0.85, NAN], [0.5, 1.0, NAN, 2 / 3, NAN]
    for values, expected in ((result.predicted, predicted), (result.observed, observed)):
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(values, expected, equal_nan=True, rtol=1e-6, atol=1e-6)
    assert result.ece == pytest.approx(((1 - 0.65) + 3 * (0.85 - 2 / 3)) / 6, rel=1e-6)
    squares = 2 * 0.15**2 + 0.85**2 + 2 * 0.5**2 + 0.35**2
    assert result.brier == pytest.approx(squares / 6, rel=1e-6)


def preferences(seed, temperature):
    """Score differences, signed by outcomes that sigmoid(difference / temperature) predicts."""
    generator = torch.Generator().manual_seed(seed)
    gaps = 2 * torch.randn(20_000, generator=generator)
    won = torch.rand(20_000, generator=generator) < (gaps / temperature).sigmoid()
    return torch.where(won, gaps, -gaps)


def test_true_probabilities_are_calibrated_and_overconfident_ones_are_not():
    fair, over, under = (calibration(preferences(0, t)) for t in (1.0, 4.0, 0.25))
    assert fair.ece < 0.02
    assert over.ece > 0.1 and (over.predicted > over.observed)[1:].all()
    assert under.ece > 0.1 and (under.predicted < under.observed)[1:-1].all()
    assert fair.brier < calibration(10 * preferences(0, 1.0)).brier
    assert fair.brier < calibration(0 * preferences(0, 1.0)).brier == 0.25


def test_extreme_scores_are_calibrated_without_nan():
    result = calibration(torch.tensor([1e4, INF, -1e4]))
    assert result.counts.tolist() == [0] * 9 + [3]
    assert result.ece == pytest.approx(1 / 3) and result.brier == pytest.approx(1 / 3)


def test_a_calibration_of_nothing_or_of_nan_is_refused():
    for gaps in (torch.zeros(0), torch.zeros(2, 3), torch.tensor([1.0, NAN])):
        with pytest.raises(ValueError, match=r"gaps must be \(N,\) numbers"):
            calibration(gaps)


# wins


def test_wins_count_ties_half_and_show_nan():
    scores = torch.tensor([1.0, 2.0, 3.0, INF, -INF, NAN, 0.0])
    baseline = torch.tensor([0.0, 2.0, 4.0, INF, 0.0, 0.0, NAN])
    expected = [1.0, 0.5, 0.0, 0.5, 0.0, NAN, NAN]
    torch.testing.assert_close(F.wins(scores, baseline), torch.tensor(expected), equal_nan=True)


def test_wins_of_both_sides_add_up_to_one_at_any_precision():
    scores, baseline = draw(0, 50).round().bfloat16(), draw(1, 50).round().double()
    won = F.wins(scores, baseline)
    assert won.dtype == torch.float32 and {0.0, 0.5, 1.0} == set(won.tolist())
    exact(won + F.wins(baseline, scores), torch.ones(50))
