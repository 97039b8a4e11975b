"""Tests of rlhf.functional.tokens against torch's own distributions in float64.

Run: pytest tests/functional/test_tokens.py
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers.tensors import GARBAGE, INF, close, draw, exact, leaf
from torch.distributions import Categorical
from torch.nn.functional import log_softmax
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf import functional as F

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


def test_log_probs_and_entropy_come_from_one_pass_over_many_positions():
    logits, weights = 3 * draw(0, 2, 600, 7), draw(1, 2, 2, 600)
    logits[0, 300] = torch.nan  # masked
    weights[:, 0, 300] = 0
    weights[0, 1, 400] = 0  # a position whose entropy alone is read
    forbidden, allowed = torch.tensor([2, 5]), [0, 1, 3, 4, 6]
    tokens = torch.randint(5, (2, 600), generator=torch.Generator().manual_seed(2))
    ours, theirs = leaf(logits), leaf(logits[..., allowed].double())
    ids = torch.tensor(allowed)[tokens]
    logprobs, entropy = F.logprobs_and_entropy(ours, ids, 0.7, forbidden)
    reference = Categorical(logits=torch.nan_to_num(theirs) / 0.7)
    read = weights.any(dim=0)
    loss = (torch.stack([logprobs, entropy]) * weights).where(read, 0.0).sum()
    expected = torch.stack([reference.log_prob(tokens), reference.entropy()])
    (expected * weights).where(read, 0.0).sum().backward()
    loss.backward()
    close(logprobs.detach()[read], expected[0].detach()[read])
    close(entropy.detach()[read], expected[1].detach()[read])
    close(ours.grad[..., allowed], theirs.grad)
    exact(ours.grad[..., forbidden], torch.zeros(2, 600, 2))


def test_entropy_that_nobody_asks_for_is_zero():
    logits, tokens = draw(0, 1, 3, 5), torch.zeros(1, 3, dtype=torch.long)
    logprobs, entropy = F.logprobs_and_entropy(logits, tokens, with_entropy=False)
    exact(logprobs, F.logprobs_and_entropy(logits, tokens)[0])
    exact(entropy, torch.zeros(1, 3))


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


def test_at_most_a_block_of_one_long_row_is_float32_at_once():
    logits = leaf(draw(0, 1, 600, 50).bfloat16())
    with RecordOutputs() as record:
        torch.cat(
            F.logprobs_and_entropy(logits, torch.zeros(1, 600, dtype=torch.long))
        ).sum().backward()
    assert max(size for dtype, size in record.seen if dtype != torch.bfloat16) == 256 * 50


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
