"""The gap between log-probs of sampler and policy: its figures, and a run that it ends.

Run: pytest tests/ppo/test_sampler_gap.py
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.tiny_ppo import make_config, make_trainer, weights

import rlhf.ppo.rollout as rollout_module
from rlhf import train_ppo
from rlhf.config import InputError
from rlhf.metrics import read_jsonl
from rlhf.ppo.rollout import Experience, Responses
from rlhf.ppo.sampler_gap import sampler_gaps
from rlhf.sampling import Generation

IN_LOSS = {"kl_in": "loss", "kl_estimator": "k3", "num_mini_batches": 1}


def test_the_figures_are_those_of_hand_counted_gaps():
    """2000 tokens in rows of different lengths: 1 to 2000 thousandths of a nat, either sign."""
    gaps = [(i + 1) / 1000 * (-1) ** i for i in range(2000)]
    rows = [gaps[:700], gaps[700:], [0.0]]
    sampled = Generation([[5] * len(row) for row in rows], rows, [True] * 3)
    responses = Responses.padded([[1]] * 3, sampled, 0, torch.device("cpu"))
    batch = Experience.of_equal_advantages(responses, torch.zeros(3, 1300))
    batch.logprobs[2, 1:] = 7.0  # masked
    found = sampler_gaps(batch)
    assert found["sampler_gap"] == pytest.approx(2.0)
    assert found["sampler_gap_mean"] == pytest.approx(1.0005 * 2000 / 2001)
    assert found["sampler_gap_p999"] == pytest.approx(1.998)  # two of 2001 are above


def sample_wrongly(monkeypatch, gap):
    """Log-probs of the sampler that are wrong by `gap` nats at every token."""
    right = rollout_module.generate

    def generate(*arguments):
        made = right(*arguments)
        made.logprobs = [[x + gap for x in row] for row in made.logprobs]
        return made

    monkeypatch.setattr(rollout_module, "generate", generate)


@pytest.mark.parametrize("knobs", [{}, IN_LOSS], ids=["read before", "read in the first epoch"])
def test_a_wide_gap_ends_the_run_before_anything_is_updated(
    knobs, policy_dir, tmp_path, monkeypatch
):
    trainer = make_trainer(make_config(policy_dir, tmp_path, **knobs), tmp_path)
    assert trainer.reads_policy() == (not knobs)
    sample_wrongly(monkeypatch, 1.5)
    before = weights(trainer)
    with pytest.raises(InputError) as error:
        trainer.step()
    assert str(error.value) == (
        "update 1: log-probs of sampler and policy differ by 1.5 nats at one token in a thousand "
        "(mean 1.5), more than sampling.max_gap=1: it sampled with other weights or another "
        "precision, and nothing was updated with it. Set sampling.dtype=float32 or "
        "sampling.engine=loop, or raise sampling.max_gap"
    )
    assert torch.equal(weights(trainer), before)
    trainer.config.sampling.max_gap = None
    assert trainer.step()["sampler_gap_p999"] == pytest.approx(1.5, abs=1e-4)


def test_a_run_that_the_gap_ended_continues(policy_dir, tmp_path, monkeypatch):
    config = make_config(policy_dir, tmp_path, num_updates=3, **IN_LOSS)
    config.evaluation.num_prompts = 0
    whole = dataclasses.replace(config, run_name="whole")
    train_ppo(whole)
    with monkeypatch.context() as patch:
        step = rollout_module.uniform_noise

        def spoil_third(key, *rest):
            if key[1] == 2:
                sample_wrongly(patch, 1.5)
            return step(key, *rest)

        patch.setattr(rollout_module, "uniform_noise", spoil_third)
        with pytest.raises(InputError, match="update 3: log-probs.*update 2 is saved in .*resume"):
            train_ppo(config)
    train_ppo(dataclasses.replace(config, resume=True))
    rows = [read_jsonl(c.stage_dir("ppo") / "metrics.jsonl") for c in (whole, config)]
    assert rows[1] == rows[0]
