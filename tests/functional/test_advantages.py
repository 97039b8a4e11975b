"""Tests of rlhf.functional.advantages against hand-computed numbers and explicit sums.

Run: pytest tests/functional/test_advantages.py
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

# shape_rewards


def test_shape_rewards_puts_the_score_on_the_last_valid_token():
    kl = torch.tensor([[1.0, 1, 1, 9], [2, -3, 9, 9], [9, 9, 9, 9], [9, 9, 9, 1]])
    mask = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]).bool()
    rewards = F.shape_rewards(torch.tensor([2.0, -1, NAN, 5]), kl, mask, 0.1)
    close(rewards, [[-0.1, 0, 1.9, 0], [-0.2, -0.7, 0, 0], [0, 0, 0, 0], [0, 0, 0, 4.9]])


@few
@given(seed=seeds, num_rows=st.integers(1, 4), length=st.integers(1, 6))
def test_shape_rewards_hands_out_score_and_kl_exactly_once(seed, num_rows, length):
    scores, kl = draw(seed, num_rows), draw(seed + 1, num_rows, length)
    mask = draw_mask(seed, num_rows, length)
    expected = [[0.0] * length for _ in range(num_rows)]
    for row in range(num_rows):
        valid = [t for t in range(length) if mask[row, t]]
        for t in valid:
            expected[row][t] = -0.3 * kl[row, t].item() + scores[row].item() * (t == valid[-1])
    close(F.shape_rewards(scores, kl, mask, 0.3), expected)


# gae


def gae_by_double_sum(rewards, values, mask, gamma, lam):
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    for row in range(len(rewards)):
        valid = [t for t in range(rewards.shape[1]) if mask[row, t]]
        reward = [rewards[row, t].item() for t in valid]
        value = [values[row, t].item() for t in valid] + [0.0]
        delta = [reward[i] + gamma * value[i + 1] - value[i] for i in range(len(valid))]
        for i, t in enumerate(valid):
            tail = range(len(valid) - i)
            advantages[row, t] = sum((gamma * lam) ** ahead * delta[i + ahead] for ahead in tail)
    return advantages


def test_gae_by_hand():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.7]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = F.gae(rewards, values, mask, gamma=0.9, lam=0.8)
    # deltas: 0.9 * 0.6 - 0.5 = 0.04, 0.9 * 0.7 - 0.6 = 0.03, 1 - 0.7 = 0.3; decay 0.72
    close(advantages, [[0.04 + 0.72 * 0.246, 0.03 + 0.72 * 0.3, 0.3]])
    close(returns, [[0.5 + 0.21712, 0.6 + 0.246, 1.0]])


def test_gae_skips_a_gap():
    rewards, values = torch.tensor([[1.0, NAN, 3.0]]), torch.tensor([[5.0, INF, 7.0]])
    advantages, returns = F.gae(rewards, values, torch.tensor([[True, False, True]]), 1.0, 1.0)
    close(advantages, [[-1.0, 0.0, -4.0]])
    close(returns, [[4.0, 0.0, 3.0]])


@few
@given(
    seed=seeds,
    num_rows=st.integers(1, 4),
    length=st.integers(1, 7),
    gamma=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.7, 0.95, 1.0]),
)
def test_gae_equals_the_double_sum_over_valid_tokens(seed, num_rows, length, gamma, lam):
    rewards, values = draw(seed, num_rows, length), draw(seed + 1, num_rows, length)
    mask = draw_mask(seed, num_rows, length)
    advantages, returns = F.gae(rewards, values, mask, gamma, lam)
    expected = gae_by_double_sum(rewards, values, mask, gamma, lam)
    close(advantages, expected)
    close(returns, torch.where(mask, expected + values, 0.0))


def test_gae_with_gamma_and_lambda_one_is_reward_to_go_minus_value():
    rewards, values = draw(0, 3, 8), draw(1, 3, 8)
    advantages, returns = F.gae(rewards, values, torch.ones(3, 8, dtype=torch.bool), 1.0, 1.0)
    reward_to_go = rewards.double().flip(1).cumsum(1).flip(1)
    close(returns, reward_to_go)
    close(advantages, reward_to_go - values)


def test_gae_hands_no_gradient_to_the_critic():
    rewards, values = leaf(draw(0, 2, 3)), leaf(draw(1, 2, 3))
    for result in F.gae(rewards, values, torch.ones(2, 3, dtype=torch.bool), 1.0, 0.95):
        assert not result.requires_grad


# reinforce_pp


def test_reinforce_pp_by_hand():
    rewards = torch.tensor([[1.0, NAN, 2.0, 4.0, INF]])
    mask = torch.tensor([[True, False, True, True, False]])
    close(F.reinforce_pp(rewards, mask), [[7.0, 0.0, 6.0, 4.0, 0.0]])
    close(F.reinforce_pp(rewards, mask, 0.5), [[1 + 0.5 * 4, 0.0, 2 + 0.5 * 4, 4.0, 0.0]])


def test_reinforce_pp_of_shaped_rewards_is_the_score_minus_the_kl_still_to_come():
    scores, kl, kl_coef = draw(0, 3), draw(1, 3, 5), 0.3
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 1, 0, 0]]).bool()
    expected = torch.zeros(3, 5)
    for row, t in mask.nonzero().tolist():
        kl_to_come = kl[row, t:].double()[mask[row, t:]].sum()
        expected[row, t] = scores[row].double() - kl_coef * kl_to_come
    close(F.reinforce_pp(F.shape_rewards(scores, kl, mask, kl_coef), mask), expected)


@few
@given(
    seed=seeds,
    num_rows=st.integers(1, 4),
    length=st.integers(1, 7),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
)
def test_reinforce_pp_equals_the_discounted_sum_over_later_valid_tokens(
    seed, num_rows, length, gamma
):
    rewards, mask = draw(seed, num_rows, length), draw_mask(seed, num_rows, length)
    expected = torch.zeros(num_rows, length, dtype=torch.float64)
    for row in range(num_rows):
        valid = [t for t in range(length) if mask[row, t]]
        for i, t in enumerate(valid):
            later = enumerate(valid[i:])
            expected[row, t] = sum(gamma**ahead * rewards[row, s].item() for ahead, s in later)
    close(F.reinforce_pp(rewards, mask, gamma), expected)


def test_returns_minus_mean_by_hand():
    returns = torch.tensor([[1.0, 3.0, 99.0, 5.0], [3.0, 99.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    close(F.returns_minus_mean(returns, mask), [[-2.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]])


def test_reinforce_pp_is_detached():
    rewards = leaf(draw(0, 2, 3))
    assert not F.reinforce_pp(rewards, torch.ones(2, 3, dtype=torch.bool)).requires_grad


# rloo, grpo


def test_rloo_subtracts_the_mean_of_the_others():
    scores = torch.tensor([[1.0, 2.0, 6.0], [10.0, 0.0, 2.0]])
    # 1 - (2 + 6) / 2 = -3, and so on
    close(F.rloo(scores), [[-3.0, -1.5, 4.5], [9.0, -6.0, -3.0]])
    close(F.rloo(torch.tensor([[1.0, 4.0]])), [[-3.0, 3.0]])


def test_grpo_divides_by_the_unbiased_deviation():
    scores = torch.tensor([[1.0, 2.0, 3.0], [0.0, 3.0, 6.0]])  # deviations 1 and 3
    one, three = 1 / 1.0001, 3 / 3.0001
    close(F.grpo(scores), [[-one, 0.0, one], [-three, 0.0, three]])


@pytest.mark.parametrize("estimator", [F.rloo, F.grpo])
def test_equal_scores_carry_no_signal_however_large(estimator):
    exact(estimator(torch.full((2, 3), 1000.1)), torch.zeros(2, 3))


@pytest.mark.parametrize("estimator", [F.rloo, F.grpo])
@pytest.mark.parametrize("shape", [(3, 1), (4,), (2, 2, 2)])
def test_group_estimators_need_two_responses_per_prompt(estimator, shape):
    with pytest.raises(ValueError, match=r"\(P, K\), K >= 2, got"):
        estimator(torch.zeros(shape))


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
