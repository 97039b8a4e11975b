"""Tests of rlhf.functional against hand-computed numbers, brute force, closed forms and torch.

No expected value comes from the code under test. References are computed in float64.
Run: pytest tests/test_functional.py
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical
from torch.nn.functional import log_softmax, mse_loss
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf import functional as F

INF, NAN = math.inf, math.nan
GARBAGE = (1e4, INF, -INF, NAN)
seeds = st.integers(0, 2**31)
few = settings(max_examples=40, deadline=None, derandomize=True)


def exact(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def close(actual, expected, atol=1e-6):
    expected = torch.as_tensor(expected, dtype=torch.float32)
    assert_close(actual, expected, rtol=1e-5, atol=atol)


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_mask(seed, *shape):
    """Valid with a probability that is itself drawn: gaps, empty rows and full masks all occur."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand((), generator=generator) * 1.4 - 0.2
    return torch.rand(*shape, generator=generator) < share


def leaf(x):
    return x.detach().clone().requires_grad_()


# masked_mean, whiten


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


# token_logprobs, token_entropy


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_token_logprobs_equals_log_softmax_in_value_and_gradient(temperature):
    logits, weights = 4 * draw(0, 3, 5, 7), draw(1, 3, 5)
    tokens = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(2))
    ours, theirs = leaf(logits), leaf(logits.double())
    logprobs = F.token_logprobs(ours, tokens, temperature)
    reference = log_softmax(theirs / temperature, -1).gather(-1, tokens[..., None])[..., 0]
    (logprobs * weights).sum().backward()
    (reference * weights).sum().backward()
    close(logprobs.detach(), reference.detach())
    close(ours.grad, theirs.grad)


def test_token_logprobs_at_a_temperature_by_hand():
    logits = torch.tensor([[[0.0, math.log(9.0)]]])
    close(F.token_logprobs(logits, torch.tensor([[1]])), [[math.log(9 / 10)]])
    close(F.token_logprobs(logits, torch.tensor([[0]]), 2.0), [[math.log(1 / 4)]])


def test_token_logprobs_and_entropy_are_unhurt_by_a_common_offset():
    logits = (2 * draw(0, 2, 3, 9)).round() + 2000
    tokens = torch.tensor([[0, 1, 2], [3, 4, 8]])
    reference = log_softmax(logits.double(), -1)
    close(F.token_logprobs(logits, tokens), reference.gather(-1, tokens[..., None])[..., 0])
    close(F.token_entropy(logits), -(reference.exp() * reference).sum(-1))


def test_token_logprobs_treats_forbidden_tokens_as_absent():
    allowed = [0, 2, 3]
    logits = draw(0, 2, 3, 5)
    logits[..., [1, 4]] = -INF
    tokens = torch.tensor([[0, 2, 3], [3, 3, 0]])
    ours, theirs = leaf(logits), leaf(logits[..., allowed].double())
    positions = torch.tensor([0, -1, 1, 2])[tokens]
    logprobs = F.token_logprobs(ours, tokens)
    reference = log_softmax(theirs, -1).gather(-1, positions[..., None])[..., 0]
    logprobs.sum().backward()
    reference.sum().backward()
    close(logprobs.detach(), reference.detach())
    close(ours.grad[..., allowed], theirs.grad)
    exact(ours.grad[..., [1, 4]], torch.zeros(2, 3, 2))


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("name", ["token_logprobs", "token_entropy"])
def test_garbage_logits_get_no_gradient_where_the_loss_is_masked(name, garbage):
    logits = draw(0, 2, 3, 5)
    logits[0, 1], logits[1, 2] = garbage, garbage
    mask = torch.tensor([[True, False, True], [True, True, False]])
    arguments = (torch.ones(2, 3, dtype=torch.long),) if name == "token_logprobs" else ()
    ours = leaf(logits)
    F.masked_mean(getattr(F, name)(ours, *arguments), mask).backward()
    exact(ours.grad[~mask], torch.zeros(2, 5))
    assert ours.grad[mask].isfinite().all() and (ours.grad[mask] != 0).all()


def test_a_forbidden_token_under_the_mask_leaves_the_policy_loss_finite():
    logits = draw(0, 1, 3, 5)
    logits[..., 4] = -INF
    tokens, mask = torch.tensor([[0, 1, 4]]), torch.tensor([[True, True, False]])
    ours = leaf(logits)
    logprobs = F.token_logprobs(ours, tokens)
    exact(logprobs.detach()[0, 2], torch.tensor(-INF))
    loss, stats = F.policy_loss(logprobs, logprobs.detach(), torch.ones(1, 3), mask, 0.2)
    loss.backward()
    assert loss.isfinite() and ours.grad.isfinite().all()
    exact(stats["approx_kl"], torch.tensor(0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_read_exactly_and_get_gradients_of_their_dtype(dtype):
    logits, weights = (3 * draw(0, 2, 4, 11)).to(dtype), draw(1, 2, 4)
    tokens = torch.randint(11, (2, 4), generator=torch.Generator().manual_seed(2))
    for name, arguments in (("token_logprobs", (tokens, 0.7)), ("token_entropy", (0.7,))):
        ours, theirs = leaf(logits), leaf(logits.double())
        value = getattr(F, name)(ours, *arguments)
        distribution = Categorical(logits=theirs / 0.7)
        reference = distribution.log_prob(tokens) if len(arguments) == 2 else distribution.entropy()
        (value * weights).sum().backward()
        (reference * weights).sum().backward()
        close(value.detach(), reference.detach())
        assert ours.grad.dtype == dtype
        rounding = torch.finfo(dtype).eps  # one unit in the last place
        assert_close(ours.grad.double(), theirs.grad, rtol=rounding, atol=1e-6)


class RecordOutputs(TorchDispatchMode):
    """Note the dtype and size of every tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.seen.add((result.dtype, result.numel()))
        return result


@pytest.mark.parametrize("name", ["token_logprobs", "token_entropy"])
def test_no_float32_copy_of_low_precision_logits_is_ever_made(name):
    logits = leaf(draw(0, 3, 4, 50).bfloat16())
    arguments = (torch.zeros(3, 4, dtype=torch.long),) if name == "token_logprobs" else ()
    with RecordOutputs() as record:
        getattr(F, name)(logits, *arguments).sum().backward()
    assert (torch.bfloat16, logits.numel()) in record.seen, "the backward pass went unseen"
    assert max(size for dtype, size in record.seen if dtype != torch.bfloat16) == 4 * 50


@pytest.mark.parametrize("name", ["token_logprobs", "token_entropy"])
def test_only_the_logits_as_given_and_small_tensors_are_saved(name):
    logits = leaf(draw(0, 3, 4, 50).bfloat16())
    arguments = (torch.zeros(3, 4, dtype=torch.long),) if name == "token_logprobs" else ()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        getattr(F, name)(logits, *arguments)
    assert [x.data_ptr() for x in saved if x.numel() > 12] == [logits.data_ptr()]


def test_logits_that_are_a_slice_are_read_and_differentiated_in_place():
    whole = draw(0, 2, 6, 5)
    tokens = torch.tensor([[0, 4, 2], [1, 1, 3]])
    ours, theirs, before = leaf(whole), leaf(whole.double()), whole.clone()
    (
        F.token_logprobs(ours[:, 2:5], tokens, 0.5) + F.token_entropy(ours[:, 2:5], 0.5)
    ).sum().backward()
    distribution = Categorical(logits=theirs[:, 2:5] / 0.5)
    (distribution.log_prob(tokens) + distribution.entropy()).sum().backward()
    close(ours.grad, theirs.grad)
    exact(ours.detach(), before)  # the division by the temperature happened on a copy


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_token_entropy_equals_categorical_in_value_and_gradient(temperature):
    logits, weights = 3 * draw(0, 3, 5, 7), draw(1, 3, 5)
    ours, theirs = leaf(logits), leaf(logits.double())
    entropy = F.token_entropy(ours, temperature)
    reference = Categorical(logits=theirs / temperature).entropy()
    (entropy * weights).sum().backward()
    (reference * weights).sum().backward()
    close(entropy.detach(), reference.detach())
    close(ours.grad, theirs.grad)


def test_token_entropy_of_known_distributions():
    logits = torch.tensor([[[0.0] * 4, [0.0, 0.0, -INF, -INF], [3.0, -INF, -INF, -INF]]])
    logits = leaf(logits)
    entropy = F.token_entropy(logits)
    entropy.sum().backward()
    close(entropy.detach(), [[math.log(4), math.log(2), 0.0]])
    close(logits.grad, torch.zeros(1, 3, 4))  # all three are extrema over their support


def test_token_entropy_ignores_forbidden_tokens_in_its_gradient():
    logits = draw(0, 2, 3, 5)
    logits[..., 1] = -INF
    ours, theirs = leaf(logits), leaf(logits[..., [0, 2, 3, 4]].double())
    F.token_entropy(ours).sum().backward()
    Categorical(logits=theirs).entropy().sum().backward()
    close(ours.grad[..., [0, 2, 3, 4]], theirs.grad)
    exact(ours.grad[..., 1], torch.zeros(2, 3))


@pytest.mark.parametrize("name", ["token_logprobs", "token_entropy"])
def test_a_second_derivative_is_refused_rather_than_wrong(name):
    logits = leaf(draw(0, 1, 2, 5))
    arguments = (torch.zeros(1, 2, dtype=torch.long),) if name == "token_logprobs" else ()
    value = getattr(F, name)(logits, *arguments).square().sum()
    (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_logits_of_wrong_shape_or_temperature_are_refused():
    logits, tokens = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        F.token_logprobs(logits, tokens, 0.0)
    with pytest.raises(ValueError, match="temperature must be > 0, got -1"):
        F.token_entropy(logits, -1.0)
    with pytest.raises(ValueError, match=r"tokens must have shape \(2, 3\), got \(2, 1\)"):
        F.token_logprobs(logits, tokens[:, :1])
    with pytest.raises(ValueError, match=r"\(B, T, V\), got \(3, 5\)"):
        F.token_entropy(logits[0])


# kl_estimate


def test_kl_estimates_by_hand():
    logprobs, ref_logprobs = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])
    nat = math.log(2)
    close(F.kl_estimate(logprobs, ref_logprobs), [[nat]])
    close(F.kl_estimate(logprobs, ref_logprobs, "k1"), [[nat]])
    close(F.kl_estimate(logprobs, ref_logprobs, "k2"), [[nat**2 / 2]])
    close(F.kl_estimate(logprobs, ref_logprobs, "k3"), [[0.25 / 0.5 - 1 + nat]])
    close(F.kl_estimate(ref_logprobs, logprobs, "k3"), [[0.5 / 0.25 - 1 - nat]])


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased_for_kl_of_policy_to_reference(kind):
    logprobs, ref_logprobs = log_softmax(draw(0, 4, 6), -1), log_softmax(draw(1, 4, 6), -1)
    expected = torch.distributions.kl_divergence(
        Categorical(logits=logprobs.double()), Categorical(logits=ref_logprobs.double())
    )
    close((logprobs.exp() * F.kl_estimate(logprobs, ref_logprobs, kind)).sum(-1), expected)


def test_k3_keeps_its_digits_near_zero():
    logprobs, ref_logprobs = torch.zeros(1, 1), torch.full((1, 1), -1e-3)
    expected = math.expm1(-1e-3) + 1e-3  # 4.998e-07: exp(-d) - 1 would be off by 6e-8
    close(F.kl_estimate(logprobs, ref_logprobs, "k3"), [[expected]], atol=1e-9)


def test_an_unknown_kl_kind_is_refused_with_the_allowed_ones():
    with pytest.raises(ValueError, match="k1, k2 or k3, got 'abs'"):
        F.kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), "abs")


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


# policy_loss

# Ratio and advantage of four tokens with cliprange 0.2; loss and d loss / d logprob of each.
POLICY_CASES = [
    (1.5, 1.0, -1.2, 0.0),  # up far enough: clipped, no gradient
    (1.5, -2.0, 3.0, 3.0),  # up although bad: pulled back
    (0.5, 1.0, -0.5, -0.5),  # down although good: pulled back
    (0.5, -2.0, 1.6, 0.0),  # down far enough: clipped, no gradient
    (1.1, 3.0, -3.3, -3.3),  # inside the range
]


@pytest.mark.parametrize("ratio, advantage, expected, gradient", POLICY_CASES)
def test_policy_loss_clips_the_gradient_on_the_right_side_only(
    ratio, advantage, expected, gradient
):
    old_logprobs = torch.tensor([[-1.0]])
    logprobs = leaf(old_logprobs + math.log(ratio))
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, stats = F.policy_loss(logprobs, old_logprobs, torch.tensor([[advantage]]), mask, 0.2)
    loss.backward()
    close(loss.detach(), expected)
    close(logprobs.grad, [[gradient]])
    close(stats["clip_fraction"], float(gradient == 0))
    close(stats["ratio_max_dev"], abs(ratio - 1))


def test_policy_loss_is_the_mean_over_tokens_and_its_statistics_are_sums():
    ratios = torch.tensor([[1.5, 1.5, 0.5, 0.5], [1.1, 1.0, 1.0, 1.0]])
    advantages = torch.tensor([[1.0, -2.0, 1.0, -2.0], [3.0, NAN, NAN, NAN]])
    mask = advantages.isfinite()
    loss, stats = F.policy_loss(ratios.log(), torch.zeros(2, 4), advantages, mask, 0.2)
    close(loss, (-1.2 + 3.0 - 0.5 + 1.6 - 3.3) / 5)  # not the mean of two sequence means
    close(stats["clip_fraction"], 2.0)
    close(stats["ratio"], 5.1)
    close(stats["ratio_max_dev"], 0.5)
    close(stats["num_tokens"], 5.0)
    close(stats["approx_kl"], sum(r - 1 - math.log(r) for r in (1.5, 1.5, 0.5, 0.5, 1.1)))
    assert set(stats) == {"approx_kl", "clip_fraction", "ratio", "ratio_max_dev", "num_tokens"}


def test_descending_the_policy_loss_raises_good_tokens_and_lowers_bad_ones():
    logits = leaf(torch.zeros(1, 2, 4))
    tokens, advantages = torch.tensor([[1, 2]]), torch.tensor([[1.0, -1.0]])
    before = F.token_logprobs(logits, tokens)
    mask = torch.ones(1, 2, dtype=torch.bool)
    F.policy_loss(before, before.detach(), advantages, mask, 0.2)[0].backward()
    after = F.token_logprobs(logits.detach() - 0.1 * logits.grad, tokens)
    assert after[0, 0] > before[0, 0] and after[0, 1] < before[0, 1]


def test_the_first_update_has_ratio_one_and_the_plain_policy_gradient():
    logprobs, advantages = leaf(draw(0, 2, 3)), draw(1, 2, 3)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    loss, stats = F.policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2)
    loss.backward()
    close(logprobs.grad, torch.where(mask, -advantages / 3, 0.0))
    for name, expected in (("approx_kl", 0), ("clip_fraction", 0), ("ratio", 3)):
        exact(stats[name], torch.tensor(float(expected)))
    exact(stats["ratio_max_dev"], torch.tensor(0.0))


# value_loss

# Value, return, with old value 0 and cliprange 0.2: loss, gradient, clipped?
VALUE_CASES = [
    (0.5, 1.0, 0.32, 0.0, 1.0),  # moved towards the return beyond the range: (0.2 - 1)^2 / 2
    (-0.5, -1.0, 0.32, 0.0, 1.0),
    (0.1, 1.0, 0.405, -0.9, 0.0),  # inside the range
    (-0.5, 1.0, 1.125, -1.5, 0.0),  # moved away: the unclipped error is the larger
    (0.5, -1.0, 1.125, 1.5, 0.0),
]


@pytest.mark.parametrize("value, target, expected, gradient, clipped", VALUE_CASES)
def test_value_loss_takes_the_larger_error(value, target, expected, gradient, clipped):
    values, mask = leaf(torch.tensor([[value]])), torch.ones(1, 1, dtype=torch.bool)
    old_values, returns = torch.zeros(1, 1), torch.tensor([[target]])
    loss, stats = F.value_loss(values, old_values, returns, mask, 0.2)
    loss.backward()
    close(loss.detach(), expected)
    close(values.grad, [[gradient]])
    close(stats["value_clip_fraction"], clipped)
    close(stats["value_error"], (value - target) ** 2)


def test_value_loss_clips_around_the_old_value():
    # Old value 2: 2.5 is clipped to 2.2, whose error to 3 is 0.8.
    values, old_values, returns = (torch.tensor([[x]]) for x in (2.5, 2.0, 3.0))
    loss, _ = F.value_loss(values, old_values, returns, torch.tensor([[True]]), 0.2)
    close(loss, 0.32)


def test_value_loss_without_clipping_is_half_the_mean_squared_error():
    values, returns, old_values = leaf(draw(0, 3, 4)), draw(1, 3, 4), draw(2, 3, 4)
    mask = draw_mask(5, 3, 4)
    assert 0 < mask.sum() < 12
    reference = leaf(values)
    loss, stats = F.value_loss(values, old_values, returns, mask, None)
    expected = 0.5 * mse_loss(reference[mask], returns[mask])
    loss.backward()
    expected.backward()
    close(loss.detach(), expected.detach())
    close(values.grad, reference.grad)
    exact(stats["value_clip_fraction"], torch.tensor(0.0))
    close(stats["value_error"], (values - returns).detach()[mask].square().sum())
    assert set(stats) == {"value_clip_fraction", "value_error", "num_tokens"}


def test_values_inside_the_range_are_never_counted_as_clipped():
    # old + (value - old) is rounded, and often not the value: it must not pass for a clip.
    values, old_values, returns = (draw(seed, 40, 50) for seed in range(3))
    mask = torch.ones(40, 50, dtype=torch.bool)
    _, stats = F.value_loss(values, old_values, returns, mask, 100.0)
    exact(stats["value_clip_fraction"], torch.tensor(0.0))


# What policy_loss and value_loss have in common


def loss_inputs(seed, num_rows=4, length=6):
    """Three (B, T) tensors: logprobs, old_logprobs, advantages, or values, old_values, returns."""
    return [0.5 * draw(seed + i, num_rows, length) for i in range(3)]


LOSSES = [F.policy_loss, F.value_loss]


@pytest.mark.parametrize("loss_function", LOSSES)
@few
@given(seed=seeds, size=st.integers(1, 4))
def test_micro_batches_add_up_to_the_minibatch(loss_function, seed, size):
    inputs, mask = loss_inputs(seed), draw_mask(seed, 4, 6)
    whole, parts = leaf(inputs[0]), leaf(inputs[0])
    loss, stats = loss_function(whole, *inputs[1:], mask, 0.2)
    loss.backward()
    denominator = mask.sum() if seed % 2 else int(mask.sum())
    total, sums = 0.0, dict.fromkeys(stats, 0.0)
    for start in range(0, 4, size):
        part = slice(start, start + size)
        part_loss, part_stats = loss_function(
            parts[part], *(x[part] for x in inputs[1:]), mask[part], 0.2, denominator=denominator
        )
        part_loss.backward()
        total += part_loss.detach()
        for name, value in part_stats.items():
            merge = max if name == "ratio_max_dev" else float.__add__
            sums[name] = merge(sums[name], value.item())
    close(total, loss.detach())
    close(parts.grad, whole.grad)
    for name, value in stats.items():
        close(value, sums[name])


@pytest.mark.parametrize("loss_function", LOSSES)
def test_the_denominator_replaces_the_number_of_tokens(loss_function):
    inputs, mask = loss_inputs(0, 1, 4), torch.tensor([[True, False, True, True]])
    default = loss_function(*inputs, mask, 0.2)[0]
    for denominator in (0.75, torch.tensor(0.75, dtype=torch.float64)):
        close(loss_function(*inputs, mask, 0.2, denominator=denominator)[0], default * 4)


@pytest.mark.parametrize("loss_function", LOSSES)
@pytest.mark.parametrize("denominator", [None, 0.0, 8.0, torch.tensor(0)])
def test_no_valid_token_means_no_loss_no_gradient_no_nan(loss_function, denominator):
    first, mask = leaf(torch.full((2, 3), NAN)), torch.zeros(2, 3, dtype=torch.bool)
    others = [torch.full((2, 3), INF)] * 2
    loss, stats = loss_function(first, *others, mask, 0.2, denominator=denominator)
    loss.backward()
    exact(loss.detach(), torch.tensor(0.0))
    exact(first.grad, torch.zeros(2, 3))
    assert all(value == 0 for value in stats.values())


@pytest.mark.parametrize("loss_function", LOSSES)
def test_an_empty_batch_is_safe(loss_function):
    nothing = torch.zeros(2, 0)
    loss, stats = loss_function(nothing, nothing, nothing, nothing.bool(), 0.2)
    exact(loss, torch.tensor(0.0))
    assert all(value == 0 for value in stats.values())


@pytest.mark.parametrize("loss_function", LOSSES)
def test_only_the_first_input_gets_a_gradient_and_statistics_are_detached(loss_function):
    inputs = [leaf(x) for x in loss_inputs(0)]
    loss, stats = loss_function(*inputs, torch.ones(4, 6, dtype=torch.bool), 0.2)
    loss.backward()
    assert inputs[0].grad is not None and inputs[1].grad is None and inputs[2].grad is None
    for value in stats.values():
        assert not value.requires_grad and value.shape == () and value.dtype == torch.float32


@pytest.mark.parametrize("loss_function", LOSSES)
def test_nan_at_a_valid_token_is_not_hidden(loss_function):
    for i in range(3):
        inputs = loss_inputs(0)
        inputs[i][1, 2] = NAN
        loss, _ = loss_function(*inputs, torch.ones(4, 6, dtype=torch.bool), 0.2)
        assert loss.isnan()


# Garbage under the mask

MASKED = {
    "masked_mean": lambda mask, x: F.masked_mean(x, mask),
    "masked_mean_rows": lambda mask, x: F.masked_mean(x, mask, dim=1),
    "whiten": lambda mask, x: F.whiten(x, mask),
    "whiten_uncentered": lambda mask, x: F.whiten(x, mask, center=False),
    "shape_rewards": lambda mask, kl: F.shape_rewards(draw(9, len(mask)), kl, mask, 0.1),
    "gae": lambda mask, rewards, values: F.gae(rewards, values, mask, 0.9, 0.8),
    "policy_loss": lambda mask, *inputs: F.policy_loss(*inputs, mask, 0.2),
    "value_loss": lambda mask, *inputs: F.value_loss(*inputs, mask, 0.2),
    "value_loss_unclipped": lambda mask, *inputs: F.value_loss(*inputs, mask, None),
    "explained_variance": lambda mask, *inputs: F.explained_variance(*inputs, mask),
}
NUM_INPUTS = {"gae": 2, "policy_loss": 3, "value_loss": 3, "value_loss_unclipped": 3}
NUM_INPUTS["explained_variance"] = 2


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


# ranking_loss


def ranking_loss_by_loops(scores, ranks, groups, margin, kind):
    """Return loss, number of pairs, pairs ordered right, sum of leads; scores in float64."""
    group_losses, pairs, right, leads = [], 0, 0.0, 0.0
    for group in sorted(set(groups.tolist())):
        members = [i for i in range(len(scores)) if groups[i] == group]
        terms = []
        for i in members:
            worse = [j for j in members if ranks[i] < ranks[j]]
            rivals = []
            for j in worse:
                lead = scores[i] - scores[j]
                rivals.append(torch.exp(scores[j] + margin[i, j] - scores[i]))
                pairs, leads = pairs + 1, leads + lead.item()
                right += 1.0 if lead > 0 else 0.5 if lead == 0 else 0.0
            if kind == "pairwise":
                terms += [torch.log(1 + rival) for rival in rivals]
            elif worse:
                terms.append(torch.log(1 + sum(rivals)))
        if terms:
            group_losses.append(sum(terms) / len(terms))
    return sum(group_losses) / len(group_losses), pairs, right / pairs, leads / pairs


@pytest.mark.parametrize("kind", ["pairwise", "plackett_luce"])
@few
@given(
    seed=seeds, num_items=st.integers(2, 12), margin=st.sampled_from(["none", "float", "matrix"])
)
def test_ranking_loss_equals_explicit_loops(kind, seed, num_items, margin):
    generator = torch.Generator().manual_seed(seed)
    scores = (4 * draw(seed, num_items)).round() / 2  # some scores are equal
    ranks = torch.randint(4, (num_items,), generator=generator)
    groups = torch.randint(-1, 3, (num_items,), generator=generator) * 10
    ranks[:2], groups[:2] = torch.tensor([0, 1]), groups[0]  # at least one pair
    given_margin, matrix = None, torch.zeros(num_items, num_items)
    if margin == "float":
        given_margin, matrix = 0.3, torch.full_like(matrix, 0.3)
    elif margin == "matrix":
        given_margin = matrix = draw(seed + 1, num_items, num_items).double()
    ours, theirs = leaf(scores), leaf(scores.double())
    loss, stats = F.ranking_loss(ours, ranks, groups, given_margin, kind)
    reference, pairs, right, lead = ranking_loss_by_loops(theirs, ranks, groups, matrix, kind)
    loss.backward()
    reference.backward()
    close(loss.detach(), reference.detach())
    close(ours.grad, theirs.grad)
    close(stats["num_pairs"], pairs)
    close(stats["accuracy"], right)
    close(stats["margin"], lead)


def test_ranking_loss_of_one_pair_prefers_the_lower_rank():
    scores = leaf(torch.tensor([0.0, 2.0]))
    loss, stats = F.ranking_loss(scores, torch.tensor([1, 0]), torch.tensor([7, 7]))
    loss.backward()
    close(loss.detach(), math.log(1 + math.exp(-2)))
    assert scores.grad[1] < 0 < scores.grad[0]  # descent raises the better one
    close(stats["accuracy"], 1.0)
    close(stats["margin"], 2.0)


def test_every_prompt_weighs_the_same_however_many_pairs_it_has():
    # Prompt 0: six pairs of loss log 2. Prompt 1: one pair of loss log 4. Prompt 2: tied, left out.
    scores = torch.tensor([0.0, 0, 0, 0, -math.log(3), 0, 9, -9])
    ranks, groups = torch.tensor([0, 1, 2, 3, 0, 1, 5, 5]), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    loss, stats = F.ranking_loss(scores, ranks, groups)
    close(loss, (math.log(2) + math.log(4)) / 2)
    close(stats["num_pairs"], 7.0)
    close(stats["num_groups"], 2.0)
    close(stats["accuracy"], 6 * 0.5 / 7)


def test_a_margin_is_subtracted_from_the_lead_at_better_worse():
    scores, ranks, groups = torch.tensor([1.0, 0.0]), torch.tensor([0, 1]), torch.tensor([0, 0])
    margin = torch.tensor([[NAN, 3.0], [INF, NAN]])
    for kind in ("pairwise", "plackett_luce"):
        loss, stats = F.ranking_loss(scores, ranks, groups, margin, kind)
        close(loss, math.log(1 + math.exp(2)))
        close(stats["margin"], 1.0)  # of the scores, without the demanded margin


def test_plackett_luce_is_the_likelihood_of_choosing_best_first():
    scores = draw(0, 5).double()
    order = [3, 0, 4, 1, 2]
    ranks = torch.empty(5, dtype=torch.long)
    ranks[order] = torch.arange(5)
    loss, _ = F.ranking_loss(scores, ranks, torch.zeros(5), kind="plackett_luce")
    stages = [log_softmax(scores[order[i:]], 0)[0] for i in range(4)]
    close(loss, -sum(stages) / 4)


def test_tied_responses_do_not_compete_in_plackett_luce():
    scores, groups = torch.zeros(3), torch.zeros(3)
    for ranks, expected in (([0, 0, 1], math.log(2)), ([0, 1, 1], math.log(3))):
        loss, _ = F.ranking_loss(scores, torch.tensor(ranks), groups, kind="plackett_luce")
        close(loss, expected)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("kind", ["pairwise", "plackett_luce"])
def test_a_tied_prompt_gets_no_gradient_even_from_infinite_scores(kind):
    scores = leaf(torch.tensor([1.0, 0.0, INF, INF]))
    loss, _ = F.ranking_loss(
        scores, torch.tensor([0, 1, 2, 2]), torch.tensor([0, 0, 1, 1]), kind=kind
    )
    with torch.autograd.detect_anomaly(check_nan=True):  # nor a nan on the way there
        loss.backward()
    close(loss.detach(), math.log(1 + math.exp(-1)))
    exact(scores.grad[2:], torch.zeros(2))
    assert scores.grad[:2].isfinite().all()


@pytest.mark.parametrize("kind", ["pairwise", "plackett_luce"])
def test_ranking_loss_stays_finite_for_hopeless_scores(kind):
    scores = leaf(torch.tensor([-1e4, 1e4]))
    loss, _ = F.ranking_loss(scores, torch.tensor([0, 1]), torch.tensor([0, 0]), kind=kind)
    loss.backward()
    close(loss.detach(), 2e4)
    close(scores.grad, [-1.0, 1.0])


def test_ranking_loss_upcasts_and_returns_detached_float32():
    scores = leaf(torch.tensor([1.0, 0.5, 0.25]).bfloat16())
    loss, stats = F.ranking_loss(scores, torch.tensor([0.0, 0.5, 1.0]), torch.zeros(3))
    terms = [math.log(1 + math.exp(-lead)) for lead in (0.5, 0.75, 0.25)]
    close(loss.detach(), sum(terms) / 3)
    assert set(stats) == {"accuracy", "margin", "num_pairs", "num_groups"}
    for value in stats.values():
        assert not value.requires_grad and value.shape == () and value.dtype == torch.float32


@pytest.mark.parametrize("ranks, groups", [([0, 0], [0, 0]), ([0, 1], [0, 1]), ([], [])])
def test_ranked_data_without_a_single_pair_is_refused(ranks, groups):
    with pytest.raises(ValueError, match="no two responses of one prompt differ in rank"):
        F.ranking_loss(torch.zeros(len(ranks)), torch.tensor(ranks), torch.tensor(groups))


def test_an_unknown_ranking_kind_is_refused_with_the_allowed_ones():
    with pytest.raises(ValueError, match="pairwise or plackett_luce, got 'hinge'"):
        F.ranking_loss(torch.zeros(2), torch.tensor([0, 1]), torch.zeros(2), kind="hinge")


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


@pytest.mark.parametrize("num_valid", [0, 1, 7])
def test_explained_variance_is_zero_where_there_is_nothing_to_explain(num_valid):
    returns, values = torch.full((1, 7), 1000.1), draw(0, 1, 7)
    mask = (torch.arange(7) < num_valid)[None]
    exact(F.explained_variance(values, returns, mask), torch.tensor(0.0))


def test_explained_variance_does_not_hide_a_valid_nan():
    returns = torch.tensor([[1.0, NAN, 2.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert F.explained_variance(torch.zeros(1, 3), returns, mask).isnan()
