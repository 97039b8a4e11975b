"""Tests of explained variance and running moments against hand-computed numbers and enumeration.

Run: pytest tests/functional/test_diagnostics.py
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers.tensors import INF, NAN, close, draw, draw_mask, exact, few, leaf, seeds
from hypothesis import given
from hypothesis import strategies as st

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
