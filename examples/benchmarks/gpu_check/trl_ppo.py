"""TRL 1.12.0's PPO, the last release with one, on the models and prompts of `ppo.py`.

Runs where trl is 1.12.0; rlhf is not imported. Phases are taken at the trainer module's own
functions: generation, then scoring until the first forward pass with gradients, then the rest.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
import trl.experimental.ppo.ppo_trainer as module
from datasets import Dataset
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer
from world import DEVICE, EOS, check_finite, make_model, make_prompts, make_tokenizer, median, write
from world import options as command_line

mark: dict[str, Any] = {}


def timed_generation(*arguments: Any, **more: Any) -> Any:
    """Generate, and note when, and how many tokens until EOS."""
    mark.clear()
    mark["began"] = time.perf_counter()
    result = generation(*arguments, **more)
    responses = result[0][:, arguments[1].shape[1] :]
    ended, width = (responses == EOS).any(1), responses.shape[1]
    lengths = torch.where(ended, (responses == EOS).int().argmax(1) + 1, width)
    mark["tokens"] = int(lengths.sum())  # waits for the GPU
    mark["generated"] = time.perf_counter()
    return result


def timed_forward(*arguments: Any, **more: Any) -> Any:
    """Forward, and note when the first pass with gradients begins."""
    if torch.is_grad_enabled():
        mark.setdefault("optimise", time.perf_counter())
    return forward(*arguments, **more)


generation, forward = module.batch_generation, module.forward
module.batch_generation, module.forward = timed_generation, timed_forward


class Timed(PPOTrainer):
    """Keeps the seconds and metrics of each update."""

    rows: list[dict[str, float]] = []

    def log(self, logs: dict[str, float], *arguments: Any, **more: Any) -> None:
        ended = time.perf_counter()
        names = ("objective/kl", "objective/scores", "val/ratio", "loss/policy_avg")
        self.rows.append(
            {name: float(logs[name]) for name in names}
            | {
                "rollout": mark["generated"] - mark["began"],
                "scoring": mark["optimise"] - mark["generated"],
                "optimise": ended - mark["optimise"],
                "step": ended - mark["began"],
                "tokens": mark["tokens"],
            }
        )


def main() -> None:
    options = command_line()
    size, dry = options.size, options.size == "dry"
    num_updates, batch_size = (2, 8) if dry else (3, 64)
    prompts = make_prompts(size, num_updates * batch_size)
    data = Dataset.from_dict({"input_ids": prompts})
    policy = make_model(LlamaForCausalLM, size, 1)
    value = make_model(LlamaForSequenceClassification, size, 3, num_labels=1)
    with tempfile.TemporaryDirectory() as folder:
        # accumulation 1: with more, TRL makes one optimiser step an epoch
        arguments = PPOConfig(
            output_dir=folder,
            use_cpu=DEVICE == "cpu",
            bf16=DEVICE == "cuda",
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=1,
            num_mini_batches=4,
            num_ppo_epochs=4,
            total_episodes=num_updates * batch_size,
            local_rollout_forward_batch_size=batch_size,
            response_length=8 if dry else 256,
            stop_token="eos",
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            temperature=1.0,
            missing_eos_penalty=None,
            num_sample_generations=0,
        )
        tokenizer = make_tokenizer(size)
        tokenizer.padding_side = "left"
        Timed(
            args=arguments,
            processing_class=tokenizer,
            model=policy,
            ref_model=make_model(LlamaForCausalLM, size, 1),
            reward_model=make_model(LlamaForSequenceClassification, size, 2, num_labels=1),
            value_model=value,
            train_dataset=data,
            eval_dataset=data.select(range(batch_size)),
        ).train()
    rows = Timed.rows
    check_finite(rows, policy, value)
    phases = {name: median(rows, name) for name in ("rollout", "scoring", "optimise", "step")}
    tokens_per_second = median(rows, "tokens") / phases["step"]
    write(options.figures, phases=phases, tokens_per_second=tokens_per_second, updates=rows)


if __name__ == "__main__":
    main()
