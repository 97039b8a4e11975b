"""Our PPO on models made from seeds: three updates of a 1.2 B Llama, or two with LoRA at 7 B.

64 prompts, 256 response tokens, 4 epochs of 4 minibatches; bf16 autocast on a GPU. `trl_ppo.py` is
the same with TRL. Every weight is float32; with LoRA the frozen ones are bfloat16.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from world import DEVICE, check_finite, make_model, make_prompts, make_tokenizer, median, write
from world import options as command_line

import rlhf.ppo.rollout
from rlhf.config import CriticConfig, ModelConfig, PeftConfig, PPOConfig, PPOStageConfig
from rlhf.distributed import make_accelerator
from rlhf.models import ScalarModel, add_lora, disable_dropout, freeze
from rlhf.ppo import PPOTrainer
from rlhf.ppo.actors import Actors
from rlhf.scorers.reward_model import score_sequences
from rlhf.tokenizer import hash_rendering


def main() -> None:
    options = command_line()
    dry = options.size == "dry"
    num_updates = 2 if options.lora or dry else 3
    tokenizer, actors = make_tokenizer(options.size), make_actors(options.size, options.lora)
    ppo = PPOConfig(
        num_updates=num_updates,
        batch_size=8 if dry else 64,
        num_mini_batches=4,
        micro_batch_size=2 if dry else 16,
        response_length=8 if dry else 256,
        learning_rate=1e-6,
        lr_schedule="constant",
        missing_eos_penalty=None,
    )
    config = PPOStageConfig(
        model=ModelConfig(path="made here"),
        peft=PeftConfig(enabled=options.lora),
        ppo=ppo,
        critic=CriticConfig(init="policy", learning_rate=1e-6),
    )
    prompts = [
        {"prompt": tokenizer.decode(ids), "input_ids": ids}
        for ids in make_prompts(options.size, num_updates * ppo.batch_size)
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(config, actors, prompts, make_accelerator("auto"), Path(folder))
        rows = [timed_step(trainer) for _ in range(num_updates)]
    check_finite(rows, actors.policy, actors.critic)
    phases = {name: median(rows, name) for name in ("rollout", "scoring", "optimise", "step")}
    tokens = ppo.batch_size * median(rows, "response_length")
    write(
        options.figures,
        phases=phases,
        tokens_per_second=tokens / phases["step"],
        parameters=sum(p.numel() for p in actors.policy.parameters()),
        updates=rows,
    )


def make_actors(size: str, lora: bool) -> Actors:
    """Policy, reference, critic and reward model of one shape; with LoRA the policy without its
    adapters is the reference."""
    tokenizer = make_tokenizer(size)
    frozen = torch.bfloat16 if lora and DEVICE == "cuda" else torch.float32

    def classifier(seed: int) -> Any:
        model = make_model(LlamaForSequenceClassification, size, seed, frozen, num_labels=1)
        model.score = model.score.float()
        return model

    policy, reference = make_model(LlamaForCausalLM, size, 1, frozen), None
    value = classifier(3)
    if lora:
        policy = add_lora(policy, PeftConfig(enabled=True), "CAUSAL_LM", 1)
        value = add_lora(value, PeftConfig(enabled=True), "SEQ_CLS", 1)
    else:
        reference = freeze(make_model(LlamaForCausalLM, size, 1))
    for model in (policy, value):
        disable_dropout(model)
    reward = freeze(ScalarModel(classifier(2)))

    def score(prompts: list[str], responses: list[str]) -> torch.Tensor:
        texts = [f"{p} {r}" for p, r in zip(prompts, responses, strict=True)]
        return score_sequences(reward, tokenizer(texts)["input_ids"], 64)

    critic = ScalarModel(value)
    return Actors(policy, reference, critic, score, tokenizer, hash_rendering(tokenizer))


def timed_step(trainer: PPOTrainer) -> dict[str, float]:
    """One update: its metrics, and the seconds of its phases."""
    sampled = []

    def generate(*arguments: Any, **more: Any) -> Any:
        began = time.perf_counter()
        result = original(*arguments, **more)
        sampled.append(time.perf_counter() - began)
        return result

    original = rlhf.ppo.rollout.generate
    rlhf.ppo.rollout.generate = generate  # the phases of `collect` are not metrics of their own
    try:
        began = time.perf_counter()
        metrics = trainer.step()
        ended = time.perf_counter()
    finally:
        rlhf.ppo.rollout.generate = original
    return metrics | {
        "rollout": sum(sampled),
        "scoring": trainer.collected_at - began - sum(sampled),
        "optimise": ended - trainer.collected_at,
        "step": ended - began,
    }


if __name__ == "__main__":
    main()
