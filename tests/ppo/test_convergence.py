"""PPO and the estimators without a critic reach the known optimum of KL-regularised reward.

For a reward of whole responses the optimum is pi(y) ~ ref(y) exp(r(y) / beta) (Ziegler et al. 2019,
section 2; Korbak et al. 2022, arXiv 2205.11275). Here r(y) counts good tokens, so that it is a sum
over tokens, and the world is small enough to write down every response: 6 tokens, 3 of them, 216
responses. Expectations of the optimum and of the trained policy are exact sums over these, in
float64; nothing is sampled to judge. The reference is a random model, so its tokens depend on each
other and the optimum is not a product over tokens.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from accelerate import Accelerator
from helpers.families import positions_before_last, response_logits
from helpers.tiny_ppo import make_config

from rlhf import PPOTrainer
from rlhf.data import encode_prompts
from rlhf.ppo.actors import load_actors
from rlhf.tokenizer import load_tokenizer

LETTERS, GOOD, NUM_TOKENS = "abcdef", "cf", 3


def count_good(prompts, responses):
    """The reward: one for each good token."""
    return [float(sum(letter in GOOD for letter in response)) for response in responses]


def small_world(policy_dir, folder, seed, beta, **ppo) -> PPOTrainer:
    """A trainer whose policy can only say three of the six letters."""
    knobs = {
        "num_updates": 40,
        "batch_size": 128,
        "micro_batch_size": 128,
        "rollout_batch_size": 128,
        "num_ppo_epochs": 4,
        "num_mini_batches": 1,
        "response_length": NUM_TOKENS,
        "kl_coef": beta,
        "missing_eos_penalty": None,
        "learning_rate": 2e-3,
        "whiten_advantages": False,
    }
    config = make_config(policy_dir, folder, **(knobs | ppo))
    config.seed, config.critic.learning_rate = seed, 1e-2
    tokenizer, accelerator = load_tokenizer(config.model), Accelerator(cpu=True)
    actors = load_actors(config, tokenizer, count_good, accelerator)
    allowed = {tokenizer(letter)["input_ids"][0] for letter in LETTERS}
    forbidden = torch.tensor([i for i in range(len(tokenizer)) if i not in allowed])
    prompts = encode_prompts([{"prompt": "say"}] * 128, tokenizer, 64)[0]
    trainer = PPOTrainer(config, actors, prompts, accelerator, folder)
    sampling = dataclasses.replace(trainer.sampling, forbidden=forbidden, stop_ids=())
    trainer.sampling = trainer.updater.sampling = sampling
    return trainer


def every_response(trainer: PPOTrainer) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (216, 3) and rewards (216,) of all that can be said."""
    texts = ["".join(letters) for letters in itertools.product(LETTERS, repeat=NUM_TOKENS)]
    tokenizer = trainer.actors.tokenizer
    ids = torch.tensor([[tokenizer(letter)["input_ids"][0] for letter in text] for text in texts])
    return ids, torch.tensor(count_good(None, texts), dtype=torch.float64)


@torch.no_grad()
def log_probabilities(model, trainer: PPOTrainer, ids: torch.Tensor) -> torch.Tensor:
    """Log-probability of every response, (216,) float64."""
    prompt = torch.tensor(trainer.prompts[0]["input_ids"]).expand(len(ids), -1)
    sequences = torch.cat([prompt, ids], dim=1)
    mask = torch.ones_like(sequences, dtype=torch.bool)
    positions = positions_before_last(sequences, NUM_TOKENS)
    logits = response_logits(model, sequences, mask, positions, trainer.sampling.forbidden)
    return logits.double().log_softmax(-1).gather(-1, ids[:, :, None]).sum(dim=(1, 2))


def judge(trainer: PPOTrainer, beta: float) -> dict[str, tuple[float, float]]:
    """Expected share of good tokens, and KL to the reference in nats, of three policies."""
    ids, rewards = every_response(trainer)
    reference = log_probabilities(trainer.actors.reference, trainer, ids)
    optimum = reference + rewards / beta
    policies = {
        "reference": reference,
        "reached": log_probabilities(trainer.actors.policy, trainer, ids),
        "optimum": optimum - optimum.logsumexp(0),
    }
    assert all(abs(float(p.exp().sum()) - 1) < 1e-6 for p in policies.values())
    return {
        name: (
            float((p.exp() * rewards).sum()) / NUM_TOKENS,
            float((p.exp() * (p - reference)).sum()),
        )
        for name, p in policies.items()
    }


def trained(policy_dir, folder, seed, beta, **ppo) -> dict[str, tuple[float, float]]:
    """What `judge` says after all updates."""
    trainer = small_world(policy_dir, folder, seed, beta, **ppo)
    for _ in range(trainer.config.ppo.num_updates):
        trainer.step()
    return judge(trainer, beta)


@pytest.mark.parametrize(
    "beta, seed",
    [
        (0.8, 1),
        *(
            pytest.param(beta, seed, marks=pytest.mark.slow)
            for beta, seed in [(0.4, 1), (0.4, 2), (0.8, 2), (1.6, 1), (1.6, 2)]
        ),
    ],
)
def test_ppo_reaches_the_closed_form_optimum(policy_dir, tmp_path, beta, seed):
    """Within 0.02 of the share of good tokens, and 10 % of the KL; seen: 0.010 and 6.8 %."""
    results = trained(policy_dir, tmp_path, seed, beta)
    (start, _), (share, kl), (best, best_kl) = results.values()
    assert best - start > 0.15
    assert share == pytest.approx(best, abs=0.02), results
    assert kl == pytest.approx(best_kl, rel=0.1), results


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [
        {"advantage": "rloo", "samples_per_prompt": 8},
        {"advantage": "reinforce_pp", "whiten_advantages": True},
        {"advantage": "grpo", "samples_per_prompt": 8},
        {"kl_in": "loss", "kl_estimator": "k2"},
    ],
    ids=str,
)
def test_the_other_ways_reach_it_too(policy_dir, tmp_path, knobs):
    """Within 0.04 of the share, and 20 % of the KL; seen on two seeds: 0.023 and 12 %.

    GRPO divides by the spread of a prompt's scores, which moves no zero of the gradient here: there
    is one prompt.
    """
    results = trained(policy_dir, tmp_path, 2, 0.8, **knobs)
    _, (share, kl), (best, best_kl) = results.values()
    assert share == pytest.approx(best, abs=0.04), results
    assert kl == pytest.approx(best_kl, rel=0.2), results


def test_without_the_penalty_ppo_leaves_the_optimum_behind(policy_dir, tmp_path):
    """The test can fail: at beta = 0 the share of good tokens goes to 1."""
    results = trained(policy_dir, tmp_path, 1, 0.8, kl_coef=0.0, num_updates=20)
    _, (share, _), (best, _) = results.values()
    assert share > best + 0.1
