"""The optimiser of policy and critic: AdamW, as one kernel or as a loop of operations.

One kernel (`fused`) reads and writes each weight once. Its results differ from those of the loop
by rounding, so that a small model on a CPU keeps the loop: published figures stay as they are, and
a step is a small part of an update there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.zero import shape_of

KERNEL_FROM = 1_000_000  # weights of a model on a CPU


def make_optimizer(parameters: Iterable[Tensor], rate: float, ppo: PPOConfig) -> torch.optim.AdamW:
    """Make the optimiser of a model.

    Weight decay applies to matrices only: weights of linear layers (the scalar head's and LoRA's
    too) and embeddings. Biases and norms have one dimension and no decay, as in transformers.

    Source: eps 1e-5, no decay: N, N+. Betas 0.9, 0.95: IG; with decay 0.1: Llama 2 (2307.09288).
    """
    parameters = list(parameters)
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in parameters if len(shape_of(p)) > 1],
            "weight_decay": ppo.weight_decay,
        },
        {"params": [p for p in parameters if len(shape_of(p)) <= 1]},
    ]
    common: dict[str, Any] = {"betas": tuple(ppo.adam_betas), "eps": ppo.adam_epsilon}
    common["fused"] = is_one_kernel(parameters, ppo)
    return torch.optim.AdamW(groups, lr=rate, weight_decay=0.0, **common)


def is_one_kernel(parameters: Sequence[Tensor], ppo: PPOConfig) -> bool:
    """`ppo.fused_adam`, with a value for null: whether one kernel updates these weights."""
    if ppo.fused_adam is not None:
        return ppo.fused_adam
    kind, numel = parameters[0].device.type, sum(shape_of(p).numel() for p in parameters)
    return kind == "cuda" or (kind == "cpu" and numel >= KERNEL_FROM)


def describe_optimizers(optimizers: Mapping[str, torch.optim.AdamW]) -> str:
    """Which models one kernel updates, in words; "" where none."""
    names = [model for model, optimizer in optimizers.items() if optimizer.defaults.get("fused")]
    if not names:
        return ""
    return f"AdamW in one kernel for {' and '.join(names)} (ppo.fused_adam=false: the plain loop)"
