"""A PPO run that takes a second: a tiny random policy with dropout configured, and its settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers.tiny import tiny_model, tiny_tokenizer

from rlhf import PPOResult, PPOTrainer, train_ppo
from rlhf.config import (
    CheckpointConfig,
    CriticConfig,
    DatasetConfig,
    EvaluationConfig,
    ModelConfig,
    PPOConfig,
    PPOStageConfig,
    ScorerConfig,
)
from rlhf.data import encode_prompts
from rlhf.ppo.actors import load_actors
from rlhf.tokenizer import load_tokenizer

WORDS = "apple river stone cloud paper light green table under seven".split()


def count_ascii(prompts, responses):
    """Score a response by its ASCII characters; half of the tiny tokenizer's bytes are not."""
    return [float(sum(map(str.isascii, response))) for response in responses]


def words_scorer(prompts, responses):
    """Score by length, so that scores differ between responses of a random policy."""
    return [len(response) / 10 for response in responses]


def write_policy(directory: Path) -> Path:
    """A tiny random Llama with dropout configured, and its tokenizer."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", tokenizer, attention_dropout=0.5)
    # many stop tokens, so that responses of the random policy end at different lengths
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(10, 320, 20)]
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_prompts(path: Path) -> Path:
    """24 prompts of different lengths."""
    rows = [{"prompt": " ".join(WORDS[i % 7 : i % 7 + 1 + i % 4]) + str(i)} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_config(policy_dir: Path, folder: Path, **ppo) -> PPOStageConfig:
    """A configuration that runs in a second."""
    knobs = {
        "num_updates": 4,
        "batch_size": 8,
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
        "micro_batch_size": 3,
        "response_length": 12,
        "learning_rate": 1e-3,
    }
    return PPOStageConfig(
        runs_dir=str(folder / "runs"),
        model=ModelConfig(path=str(policy_dir)),
        dataset=DatasetConfig(
            path=str(write_prompts(folder / "prompts.jsonl")),
            format="prompt_completion",
            eval_fraction=0.3,
        ),
        ppo=PPOConfig(**(knobs | ppo)),
        scorer=ScorerConfig(path=f"python:{__name__}.words_scorer", normalize="none"),
        critic=CriticConfig(init="policy", learning_rate=1e-3, must_explain=False),
        evaluation=EvaluationConfig(every=2, num_prompts=4),
        checkpoint=CheckpointConfig(every=2),
        preflight=False,
    )


def make_trainer(config: PPOStageConfig, folder: Path, num_prompts: int = 16) -> PPOTrainer:
    """A trainer without the stage around it."""
    tokenizer = load_tokenizer(config.model)
    accelerator = Accelerator(cpu=True)
    actors = load_actors(config, tokenizer, None, accelerator)
    rows = [{"prompt": " ".join(WORDS[i % 7 : i % 7 + 1 + i % 4])} for i in range(num_prompts)]
    prompts, _ = encode_prompts(rows, tokenizer, 64)
    return PPOTrainer(config, actors, prompts, accelerator, folder)


def weights(trainer: PPOTrainer) -> torch.Tensor:
    """All parameters of policy and critic in one vector."""
    models = (trainer.actors.policy, trainer.actors.critic)
    return torch.cat([p.detach().flatten() for model in models for p in model.parameters()])


def move_policy(trainer, size=0.05):
    """Take the policy away from the reference."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.actors.policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(size * noise)


class Crash(Exception):
    """A lost machine."""


def crashed_and_resumed(config: PPOStageConfig, monkeypatch: pytest.MonkeyPatch) -> PPOResult:
    """The result of a run that crashes in its fourth update, and of the one that resumes it."""
    config.run_name = "crashed"
    step = PPOTrainer.step

    def crash(self: PPOTrainer) -> dict[str, float]:
        if self.update == 3:
            raise Crash
        return step(self)

    monkeypatch.setattr(PPOTrainer, "step", crash)
    with pytest.raises(Crash):
        train_ppo(config)
    monkeypatch.setattr(PPOTrainer, "step", step)
    return train_ppo(dataclasses.replace(config, resume=True))
