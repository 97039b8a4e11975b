"""TRL's side of `ppo_step.py`: PPOTrainer of TRL 1.12.0, an update at each request.

Runs in an environment of its own, without rlhf.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
import trl.experimental.ppo.ppo_trainer as module
from datasets import Dataset
from parts import answer
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl.experimental.ppo import PPOConfig, PPOTrainer
from world import (
    DEVICE,
    EOS,
    SEP,
    SHAPES,
    clock,
    is_gold,
    memory_in_use,
    num_matrix_weights,
    peak_since,
)


def run_trl(options: argparse.Namespace) -> None:
    """Make an update at each request. Phases are taken at the trainer module's own functions:
    generation, then scoring until the first forward pass with gradients, then the rest."""
    mark: dict[str, Any] = {}
    generation, forward = module.batch_generation, module.forward

    def timed_generation(*arguments: Any, **more: Any) -> Any:
        if not sys.stdin.readline():
            raise SystemExit
        mark.clear()
        mark["began"], mark["worked"] = time.perf_counter(), clock()
        result = generation(*arguments, **more)
        responses = result[0][:, arguments[1].shape[1] :]
        ended, width = (responses == EOS).any(1), responses.shape[1]
        lengths = torch.where(ended, (responses == EOS).int().argmax(1) + 1, width)
        mark["tokens"] = int(lengths.sum())  # waits for the GPU
        mark["generated"] = clock()
        return result

    def timed_forward(*arguments: Any, **more: Any) -> Any:
        if torch.is_grad_enabled():
            mark.setdefault("optimise", clock())
        return forward(*arguments, **more)

    class Timed(PPOTrainer):
        def log(self, logs: dict[str, float], *arguments: Any, **more: Any) -> None:
            ended, worked = time.perf_counter(), clock()
            answer(
                {
                    "seconds": ended - mark["began"],
                    "cpu_seconds": worked - mark["worked"],
                    "rollout": mark["generated"] - mark["worked"],
                    "scoring": mark["optimise"] - mark["generated"],
                    "optimise": worked - mark["optimise"],
                    "tokens": mark["tokens"],
                    "score": float(logs["objective/scores"]),
                    "kl": float(logs["objective/kl"]),
                }
            )

    def load(cls: Any, name: str) -> Any:
        return cls.from_pretrained(options.folder / name, dtype=torch.float32).to(DEVICE)

    module.batch_generation, module.forward = timed_generation, timed_forward
    data = Dataset.from_dict(
        {"input_ids": json.loads((options.folder / "prompts.json").read_text())}
    )
    gold, policy = options.reward == "gold-count", load(LlamaForCausalLM, "policy")
    value = load(LlamaForSequenceClassification, "reward")
    trainer = Timed(
        args=trl_arguments(options),
        processing_class=AutoTokenizer.from_pretrained(
            options.folder / "policy", padding_side="left"
        ),
        model=policy,
        ref_model=load(LlamaForCausalLM, "policy"),
        reward_model=gold_reward(options)
        if gold
        else load(LlamaForSequenceClassification, "reward"),
        value_model=value,
        train_dataset=data,
        eval_dataset=data.select(range(options.batch)),
    )
    each, head = num_matrix_weights(policy)
    weights = [each + num_matrix_weights(value)[0], head]
    answer({"before": memory_in_use(), "forward": "padded", "weights": weights})
    trainer.train()
    answer({"peak": peak_since()})


def trl_arguments(options: argparse.Namespace) -> Any:
    # accumulation 1: with more, TRL makes one optimiser step an epoch
    return PPOConfig(
        output_dir=str(options.folder / "trl"),
        use_cpu=DEVICE == "cpu",
        bf16=DEVICE == "cuda",
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=1,
        num_mini_batches=options.minibatches,
        num_ppo_epochs=options.epochs,
        total_episodes=options.updates * options.batch,
        local_rollout_forward_batch_size=options.batch,
        response_length=options.limit,
        stop_token="eos",
        learning_rate=options.lr,
        lr_scheduler_type="constant",
        kl_coef=options.kl_coef,
        temperature=1.0,
        missing_eos_penalty=None,
        num_sample_generations=0,
        seed=options.seed,
    )


def gold_reward(options: argparse.Namespace) -> Any:
    """A module that looks like a sequence classifier to TRL: the gold count up to each token."""

    class Backbone(torch.nn.Module):
        def forward(self, input_ids: Any, attention_mask: Any, **_: Any) -> Any:
            after = ((input_ids == SEP) & attention_mask.bool()).cumsum(1) > 0
            response = after & (after.cumsum(1) > 1) & attention_mask.bool()
            good = response & is_gold(input_ids, SHAPES[options.preset][4])
            share = (good.cumsum(1).float() / options.limit)[..., None]
            return BaseModelOutputWithPast(last_hidden_state=share, hidden_states=(share,))

    class Reward(torch.nn.Module):
        base_model_prefix = "backbone"

        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.score = Backbone(), torch.nn.Identity()

    return Reward()
