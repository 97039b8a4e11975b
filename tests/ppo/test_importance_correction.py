"""What the sampler draws from other probabilities than the policy's, and the correction for it.

Run: pytest tests/ppo/test_importance_correction.py
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.families import NONE_FORBIDDEN, positions_before_last, response_logits
from helpers.tiny_ppo import make_config, make_trainer
from torch.testing import assert_close

from rlhf.ppo.rollout import Experience, Responses, policy_logprobs
from rlhf.sampling import Generation

NUM_TOKENS = 320  # of the tiny tokenizer
FALSE_TEMPERATURE = 1.3


def gradient_of_expectation(trainer, sampler, correction):
    """Expected policy gradient at the reference, over every response of one token, (parameters,).

    The responses are all tokens, each with its advantage times its probability under the sampler.
    """
    trainer.config.ppo.importance_correction = correction
    trainer.config.ppo.importance_cap = 1000.0
    prompt, tokens = trainer.prompts[0]["input_ids"], [[i] for i in range(NUM_TOKENS)]
    sampled = Generation(tokens, sampler.log()[:, None].tolist(), [True] * NUM_TOKENS)
    rows = Responses.padded([prompt] * NUM_TOKENS, sampled, 0, torch.device("cpu"))
    policy = trainer.actors.policy
    with torch.no_grad():
        logprobs, _ = policy_logprobs(policy, rows, trainer.sampling)
    batch = Experience.of_equal_advantages(rows, logprobs)
    advantages = torch.linspace(-1, 2, NUM_TOKENS) ** 3 * sampler
    batch = dataclasses.replace(batch, advantages=advantages[:, None])
    policy.zero_grad()
    stats = trainer.updater.policy_backward(batch, 1.0, 0.0)
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    return gradient, stats


def test_the_correction_gives_the_gradient_of_the_policy_from_a_wrong_sampler(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path, micro_batch_size=NUM_TOKENS, response_length=1)
    trainer = make_trainer(config, tmp_path)
    trainer.sampling = trainer.updater.sampling = dataclasses.replace(
        trainer.sampling, forbidden=NONE_FORBIDDEN
    )
    ids = torch.tensor([[*trainer.prompts[0]["input_ids"], 5]])
    mask, before = torch.ones_like(ids, dtype=torch.bool), positions_before_last(ids, 1)
    with torch.no_grad():
        logits = response_logits(trainer.actors.policy, ids, mask, before, NONE_FORBIDDEN)[0, 0]
    right, wrong = logits.softmax(-1), (logits / FALSE_TEMPERATURE).softmax(-1)
    expected, _ = gradient_of_expectation(trainer, right, None)
    same, stats = gradient_of_expectation(trainer, right, "truncated")
    corrected, _ = gradient_of_expectation(trainer, wrong, "truncated")
    without, _ = gradient_of_expectation(trainer, wrong, None)
    size = expected.norm()
    assert (same - expected).norm() < 1e-5 * size
    assert (corrected - expected).norm() < 1e-5 * size
    assert (without - expected).norm() > 0.1 * size
    assert_close(float(stats["importance_weight"]), float(NUM_TOKENS), rtol=1e-5, atol=0)


@pytest.mark.parametrize("correction", [None, "truncated"])
def test_an_update_with_the_correction_is_that_without_where_the_sampler_is_right(
    policy_dir, tmp_path, correction
):
    results = []
    for chosen in (None, correction):
        config = make_config(policy_dir, tmp_path, importance_correction=chosen)
        metrics = make_trainer(config, tmp_path).step()
        results.append(metrics)
    plain, other = results
    assert ("importance_weight" in other) == (correction is not None)
    assert other["policy_loss"] == pytest.approx(plain["policy_loss"], rel=1e-4, abs=1e-6)
    assert other["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
    if correction is not None:
        assert other["importance_weight"] == pytest.approx(1.0, abs=1e-4)
