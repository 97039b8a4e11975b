"""Our formulas against those of TRL 1.12's PPOTrainer, on the tensors of one real update of it.

Where the two differ, the test computes the difference from the inputs and checks that it is all.
TRL marks a response by lengths: `padding_mask` is False up to and including EOS, which is our mask;
`padding_mask_p1` is False one position further where EOS came early, which we have no use for.
Left out: sampling, truncation and `missing_eos_penalty`, which are not formulas of ours.

Run: see requirements.txt
"""

import pytest
import torch
from trl_run import run_one_update

from rlhf.functional import (
    gae,
    kl_estimate,
    masked_mean,
    policy_loss,
    shape_rewards,
    token_entropy,
    token_logprobs,
    value_loss,
    whiten,
)

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def trl_ppo():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        reason = (
            "trl.experimental.ppo is needed, last in trl 1.12.0; see tests/peers/requirements.txt"
        )
        pytest.importorskip("trl.experimental.ppo", reason=reason)
        return pytest.importorskip("trl.experimental.ppo.ppo_trainer")


@pytest.fixture(scope="module", params=[("k1", False), ("k3", True)], ids=["k1", "k3-whitened"])
def run(request, trl_ppo, tmp_path_factory):
    kl_estimator, whiten_rewards = request.param
    output_dir = str(tmp_path_factory.mktemp("trl"))
    return run_one_update(output_dir, kl_estimator=kl_estimator, whiten_rewards=whiten_rewards)


def masks(run, rows=slice(None)):
    """Our mask, and TRL's that is one position longer behind an early EOS."""
    return ~run.rollout["padding_mask"][rows], ~run.rollout["padding_mask_p1"][rows]


def rewards_before_whitening(run):
    return run.whitenings[0][0] if run.args.whiten_rewards else run.rollout["rewards"]


def advantages_before_whitening(run):
    return run.whitenings[-1][0]


def minibatches(run):
    """Each minibatch with its rows of both masks and the statistics that TRL filed for it."""
    statistics = [name for name in run.rollout if name.endswith("_stats")]
    for number, minibatch in enumerate(run.minibatches):
        filed = {name: run.rollout[name].flatten()[number] for name in statistics}
        yield minibatch | filed, *masks(run, minibatch["micro_batch_inds"])


def test_the_run_holds_every_case(run):
    """Early and late ends, ratios and values clipped in both directions, and a first ratio of 1."""
    lengths = run.rollout["sequence_lengths"] + 1
    assert (lengths < 12).sum() >= 5 and (lengths == 12).sum() >= 5 and lengths.min() <= 2
    assert len(run.minibatches) == run.rollout["ratio_stats"].numel() == 6
    assert run.rollout["ratio_stats"].flatten()[0] == pytest.approx(1, abs=1e-5)
    ratios = torch.cat([m["ratio"].flatten() for m in run.minibatches])
    assert (ratios > 1.2).sum() > 20 and (ratios < 0.8).sum() > 20
    changes = torch.cat([(m["vpred"] - m["mb_values"]).flatten() for m in run.minibatches])
    assert (changes > 0.2).sum() > 20 and (changes < -0.2).sum() > 20
    assert run.rollout["kl"].abs().max() > 0.1


def test_masked_mean_is_theirs_where_something_is_valid(trl_ppo, agree):
    """Equal on valid elements. TRL multiplies by the mask, so nan or inf under it spreads, and
    divides by 0 where nothing is valid; ours ignores what is masked and gives 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((6, 9), generator=generator)
    mask = torch.rand((6, 9), generator=generator) < 0.6
    mask[2] = False
    valid = mask.any(1)
    agree("TRL  masked_mean, all", masked_mean(x, mask), trl_ppo.masked_mean(x, mask))
    theirs = trl_ppo.masked_mean(x, mask, axis=1)
    agree("TRL  masked_mean, per row", masked_mean(x, mask, dim=1)[valid], theirs[valid])
    assert theirs[~valid].isnan().all() and (masked_mean(x, mask, dim=1)[~valid] == 0).all()
    dirty = x.where(mask, torch.nan)
    assert trl_ppo.masked_mean(dirty, mask).isnan()
    assert masked_mean(dirty, mask) == masked_mean(x, mask)


def test_whitening_differs_by_the_unbiased_variance(run, agree):
    """TRL divides by sqrt(v n / (n - 1) + 1e-8), n valid elements of biased variance v; we, as
    OpenAI's code of 2019, by sqrt(v + 1e-8). The mean that `shift_mean=False` adds back is not
    scaled. TRL also leaves values under the mask, which it fills with 0 afterwards; ours are 0."""
    for values, mask, shift_mean, theirs in run.whitenings:
        ours = whiten(values, mask, center=shift_mean)
        valid = values[mask].double()
        count, mean, variance = len(valid), valid.mean(), valid.var(unbiased=False)
        factor = ((variance + 1e-8) / (variance * count / (count - 1) + 1e-8)).sqrt()
        added = 0.0 if shift_mean else mean
        kind = "advantages" if shift_mean else "rewards"
        agree(
            f"TRL  masked_whiten of {kind} = ours x Bessel's factor",
            ((ours[mask] - added) * factor + added),
            theirs[mask],
        )
        assert factor < 0.999 and (ours[~mask] == 0).all() and (theirs[~mask] != 0).any()


def test_logprobs_and_entropy_use_the_temperature_as_theirs(run, agree):
    """TRL divides by temperature + 1e-7. Its mean entropy counts the padding; ours does not."""
    temperature = run.args.temperature + 1e-7
    rollout, (mask, _) = run.rollout, masks(run)
    ours = token_logprobs(rollout["logitss"], rollout["responses"])  # scaled by generate
    agree("TRL  log-probs of the rollout", ours[mask], rollout["logprobs"][mask])
    for minibatch, mask, _ in minibatches(run):
        logits, tokens = minibatch["raw_logits"], minibatch["mb_responses"]
        ours = token_logprobs(logits, tokens, temperature)
        agree("TRL  log-probs in training", ours[mask], minibatch["new_logprobs"][mask])
        entropy = token_entropy(logits, temperature)
        agree(
            "TRL  mean entropy = ours + padding's",
            (masked_mean(entropy, mask) * mask.sum() + entropy[~mask].sum()) / mask.numel(),
            minibatch["entropy_stats"],
        )
        assert not masked_mean(entropy, mask).isclose(minibatch["entropy_stats"], rtol=1e-3)


def test_kl_estimates_are_theirs(run, agree):
    """Equal, also at padding: TRL puts 1.0 for both log-probs there, so that the KL is 0."""
    kind, (mask, _) = run.args.kl_estimator, masks(run)
    ours = kl_estimate(run.rollout["logprobs"], run.rollout["ref_logprobs"], kind)
    agree(f"TRL  per-token KL, {kind}", ours, run.rollout["kl"])
    per_sequence = (masked_mean(ours, mask, dim=1) * mask.sum(1)).mean()
    agree(f"TRL  logged objective/kl, {kind}", per_sequence, run.logged["objective/kl"])


def test_rewards_are_theirs_but_for_the_place_of_the_score(run, agree):
    """After an early EOS, TRL puts the score one position later, on the padding; we on the EOS.
    Without one both put it on the last token. The sums over a response are equal."""
    (mask, _), scores = masks(run), run.rollout["scores"]
    ours = shape_rewards(scores, run.rollout["kl"], mask, run.args.kl_coef)
    agree(
        "TRL  logged objective/rlhf_reward", ours.sum(1).mean(), run.logged["objective/rlhf_reward"]
    )
    moved = ours.clone()
    for row, length in enumerate(mask.sum(1)):
        if length < mask.shape[1]:
            moved[row, length - 1] -= scores[row]
            moved[row, length] += scores[row]
    agree("TRL  rewards = ours, score one step late", moved, rewards_before_whitening(run))


def test_gae_is_theirs_on_their_rewards(run, agree):
    """Equal on TRL's rewards, values and longer mask; beyond the mask both are 0."""
    rewards, values, (_, longer_mask) = run.rollout["rewards"], run.rollout["values"], masks(run)
    advantages, returns = gae(rewards, values, longer_mask, run.args.gamma, run.args.lam)
    agree("TRL  GAE advantages", advantages, advantages_before_whitening(run))
    agree("TRL  GAE returns", returns, run.rollout["returns"])


def test_advantages_differ_by_the_step_that_the_late_score_adds(run, agree):
    """With the reward R behind EOS (the score) on EOS instead, and nothing behind it, as ours:

        ours - TRL's = (gamma lam)^(steps to EOS) ((1 - gamma lam) R - gamma (1 - lam) V(after EOS))

    TRL discounts the score once more and bootstraps from the value of a state that is never acted
    in. The difference is 0 only for gamma = lam = 1, or where the response fills its budget.
    """
    gamma, lam, (mask, longer_mask) = run.args.gamma, run.args.lam, masks(run)
    rewards, values, length = run.rollout["rewards"], run.rollout["values"], mask.sum(1)
    on_eos, expected = rewards.clone(), advantages_before_whitening(run).double()
    for row in range(len(mask)):
        end = length[row] - 1
        if end + 1 < mask.shape[1]:
            late, after = rewards[row, end + 1], values[row, end + 1]
            on_eos[row, end] += late
            steps = end - torch.arange(end + 1)
            error = (1 - gamma * lam) * late.double() - gamma * (1 - lam) * after
            expected[row, : end + 1] += (gamma * lam) ** steps * error
    ours, returns = gae(on_eos, values, mask, gamma, lam)
    agree("TRL  advantages + the late score's effect", ours[mask], expected[mask])
    agree("TRL  returns + the late score's effect", returns[mask], (expected + values)[mask])
    early = (longer_mask & ~mask).any(1)
    difference = (ours - advantages_before_whitening(run)).where(mask, 0.0).abs()
    assert difference[early].max() > 0.05 and difference[~early].max() < 1e-5


def test_policy_loss_gradient_and_clip_fraction_are_theirs(run, agree):
    """Equal: the same mask, a mean over all tokens of the minibatch, ties not taken for clipped."""
    clipped = []
    for minibatch, mask, _ in minibatches(run):
        logits = minibatch["logits"].requires_grad_()  # TRL has divided them by the temperature
        new = token_logprobs(logits, minibatch["mb_responses"])
        old, advantages = minibatch["mb_logprobs"], minibatch["mb_advantage"]
        loss, stats = policy_loss(new, old, advantages, mask, run.args.cliprange)
        by_logprobs, by_logits = torch.autograd.grad(loss, [new, logits])
        agree("TRL  policy loss", loss, minibatch["pg_loss"])
        agree(
            "TRL  gradient by the log-probs", by_logprobs, minibatch["grad_new_logprobs"], atol=1e-8
        )
        agree("TRL  gradient by the logits", by_logits, minibatch["grad_logits"], atol=1e-8)
        clipped.append(stats["clip_fraction"] / stats["num_tokens"])
        agree("TRL  clip fraction", clipped[-1], minibatch["pg_clipfrac_stats"])
    assert max(clipped) > 0.05


def test_approx_kl_and_ratio_differ_by_the_estimator_and_by_padding(run, agree):
    """TRL logs the mean over all positions, padding included, where the ratio is exp(1 - 1) = 1,
    and as KL the half square d^2 / 2 (k2); we the mean over tokens, and e^d - 1 - d (k3)."""
    for number, (minibatch, mask, _) in enumerate(minibatches(run)):
        new, old = minibatch["new_logprobs"], minibatch["mb_logprobs"]
        _, stats = policy_loss(new, old, minibatch["mb_advantage"], mask, run.args.cliprange)
        padding, places = int((~mask).sum()), mask.numel()
        their_ratio = (stats["ratio"] + padding) / places
        agree("TRL  mean ratio = ours + padding's", their_ratio, minibatch["ratio_stats"])
        k2 = masked_mean(kl_estimate(new, old, "k2"), mask) * stats["num_tokens"] / places
        agree("TRL  approxkl = our k2, diluted", k2, minibatch["approxkl_stats"])
        change = (new - old)[mask].double()
        remainder = (change.expm1() - change - change.square() / 2).mean()  # d^3 / 6 + ...
        theirs = minibatch["approxkl_stats"].double() * places / stats["num_tokens"]
        ours = stats["approx_kl"] / stats["num_tokens"]
        agree("TRL  approxkl + remainder = our approx_kl", ours, theirs + remainder)
        assert padding > 0 and (number == 0 or abs(remainder) > 1e-5)


def test_value_loss_gradient_and_clip_fraction_are_theirs_but_for_the_place_after_eos(run, agree):
    """Equal on TRL's longer mask. It also trains the value behind an early EOS towards the score;
    on our mask the sum of losses is smaller by exactly those positions'."""
    clipped = []
    for minibatch, mask, longer_mask in minibatches(run):
        values = minibatch["vpred"].requires_grad_()
        targets = minibatch["mb_values"], minibatch["mb_return"]
        loss, stats = value_loss(values, *targets, longer_mask, run.args.cliprange_value)
        (gradient,) = torch.autograd.grad(run.args.vf_coef * loss, values)
        agree("TRL  value loss", loss, minibatch["vf_loss"])
        agree("TRL  gradient by the values", gradient, minibatch["grad_vpred"], atol=1e-8)
        clipped.append(stats["value_clip_fraction"] / stats["num_tokens"])
        agree("TRL  value clip fraction", clipped[-1], minibatch["vf_clipfrac_stats"])

        ours, stats = value_loss(values, *targets, mask, run.args.cliprange_value)
        extra = 0.5 * minibatch["vf_loss_max"][longer_mask & ~mask].sum()
        with_extra = (ours * mask.sum() + extra) / longer_mask.sum()
        agree("TRL  value loss = ours + after EOS", with_extra, minibatch["vf_loss"])
        assert extra > 0
    assert max(clipped) > 0.05
