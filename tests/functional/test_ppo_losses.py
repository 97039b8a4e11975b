"""Tests of rlhf.functional.ppo_losses against hand-computed numbers and closed forms.

Run: pytest tests/functional/test_ppo_losses.py
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers.tensors import INF, NAN, close, draw, draw_mask, exact, few, leaf, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import mse_loss

from rlhf import functional as F

# importance_weights


def test_importance_weights_by_hand():
    logprobs = torch.tensor([[math.log(0.5), math.log(0.2), math.log(0.9), NAN]])
    sampler = torch.tensor([[math.log(0.25), math.log(0.4), math.log(0.1), 0.0]])
    mask = torch.tensor([[True, True, True, False]])
    close(F.importance_weights(logprobs, sampler, mask, 3.0), [[2.0, 0.5, 3.0, 0.0]])
    close(F.importance_weights(logprobs, logprobs, mask, 1.0), [[1.0, 1.0, 1.0, 0.0]])
    with pytest.raises(ValueError, match="cap must be >= 1, got 0.5"):
        F.importance_weights(logprobs, sampler, mask, 0.5)


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
    close(max(stats["ratio_max"] - 1, 1 - stats["ratio_min"]), abs(ratio - 1))


def test_policy_loss_is_the_mean_over_tokens_and_its_statistics_are_sums():
    ratios = torch.tensor([[1.5, 1.5, 0.5, 0.5], [1.1, 1.0, 1.0, 1.0]])
    advantages = torch.tensor([[1.0, -2.0, 1.0, -2.0], [3.0, NAN, NAN, NAN]])
    mask = advantages.isfinite()
    loss, stats = F.policy_loss(ratios.log(), torch.zeros(2, 4), advantages, mask, 0.2)
    close(loss, (-1.2 + 3.0 - 0.5 + 1.6 - 3.3) / 5)  # not the mean of two sequence means
    close(stats["clip_fraction"], 2.0)
    close(stats["ratio"], 5.1)
    close(stats["ratio_max"], 1.5)
    close(stats["ratio_min"], 0.5)
    close(stats["num_tokens"], 5.0)
    close(stats["approx_kl"], sum(r - 1 - math.log(r) for r in (1.5, 1.5, 0.5, 0.5, 1.1)))
    assert set(stats) == {
        *("approx_kl", "clip_fraction", "dual_clip_fraction", "num_tokens"),
        *("ratio", "ratio_max", "ratio_min"),
    }


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
    exact(stats["ratio_max"], torch.tensor(1.0))
    exact(stats["ratio_min"], torch.tensor(1.0))


@pytest.mark.parametrize("ratios", [[0.5, 0.9], [1.25, 3.0], [0.5, 1.25]])
def test_the_extremes_of_the_ratio_are_those_of_valid_tokens(ratios):
    # Masked tokens have ratio 1 inside the loss: it must show in neither extreme.
    logprobs = torch.tensor([[*ratios, 1e-3, 7.0]]).log()
    mask = torch.tensor([[True, True, False, False]])
    stats = F.policy_loss(logprobs, torch.zeros(1, 4), torch.ones(1, 4), mask, 0.2)[1]
    close(stats["ratio_min"], ratios[0])
    close(stats["ratio_max"], ratios[1])


# Ratio and advantage with cliprange 0.2 and dual clip 3: loss, d loss / d logprob, which clip acts.
DUAL_CLIP_CASES = [
    (5.0, -2.0, 6.0, 0.0, "dual"),  # up very far although bad: 3 * 2, and no more
    (2.5, -2.0, 5.0, 5.0, None),  # up although bad, short of the bound: pulled back
    (0.5, -2.0, 1.6, 0.0, "clip"),
    (5.0, 2.0, -2.4, 0.0, "clip"),  # the bound is for bad tokens only
    (0.5, 2.0, -1.0, -1.0, None),
    (1.1, -2.0, 2.2, 2.2, None),
]


@pytest.mark.parametrize("ratio, advantage, expected, gradient, acting", DUAL_CLIP_CASES)
def test_the_dual_clip_bounds_what_a_bad_token_costs(ratio, advantage, expected, gradient, acting):
    logprobs = leaf(torch.tensor([[math.log(ratio)]]))
    advantages, mask = torch.tensor([[advantage]]), torch.ones(1, 1, dtype=torch.bool)
    loss, stats = F.policy_loss(logprobs, torch.zeros(1, 1), advantages, mask, 0.2, dual_clip=3.0)
    loss.backward()
    close(loss.detach(), expected)
    close(logprobs.grad, [[gradient]])
    close(stats["clip_fraction"], float(acting == "clip"))
    close(stats["dual_clip_fraction"], float(acting == "dual"))


@few
@given(seed=seeds, dual_clip=st.sampled_from([None, 1.05, 1.5, 3.0]))
def test_policy_loss_equals_the_written_out_objective(seed, dual_clip):
    logprobs, old_logprobs, advantages = (draw(seed + i, 3, 5) for i in range(3))
    mask = draw_mask(seed, 3, 5)
    objective, clipped, dual_clipped, ratios = 0.0, 0, 0, []
    for row, column in mask.nonzero().tolist():
        advantage = advantages[row, column].item()
        ratio = math.exp(logprobs[row, column].item() - old_logprobs[row, column].item())
        value = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
        clipped += value < ratio * advantage
        if dual_clip is not None and advantage < 0:
            dual_clipped += value < dual_clip * advantage
            value = max(value, dual_clip * advantage)
        objective += value
        ratios.append(ratio)
    loss, stats = F.policy_loss(logprobs, old_logprobs, advantages, mask, 0.2, dual_clip=dual_clip)
    close(loss, -objective / max(len(ratios), 1))
    close(stats["clip_fraction"], clipped)
    close(stats["dual_clip_fraction"], dual_clipped)
    close(stats["ratio"], sum(ratios))
    close(stats["ratio_max"], max(ratios, default=1.0))
    close(stats["ratio_min"], min(ratios, default=1.0))


@pytest.mark.parametrize("dual_clip", [1.0, 0.5, -3.0, NAN])
def test_a_dual_clip_of_one_or_less_is_refused(dual_clip):
    with pytest.raises(ValueError, match="dual_clip must be > 1"):
        F.policy_loss(*loss_inputs(0), torch.ones(4, 6).bool(), 0.2, dual_clip=dual_clip)


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


def dual_clipped_policy_loss(*inputs, **options):
    return F.policy_loss(*inputs, dual_clip=1.3, **options)


LOSSES = [F.policy_loss, dual_clipped_policy_loss, F.value_loss]


@pytest.mark.parametrize("loss_function", LOSSES)
@few
@given(seed=seeds, size=st.integers(1, 4))
def test_micro_batches_add_up_to_the_minibatch(loss_function, seed, size):
    inputs, mask = loss_inputs(seed), draw_mask(seed, 4, 6)
    whole, parts = leaf(inputs[0]), leaf(inputs[0])
    loss, stats = loss_function(whole, *inputs[1:], mask, 0.2)
    loss.backward()
    denominator = mask.sum() if seed % 2 else int(mask.sum())
    merges = {"ratio_max": max, "ratio_min": min}
    total, merged = 0.0, {}
    for start in range(0, 4, size):
        part = slice(start, start + size)
        part_loss, part_stats = loss_function(
            parts[part], *(x[part] for x in inputs[1:]), mask[part], 0.2, denominator=denominator
        )
        part_loss.backward()
        total += part_loss.detach()
        for name, value in part_stats.items():
            if part_stats["num_tokens"]:
                merged.setdefault(name, []).append(value.item())
    close(total, loss.detach())
    close(parts.grad, whole.grad)
    for name, values in merged.items():
        close(stats[name], merges.get(name, sum)(values))


@pytest.mark.parametrize("loss_function", LOSSES)
def test_the_denominator_replaces_the_number_of_tokens(loss_function):
    inputs, mask = loss_inputs(0, 1, 4), torch.tensor([[True, False, True, True]])
    default = loss_function(*inputs, mask, 0.2)[0]
    for denominator in (0.75, torch.tensor(0.75, dtype=torch.float64)):
        close(loss_function(*inputs, mask, 0.2, denominator=denominator)[0], default * 4)


def assert_stats_of_nothing(stats):
    for name, value in stats.items():
        exact(value, torch.tensor(1.0 if name in ("ratio_max", "ratio_min") else 0.0))


@pytest.mark.parametrize("loss_function", LOSSES)
@pytest.mark.parametrize("denominator", [None, 0.0, 8.0, torch.tensor(0)])
def test_no_valid_token_means_no_loss_no_gradient_no_nan(loss_function, denominator):
    first, mask = leaf(torch.full((2, 3), NAN)), torch.zeros(2, 3, dtype=torch.bool)
    others = [torch.full((2, 3), INF)] * 2
    loss, stats = loss_function(first, *others, mask, 0.2, denominator=denominator)
    loss.backward()
    exact(loss.detach(), torch.tensor(0.0))
    exact(first.grad, torch.zeros(2, 3))
    assert_stats_of_nothing(stats)


@pytest.mark.parametrize("loss_function", LOSSES)
def test_an_empty_batch_is_safe(loss_function):
    nothing = torch.zeros(2, 0)
    loss, stats = loss_function(nothing, nothing, nothing, nothing.bool(), 0.2)
    exact(loss, torch.tensor(0.0))
    assert_stats_of_nothing(stats)


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


def test_an_entropy_bonus_and_a_kl_in_the_loss_are_reduced_like_the_losses():
    logits, ref_logits = draw(0, 2, 3, 5), draw(1, 2, 3, 5)
    ref_logits[1, 2] = -INF  # garbage where masked
    tokens, mask = torch.tensor([[0, 1, 2], [3, 4, 4]]), torch.tensor([[1, 0, 1], [1, 1, 0]]).bool()
    ours, theirs = leaf(logits), leaf(logits.double())
    logprobs, ref_logprobs = F.token_logprobs(ours, tokens), F.token_logprobs(ref_logits, tokens)
    kl = F.kl_estimate(logprobs.where(mask, 0.0), ref_logprobs.where(mask, 0.0), "k3")
    loss = 0.1 * F.masked_sum(kl, mask, 8.0) - 0.01 * F.masked_sum(F.token_entropy(ours), mask, 8.0)
    loss.backward()
    policy, reference = theirs.log_softmax(-1), ref_logits.double().log_softmax(-1)
    log_ratio = (reference - policy).gather(-1, tokens[..., None])[..., 0][mask]
    entropy = -(policy.exp() * policy).sum(-1)[mask]
    expected = (0.1 * (log_ratio.exp() - 1 - log_ratio) - 0.01 * entropy).sum() / 8
    expected.backward()
    close(loss.detach(), expected.detach())
    close(ours.grad, theirs.grad)


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


# learning_rate_factor


@pytest.mark.parametrize(
    "num_updates, knobs, expected",
    [
        (4, {}, [1, 0.75, 0.5, 0.25]),
        (3, {"schedule": "constant"}, [1, 1, 1]),
        (6, {"num_warmup": 2}, [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        (4, {"num_warmup": 2, "warmup_start": 0.1}, [0.1, 0.55, 1, 0.5]),
        # InstructGPT
        (
            12,
            {"num_warmup": 10, "warmup_start": 0.1, "schedule": "constant"},
            [0.1, 0.19, 0.28, 0.37, 0.46, 0.55, 0.64, 0.73, 0.82, 0.91, 1, 1],
        ),
        (2, {"num_warmup": 1, "warmup_start": 1.0}, [1, 1]),
        (2, {"num_warmup": 3}, [0.25, 0.5]),  # longer than the run
    ],
)
def test_the_share_of_the_learning_rate_is_a_function_of_the_update_by_hand(
    num_updates, knobs, expected
):
    factors = [
        F.learning_rate_factor(update, num_updates, **knobs) for update in range(num_updates)
    ]
    assert factors == pytest.approx(expected, rel=1e-12)


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
