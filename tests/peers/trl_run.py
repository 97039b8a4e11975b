"""One update of TRL's PPOTrainer on tiny Llamas, with the tensors that its formulas read and wrote.

`PPOTrainer.train()` computes rewards, advantages and losses in local variables. They are read from
its frame, at each backward pass and when it logs, so what the tests see is what TRL trained on.
"""

import sys
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_model, tiny_tokenizer
from torch import Tensor

VOCABULARY = 24  # so small that an untrained policy ends about a third of its responses by EOS


@dataclass
class TrlRun:
    """What one update computed, by TRL's own names.

    Attributes:
        args: its PPOConfig.
        rollout: tensors at the end of the update: `logprobs`, `rewards`, `*_stats`, ...
        minibatches: tensors at each backward pass: `new_logprobs`, `vpred`, ...; also
            `raw_logits` before the temperature and gradients of the loss under `grad_*`.
        whitenings: (values, mask, shift_mean, result) of each call of `masked_whiten`.
        logged: the metrics.
    """

    args: Any
    rollout: dict[str, Tensor]
    minibatches: list[dict[str, Tensor]]
    whitenings: list[tuple[Tensor, Tensor, bool, Tensor]]
    logged: dict[str, float]


def run_one_update(output_dir: str, **settings: Any) -> TrlRun:
    """Train one update of 32 responses: 3 epochs of 2 minibatches, one optimiser step each."""
    import trl.experimental.ppo.ppo_trainer as module
    from trl.experimental.ppo import PPOConfig

    args = PPOConfig(
        output_dir=output_dir,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        num_sample_generations=0,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=1,
        num_mini_batches=2,
        num_ppo_epochs=3,
        total_episodes=32,
        local_rollout_forward_batch_size=32,
        response_length=12,
        stop_token="eos",
        temperature=0.8,
        learning_rate=2e-3,
        kl_coef=0.1,
        vf_coef=0.5,
        gamma=0.97,
        lam=0.9,
        seed=3,
        **settings,
    )
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _train(module, args, patch)


def _train(module: Any, args: Any, patch: pytest.MonkeyPatch) -> TrlRun:
    from transformers import set_seed

    trainer = _trainer(module, args)
    run = TrlRun(args, {}, [], [], {})
    raw_logits: list[Tensor] = []
    real_whiten, real_forward = module.masked_whiten, module.forward
    real_backward = trainer.accelerator.backward

    def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        result = real_whiten(values, mask, shift_mean)
        run.whitenings.append((values.clone(), mask.clone(), shift_mean, result.clone()))
        return result

    def forward(*arguments: Any) -> Any:
        output = real_forward(*arguments)
        if torch.is_grad_enabled():
            raw_logits[:] = [output[0].logits.detach().clone()]
        return output

    def backward(loss: Tensor) -> None:
        names = _locals_of(module.PPOTrainer.train)
        watched = {name: names[name] for name in ("new_logprobs", "vpred", "logits")}
        for tensor in watched.values():
            tensor.retain_grad()
        real_backward(loss)
        minibatch = _tensors(names)
        minibatch |= {f"grad_{name}": tensor.grad.clone() for name, tensor in watched.items()}
        minibatch["raw_logits"] = raw_logits[0][:, names["context_length"] - 1 : -1]
        run.minibatches.append(minibatch)

    def log(metrics: dict[str, float]) -> None:
        run.rollout.update(_tensors(_locals_of(module.PPOTrainer.train)))
        run.logged.update(metrics)

    patch.setattr(module, "masked_whiten", masked_whiten)
    patch.setattr(module, "forward", forward)
    patch.setattr(trainer.accelerator, "backward", backward)
    patch.setattr(trainer, "log", log)
    set_seed(args.seed)  # the trainer draws its minibatches from numpy's global generator
    trainer.train()
    return run


def _locals_of(function: Any) -> dict[str, Any]:
    frame = sys._getframe()
    while frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame.f_locals


def _tensors(names: dict[str, Any]) -> dict[str, Tensor]:
    values = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in names.items()}
    return {k: v.detach().clone() for k, v in values.items() if isinstance(v, Tensor)}


def _trainer(module: Any, args: Any) -> Any:
    from datasets import Dataset

    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(3, VOCABULARY, (int(length),), generator=generator).tolist()
        for length in torch.randint(3, 9, (32,), generator=generator)
    ]
    data = Dataset.from_dict({"input_ids": prompts})
    return module.PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=_policy(tokenizer, noise=0.0),
        ref_model=_policy(tokenizer, noise=0.02),
        reward_model=_scorer(tokenizer, seed=1),
        value_model=_scorer(tokenizer, seed=2),
        train_dataset=data,
        eval_dataset=data,
    )


def _policy(tokenizer: Any, noise: float) -> Any:
    """A Llama that never samples padding: TRL takes a sampled pad token for the end."""
    policy = tiny_model("llama", tokenizer, vocab_size=VOCABULARY)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    forbidden = torch.zeros(VOCABULARY).index_fill(0, torch.tensor(tokenizer.pad_token_id), -1e4)
    policy.lm_head.register_forward_hook(lambda head, inputs, logits: logits + forbidden)
    return policy


def _scorer(tokenizer: Any, seed: int) -> Any:
    from transformers import LlamaForSequenceClassification

    config = tiny_model("llama", tokenizer, vocab_size=VOCABULARY).config
    config.num_labels = 1
    torch.manual_seed(seed)
    scorer = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(scorer.score.weight, std=0.2)
    return scorer.eval()
