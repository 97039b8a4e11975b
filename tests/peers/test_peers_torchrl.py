"""Our formulas against torchrl's: its two GAE functions and its ClipPPOLoss module.

torchrl has no response mask: our valid tokens go to it one after the other. Where the two differ,
the test computes the difference from the inputs and checks that it is all.

Run: see requirements.txt
"""

import pytest
import torch

from rlhf.functional import (
    explained_variance,
    gae,
    kl_estimate,
    masked_mean,
    policy_loss,
    token_entropy,
    token_logprobs,
    value_loss,
)

pytestmark = pytest.mark.peers
GAMMA, LAM, CLIP, CLIP_VALUE = 0.97, 0.9, 0.2, 0.3


@pytest.fixture(scope="module")
def torchrl():
    pytest.importorskip("tensordict", reason="see tests/peers/requirements.txt")
    return pytest.importorskip("torchrl.objectives", reason="see tests/peers/requirements.txt")


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_mask(*shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.7
    mask[:, 0] = True
    return mask


@pytest.fixture(params=["generalized_advantage_estimate", "vec_generalized_advantage_estimate"])
def their_gae(request, torchrl):
    """The loop or the vectorised form, of rewards, values, next values, done, terminated: (T,)."""
    function = getattr(torchrl.value.functional, request.param)

    def estimate(rewards, values, next_values, done, terminated):
        columns = (x[:, None] for x in (values, next_values, rewards, done, terminated))
        advantages, targets = function(GAMMA, LAM, *columns)
        return advantages[:, 0], targets[:, 0]

    return estimate


@pytest.mark.parametrize("ends", ["terminated", "truncated"])
def test_gae_is_theirs_on_the_valid_tokens_of_each_row(their_gae, agree, ends):
    """Rows with gaps, nan under them: torchrl gets what is left, all rows end to end in one tensor,
    with `done` on each row's last token. Truncated rows (done, not terminated) bootstrap in torchrl
    from the next value; adding gamma times that to the last reward is the same for us."""
    mask = random_mask(7, 12, seed=1)
    rewards, values, bootstrap = random(7, 12, seed=2), random(7, 12, seed=3), random(7, seed=4)
    done = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    next_values = torch.zeros(7, 12)
    for row in range(7):
        next_values[row, mask[row]] = torch.cat([values[row, mask[row]][1:], bootstrap[row, None]])
    terminated = done if ends == "terminated" else torch.zeros_like(done)
    flat = (x[mask] for x in (rewards, values, next_values, done, terminated))
    theirs = their_gae(*flat)
    if ends == "truncated":
        rewards = rewards + GAMMA * bootstrap[:, None] * done
    ours = gae(rewards.where(mask, torch.nan), values.where(mask, torch.nan), mask, GAMMA, LAM)
    for name, our, their in zip(("advantages", "returns"), ours, theirs, strict=True):
        agree(f"torchrl  GAE {name}, {ends} rows", our[mask], their)


class Table(torch.nn.Module):
    """A network whose outputs are its weights: the row of each index."""

    def __init__(self, rows):
        super().__init__()
        self.rows = torch.nn.Parameter(rows.clone())

    def forward(self, index):
        return self.rows[index]


@pytest.fixture(params=[None, CLIP_VALUE], ids=["plain", "value-clip"])
def batch(request, torchrl):
    """Random logits, values and targets, ratios on both sides of the clip, and torchrl's loss."""
    mask, clip_value = random_mask(9, 11, seed=1), request.param
    logits, values = random(9, 11, 13, seed=2), random(9, 11, seed=3)
    tokens = torch.randint(13, (9, 11), generator=torch.Generator().manual_seed(4))
    tensors = {
        "mask": mask,
        "logits": logits.requires_grad_(),
        "values": values.requires_grad_(),
        "tokens": tokens,
        "old_logprobs": token_logprobs(logits, tokens).detach() + 0.3 * random(9, 11, seed=5),
        "advantages": random(9, 11, seed=6),
        "old_values": values.detach() + 0.4 * random(9, 11, seed=7),
        "returns": random(9, 11, seed=8),
    }
    return tensors, *their_loss(torchrl, tensors, clip_value), clip_value


def their_loss(torchrl, tensors, clip_value):
    """Return ClipPPOLoss's output on the valid tokens, and its gradients by logits and values."""
    from tensordict import TensorDict
    from tensordict.nn import (
        ProbabilisticTensorDictModule,
        ProbabilisticTensorDictSequential,
        TensorDictModule,
    )

    mask = tensors["mask"]
    logits, values = (
        Table(tensors["logits"].detach()[mask]),
        Table(tensors["values"][mask][:, None]),
    )
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(logits, in_keys=["index"], out_keys=["logits"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"],
            out_keys=["action"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
        ),
    )
    loss = torchrl.ClipPPOLoss(
        actor,
        TensorDictModule(values, in_keys=["index"], out_keys=["state_value"]),
        clip_epsilon=CLIP,
        clip_value=clip_value,
        loss_critic_type="l2",
        entropy_bonus=True,
        functional=False,
        log_explained_variance=True,
    )
    output = loss(
        TensorDict(
            {
                "index": torch.arange(int(mask.sum())),
                "action": tensors["tokens"][mask],
                loss.tensor_keys.sample_log_prob: tensors["old_logprobs"][mask],
                "advantage": tensors["advantages"][mask][:, None],
                "value_target": tensors["returns"][mask][:, None],
                "state_value": tensors["old_values"][mask][:, None],
            },
            [int(mask.sum())],
        )
    )
    (output["loss_objective"] + output["loss_critic"]).backward()
    return output, logits.rows.grad, values.rows.grad[:, 0]


def our_policy_loss(tensors):
    new = token_logprobs(tensors["logits"], tensors["tokens"])
    old, advantages, mask = (tensors[name] for name in ("old_logprobs", "advantages", "mask"))
    return new, *policy_loss(new, old, advantages, mask, CLIP)


def test_policy_loss_and_gradient_by_the_logits_are_theirs(batch, agree):
    """Equal, with the ratio's clip taken in the log by torchrl."""
    tensors, theirs, their_gradient, _, _ = batch
    _, loss, _ = our_policy_loss(tensors)
    (gradient,) = torch.autograd.grad(loss, tensors["logits"])
    agree("torchrl  policy loss", loss, theirs["loss_objective"])
    agree("torchrl  gradient by the logits", gradient[tensors["mask"]], their_gradient, atol=1e-8)
    entropy = masked_mean(token_entropy(tensors["logits"]), tensors["mask"])
    agree("torchrl  entropy", entropy, theirs["entropy"])


def test_clip_fraction_is_theirs_but_for_ratios_whose_gradient_stays(batch, agree):
    """torchrl counts every ratio outside 1 +- clip. We count those whose gradient the clip removes:
    not a ratio above with a negative advantage, nor one below with a positive."""
    tensors, theirs, _, _, _ = batch
    new, _, stats = our_policy_loss(tensors)
    ratio = (new - tensors["old_logprobs"]).exp()
    negative = tensors["advantages"] <= 0
    stays = ((ratio > 1 + CLIP) & negative) | ((ratio < 1 - CLIP) & ~negative)
    ours = (stats["clip_fraction"] + (stays & tensors["mask"]).sum()) / stats["num_tokens"]
    agree("torchrl  clip fraction = ours + gradient stays", ours, theirs["clip_fraction"])
    assert 5 < stats["clip_fraction"] < ours * stats["num_tokens"] - 5


def test_approx_kl_is_theirs_plus_the_mean_ratio_less_one(batch, agree):
    """torchrl logs the mean of log old - log new (k1, may be negative); we add ratio - 1, whose
    expectation is 0 (k3, never negative)."""
    tensors, theirs, _, _, _ = batch
    new, _, stats = our_policy_loss(tensors)
    k1 = masked_mean(kl_estimate(tensors["old_logprobs"], new, "k1"), tensors["mask"])
    agree("torchrl  kl_approx = our k1 of old and new", k1, theirs["kl_approx"])
    agree("torchrl  mean ratio", stats["ratio"] / stats["num_tokens"], theirs["mean_ratio"])
    agree("torchrl  largest ratio", stats["ratio_max"], theirs["max_ratio"])
    agree(
        "torchrl  kl_approx + mean ratio - 1 = our approx_kl",
        stats["approx_kl"] / stats["num_tokens"],
        theirs["kl_approx"] + theirs["mean_ratio"] - 1,
    )


def test_value_loss_and_gradient_are_half_of_theirs(batch, agree):
    """torchrl does not halve the square; with a clip it takes the larger error, as we do. It counts
    every value that the clip changes; we those whose clipped error is the larger."""
    tensors, theirs, _, their_gradient, clip = batch
    mask, values, old = (tensors[name] for name in ("mask", "values", "old_values"))
    loss, stats = value_loss(values, old, tensors["returns"], mask, clip)
    (gradient,) = torch.autograd.grad(loss, values)
    kind = "value loss" if clip is None else "clipped value loss"
    agree(f"torchrl  {kind} = 2 x ours", 2 * loss, theirs["loss_critic"])
    what = f"torchrl  gradient of the {kind} = 2 x ours"
    agree(what, 2 * gradient[mask], their_gradient, atol=1e-8)
    explained = explained_variance(values, tensors["returns"], mask)
    agree("torchrl  explained variance", explained, theirs["explained_variance"].squeeze())
    if clip is None:
        return
    change = values - old
    clipped_error = (old + change.clamp(-clip, clip) - tensors["returns"]).square()
    smaller = mask & (change.abs() > clip)
    smaller &= clipped_error <= (values - tensors["returns"]).square()
    ours = (stats["value_clip_fraction"] + smaller.sum()) / stats["num_tokens"]
    agree("torchrl  value clip fraction = ours + smaller", ours, theirs["value_clip_fraction"])
    assert smaller.sum() > 5 and stats["value_clip_fraction"] > 5
