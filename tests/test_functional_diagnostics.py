"""Tests of rlhf.functional.diagnostics against hand-computed numbers and enumeration.

Run: pytest tests/test_functional_diagnostics.py
"""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import INF, NAN, close, draw, draw_mask, exact, few, leaf, seeds
from torch.distributions import Categorical, kl_divergence

from rlhf import functional as F

# explained_variance


@pytest.mark.parametrize(
    "values, expected",
    [
        ([1.0, 2.0, 4.0], 2 / 3),  # errors 0, 0, -1: variance 2/9 of 2/3
        ([1.0, 2.0, 3.0], 1.0),
        ([8.0, 9.0, 10.0], 1.0),  # a constant offset is not variance
        ([5.0, 5.0, 5.0], 0.0),
        ([3.0, 2.0, 1.0], -3.0),  # errors -2, 0, 2: variance 8/3
    ],
)
def test_explained_variance_by_hand(values, expected):
    values, returns = torch.tensor([[*values, NAN]]), torch.tensor([[1.0, 2.0, 3.0, INF]])
    mask = torch.tensor([[True, True, True, False]])
    result = F.explained_variance(leaf(values), returns, mask)
    close(result, expected)
    assert result.shape == () and not result.requires_grad


@few
@given(seed=seeds, num_rows=st.integers(1, 4), length=st.integers(2, 6))
def test_explained_variance_equals_one_minus_the_ratio_of_variances(seed, num_rows, length):
    values, returns = draw(seed, num_rows, length), 2 * draw(seed + 1, num_rows, length)
    mask = draw_mask(seed, num_rows, length)
    mask[0, :2] = True  # two different returns
    targets, errors = returns[mask].double(), (returns - values)[mask].double()
    # Two returns that almost coincide leave few digits.
    close(F.explained_variance(values, returns, mask), 1 - errors.var() / targets.var(), atol=1e-3)


@pytest.mark.parametrize("num_valid", [0, 1, 7])
def test_explained_variance_is_zero_where_there_is_nothing_to_explain(num_valid):
    returns, values = torch.full((1, 7), 1000.1), draw(0, 1, 7)
    mask = (torch.arange(7) < num_valid)[None]
    exact(F.explained_variance(values, returns, mask), torch.tensor(0.0))


def test_explained_variance_does_not_hide_a_valid_nan():
    returns = torch.tensor([[1.0, NAN, 2.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert F.explained_variance(torch.zeros(1, 3), returns, mask).isnan()


# update_moments


def test_moments_by_hand():
    moments = F.update_moments(F.Moments(), torch.tensor([1.0, 2.0]))
    assert moments == F.Moments(count=2.0, mean=1.5, m2=0.5)
    moments = F.update_moments(moments, torch.tensor([[6.0]]))
    assert moments == pytest.approx((3, 3.0, 4 + 1 + 9))
    assert moments.std == pytest.approx(math.sqrt(14 / 3))  # biased


def test_moments_of_nothing_are_zero_and_stay_so_without_elements():
    assert F.Moments() == (0.0, 0.0, 0.0) and F.Moments().std == 0.0
    seen = F.Moments(2.0, 1.5, 0.5)
    for moments in (F.Moments(), seen):
        assert F.update_moments(moments, torch.zeros(0, 3)) == moments


@few
@given(seed=seeds, sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_moments_batch_by_batch_are_those_of_all_at_once(seed, sizes):
    batches = [3 * draw(seed + i, size) + 1000 * i for i, size in enumerate(sizes)]
    moments = F.Moments()
    for batch in batches:
        moments = F.update_moments(moments, batch)
    whole = torch.cat(batches).double()
    assert moments.count == len(whole)
    if len(whole):
        assert moments.mean == pytest.approx(whole.mean().item(), rel=1e-12)
        assert moments.std == pytest.approx(whole.std(unbiased=False).item(), rel=1e-10, abs=1e-10)


def test_moments_keep_the_spread_beside_a_large_mean():
    moments = F.Moments()
    for _ in range(500):
        moments = F.update_moments(moments, torch.tensor([1e9, 1e9 + 2], dtype=torch.float64))
    assert moments == pytest.approx((1000, 1e9 + 1, 1000), rel=1e-12)


def test_moments_survive_json_and_are_plain_floats():
    moments = F.update_moments(F.Moments(), leaf(torch.tensor([0.1, 0.7])).bfloat16())
    assert all(type(number) is float for number in moments)
    restored = F.Moments(*json.loads(json.dumps(moments)))
    assert restored == moments and restored.std == moments.std


def test_moments_do_not_hide_a_nan():
    moments = F.update_moments(F.Moments(2.0, 1.5, 0.5), torch.tensor([1.0, NAN]))
    assert math.isnan(moments.mean) and math.isnan(moments.std)


# adaptive_kl_coef


@pytest.mark.parametrize(
    "kl, expected",
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 0.0512)),  # 10 % above: dearer
        (5.4, 0.1 * (1 - 0.1 * 0.0512)),  # 10 % below: cheaper
        (60.0, 0.1 * (1 + 0.2 * 0.0512)),  # at most 20 %
        (0.0, 0.1 * (1 - 0.2 * 0.0512)),
        (-3.0, 0.1 * (1 - 0.2 * 0.0512)),  # k1 may come out negative
    ],
)
def test_the_kl_coefficient_follows_the_relative_error_clipped_at_a_fifth(kl, expected):
    coef = F.adaptive_kl_coef(0.1, kl, target=6.0, horizon=10_000, num_sequences=512)
    assert coef == pytest.approx(expected, rel=1e-12)


def test_the_kl_coefficient_never_becomes_negative_nor_hides_a_nan():
    assert F.adaptive_kl_coef(0.1, 0.0, target=6.0, horizon=10, num_sequences=100) == 0.0
    assert math.isnan(F.adaptive_kl_coef(0.1, NAN, target=6.0, horizon=10, num_sequences=1))


def test_the_kl_coefficient_settles_where_the_kl_is_on_target():
    # A world in which doubling the price halves the KL: 6 nats cost 0.5.
    coef = 0.1
    for _ in range(500):
        coef = F.adaptive_kl_coef(coef, 3 / coef, target=6.0, horizon=1000, num_sequences=100)
    assert coef == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("target, horizon", [(0.0, 10), (-1.0, 10), (6.0, 0), (NAN, 10)])
def test_a_target_or_horizon_that_is_not_positive_is_refused(target, horizon):
    with pytest.raises(ValueError, match="target and horizon must be > 0"):
        F.adaptive_kl_coef(0.1, 6.0, target, horizon, 1)


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
