"""Tests of masked sums, means and whitening, and of what every masked function has in common.

Run: pytest tests/functional/test_masks.py
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers.tensors import GARBAGE, INF, NAN, close, draw, draw_mask, exact, few, leaf, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf import functional as F

# masked_mean, masked_sum, whiten


def test_masked_mean_averages_valid_elements_only():
    x = torch.tensor([[1.0, 2.0, INF], [6.0, NAN, 1e4]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    close(F.masked_mean(x, mask), 3.0)
    close(F.masked_mean(x, mask, dim=1), [1.5, 6.0])
    close(F.masked_mean(x, mask, dim=0), [3.5, 2.0, 0.0])
    close(F.masked_mean(x, mask, dim=(0, 1)), 3.0)


def test_masked_mean_of_nothing_is_zero_with_zero_gradient():
    x = leaf(torch.full((2, 3), NAN))
    mean = F.masked_mean(x, torch.zeros(2, 3, dtype=torch.bool))
    mean.backward()
    exact(mean.detach(), torch.tensor(0.0))
    exact(x.grad, torch.zeros(2, 3))


def test_masked_mean_accumulates_bfloat16_in_float32():
    x = torch.full((1000,), 0.1, dtype=torch.bfloat16)
    mean = F.masked_mean(x, torch.ones(1000, dtype=torch.bool))
    close(mean, x[0].double())


def test_masked_sum_divides_by_the_number_of_valid_elements_or_by_what_is_given():
    x = torch.tensor([[1.0, 2.0, INF], [6.0, NAN, 1e4]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    close(F.masked_sum(x, mask), 9 / 3)
    for denominator in (4, 4.0, torch.tensor(4), torch.tensor(4.0, dtype=torch.float64)):
        close(F.masked_sum(x, mask, denominator), 9 / 4)


@pytest.mark.parametrize("denominator", [None, 0, 0.0, 5.0, torch.tensor(0), torch.tensor(NAN)])
@pytest.mark.parametrize("shape", [(2, 3), (2, 0), (0,)])
def test_masked_sum_of_nothing_is_zero_with_zero_gradient(shape, denominator):
    x = leaf(torch.full(shape, NAN))
    total = F.masked_sum(x, torch.zeros(shape, dtype=torch.bool), denominator)
    total.backward()
    exact(total.detach(), torch.tensor(0.0))
    exact(x.grad, torch.zeros(shape))


@few
@given(seed=seeds, num_rows=st.integers(1, 4), length=st.integers(1, 6), size=st.integers(1, 4))
def test_masked_sums_of_parts_add_up_to_the_mean_of_the_whole(seed, num_rows, length, size):
    x, mask = draw(seed, num_rows, length), draw_mask(seed, num_rows, length)
    parts = zip(x.split(size), mask.split(size), strict=True)
    total = sum(F.masked_sum(part, part_mask, mask.sum()) for part, part_mask in parts)
    expected = x.double()[mask].mean() if mask.any() else 0.0
    close(total, expected)
    close(F.masked_sum(x, mask), expected)


def test_masked_sum_refuses_a_denominator_per_row():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"denominator must have shape \(\), got \(2,\)"):
        F.masked_sum(x, mask, mask.sum(1))


def test_whiten_uses_the_biased_variance_of_valid_elements():
    x, mask = torch.tensor([[1.0, 2.0, 3.0, NAN]]), torch.tensor([[True, True, True, False]])
    one = math.sqrt(3 / 2)
    close(F.whiten(x, mask), [[-one, 0.0, one, 0.0]])
    close(F.whiten(x, mask, center=False), [[2 - one, 2.0, 2 + one, 0.0]])


def test_whiten_adds_its_epsilon_to_the_variance():
    x = torch.tensor([-1e-4, 1e-4])  # variance 1e-8, as large as the epsilon
    close(F.whiten(x, torch.ones(2, dtype=torch.bool)), [-math.sqrt(0.5), math.sqrt(0.5)])


@pytest.mark.parametrize("valid", [[], [0], [0, 1, 2]])
def test_whiten_of_nothing_one_or_equal_elements_is_zero(valid):
    x, mask = torch.full((3,), 2.5), torch.zeros(3, dtype=torch.bool)
    mask[valid] = True
    exact(F.whiten(x, mask), torch.zeros(3))
    exact(F.whiten(x, mask, center=False), torch.where(mask, x, 0.0))


@few
@given(seed=seeds, num_rows=st.integers(1, 4), length=st.integers(1, 6))
def test_whiten_equals_standardising_the_valid_elements(seed, num_rows, length):
    x, mask = 3 * draw(seed, num_rows, length) + 5, draw_mask(seed, num_rows, length)
    valid = x[mask].double()
    expected = torch.zeros(num_rows, length, dtype=torch.float64)
    if len(valid):
        expected[mask] = (valid - valid.mean()) / (valid.var(unbiased=False) + 1e-8).sqrt()
    # Two elements that almost coincide have a deviation of few digits.
    assert_close(F.whiten(x, mask).double(), expected, rtol=1e-5, atol=1e-5)


# Garbage under the mask

MASKED = {
    "masked_mean": lambda mask, x: F.masked_mean(x, mask),
    "masked_mean_rows": lambda mask, x: F.masked_mean(x, mask, dim=1),
    "masked_sum": lambda mask, x: F.masked_sum(x, mask),
    "masked_sum_divided": lambda mask, x: F.masked_sum(x, mask, 7.0),
    "whiten": lambda mask, x: F.whiten(x, mask),
    "whiten_uncentered": lambda mask, x: F.whiten(x, mask, center=False),
    "shape_rewards": lambda mask, kl: F.shape_rewards(draw(9, len(mask)), kl, mask, 0.1),
    "gae": lambda mask, rewards, values: F.gae(rewards, values, mask, 0.9, 0.8),
    "reinforce_pp": lambda mask, rewards: F.reinforce_pp(rewards, mask, 0.9),
    "policy_loss": lambda mask, *inputs: F.policy_loss(*inputs, mask, 0.2),
    "policy_loss_dual": lambda mask, *inputs: F.policy_loss(*inputs, mask, 0.2, dual_clip=1.3),
    "value_loss": lambda mask, *inputs: F.value_loss(*inputs, mask, 0.2),
    "value_loss_unclipped": lambda mask, *inputs: F.value_loss(*inputs, mask, None),
    "explained_variance": lambda mask, *inputs: F.explained_variance(*inputs, mask),
}
NUM_INPUTS = {"gae": 2, "explained_variance": 2}
NUM_INPUTS |= dict.fromkeys((name for name in MASKED if "_loss" in name), 3)


def run_masked(name, mask, inputs):
    """Return all outputs, detached, and the gradient of each input (zeros where it has none)."""
    inputs = [leaf(x) for x in inputs]
    result = MASKED[name](mask, *inputs)
    outputs = list(result) if isinstance(result, tuple) else [result]
    outputs = [
        *outputs[:1],
        *(outputs[1].values() if isinstance(outputs[-1], dict) else outputs[1:]),
    ]
    if outputs[0].requires_grad:
        (outputs[0] * draw(7, *outputs[0].shape)).sum().backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]
    return [x.detach() for x in outputs], gradients


@pytest.mark.parametrize("name", MASKED)
@few
@given(seed=seeds, garbage=st.sampled_from(GARBAGE))
def test_garbage_under_the_mask_changes_neither_values_nor_gradients(name, seed, garbage):
    mask = draw_mask(seed, 3, 5)
    clean = [draw(seed + i, 3, 5) for i in range(NUM_INPUTS.get(name, 1))]
    outputs, gradients = run_masked(name, mask, clean)
    dirty = [torch.where(mask, x, garbage) for x in clean]
    dirty_outputs, dirty_gradients = run_masked(name, mask, dirty)
    for expected, actual in zip(outputs + gradients, dirty_outputs + dirty_gradients, strict=True):
        exact(actual, expected)
    for gradient in dirty_gradients:
        exact(gradient[~mask], torch.zeros_like(gradient[~mask]))
    for output in (x for x in dirty_outputs if x.shape == mask.shape):
        exact(output[~mask], torch.zeros_like(output[~mask]))


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_floating_dtype_gives_float32_results_of_the_upcast_inputs(name, dtype):
    mask = torch.ones(3, 5, dtype=torch.bool)
    inputs = [draw(i, 3, 5).to(dtype) for i in range(NUM_INPUTS.get(name, 1))]
    expected, _ = run_masked(name, mask, [x.float() for x in inputs])
    actual, _ = run_masked(name, mask, inputs)
    for ours, theirs in zip(actual, expected, strict=True):
        exact(ours, theirs)


@pytest.mark.parametrize("name", MASKED)
def test_masks_that_are_not_bool_and_shapes_that_would_broadcast_are_refused(name):
    inputs = [draw(i, 3, 5) for i in range(NUM_INPUTS.get(name, 1))]
    with pytest.raises(TypeError, match="mask must be bool.*torch.int64"):
        MASKED[name](torch.ones(3, 5, dtype=torch.long), *inputs)
    for i in range(len(inputs)):
        wrong = [x[:, :1] if i == j else x for j, x in enumerate(inputs)]
        with pytest.raises(ValueError, match=r"must have shape \(3, 5\), got \(3, 1\)"):
            MASKED[name](torch.ones(3, 5, dtype=torch.bool), *wrong)


def test_other_inputs_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"ref_logprobs must have shape \(2, 3\), got \(2, 1\)"):
        F.kl_estimate(torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"scores must have shape \(2,\), got \(1,\)"):
        F.shape_rewards(torch.zeros(1), torch.zeros(2, 3), torch.zeros(2, 3).bool(), 0.1)
    with pytest.raises(ValueError, match=r"scores must have shape \(2,\), got \(2, 1\)"):
        F.ranking_loss(torch.zeros(2, 1), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"groups must have shape \(2,\), got \(1,\)"):
        F.ranking_loss(torch.zeros(2), torch.tensor([0, 1]), torch.zeros(1))
    with pytest.raises(ValueError, match=r"baseline must have shape \(2,\), got \(1,\)"):
        F.wins(torch.zeros(2), torch.zeros(1))
    with pytest.raises(ValueError, match=r"other must have shape \(2, 3\), got \(2, 1\)"):
        F.best_of_n(torch.zeros(2, 3), 2, torch.zeros(2, 1))
